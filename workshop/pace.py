"""The one setting of the notebooks: SHARE, in the first cell of each, how much of a core is yours.

SHARE = 0.2             a fifth of a core is free, on a busy server
fewer(40, SHARE)        18 steps in place of 40
fewer(40, SHARE, 30)    30: with fewer nothing would be seen
"""


def fewer(number: int, share: float, least: int = 1) -> int:
    """So many steps or pictures on a core of one's own, and fewer on a share of one.

    By the root of the share: on a fifth of a core everything takes five times as long, but there is
    only 45 % of it. So the wait doubles, and what is left still shows something."""
    share = min(max(share, 0.04), 1.0)  # who writes 20 means all, who writes 0 means little
    return max(least, round(number * share**0.5))
