"""What captions find, before and after training: queries with their nearest pictures.

    python -m figures gallery --runs both=runs/toy

Axes: B batch, D hidden.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data import open_image
from eval import Embedder, recall_at_k
from figures.common import (
    BEFORE,
    Compared,
    Item,
    image_features,
    nothing_trained,
    summaries,
    trained,
    trend,
    verdict,
    with_short,
)
from figures.style import BLUE, ORANGE, drawing, new_figure, show, wrapped


def measure(embedder: Embedder, items: list[Item], k: int = 5) -> dict:
    """Each item's first short caption as a query over all items' pictures: the k nearest pictures
    (their number among the items), their cosine similarities, and R@1 in percent. The picture that
    a caption was written for is the only right one."""
    items = with_short(items)
    text_ids = [embedder.layout.text_side(item.short[0]) for item in items]
    image_ids = [embedder.layout.image_side()] * len(items)
    texts = summaries(embedder, text_ids)  # (B, D)
    images = summaries(embedder, image_ids, image_features(embedder, items))
    texts = F.normalize(texts.float().cpu(), dim=-1)
    images = F.normalize(images.float().cpu(), dim=-1)
    scores = texts @ images.T  # (texts, images)
    top = scores.topk(min(k, len(items)))
    rounded = []
    for row in top.values.tolist():
        rounded.append([round(score, 4) for score in row])
    return {
        "items": len(items),
        "t2i_r1": recall_at_k(scores, torch.arange(len(items)), ks=(1,))["t2i_r1"],
        "queries": [item.short[0] for item in items],
        # Where they are, not what they show: the files stay small.
        "images": [[str(item.image), item.part] for item in items],
        "found": top.indices.tolist(),
        "scores": rounded,
    }


def is_right(numbers: dict) -> np.ndarray:
    """(items,): is a query's nearest picture its own?"""
    nearest = np.array([row[0] for row in numbers["found"]])
    return nearest == np.arange(len(nearest))


def interesting(before: dict, after: dict, number: int) -> list[int]:
    """Queries to draw: the first ones, in the file's order, that one of the two models answers with
    a wrong picture; where these do not suffice, the first of the others."""
    # In the file's order, for a hand-picked selection would prove nothing.
    both_right = is_right(before) & is_right(after)
    order = np.argsort(both_right, kind="stable")  # False comes before True
    return sorted(order[:number].tolist())


def say(found: Compared) -> str:
    before = found[BEFORE][0]
    sentences = []
    for name in trained(found):
        seeds = found[name]
        direction, change = trend(before["t2i_r1"], [seed["t2i_r1"] for seed in seeds], ".1f")
        mended = np.mean([(~is_right(before) & is_right(seed)).sum() for seed in seeds])
        broken = np.mean([(is_right(before) & ~is_right(seed)).sum() for seed in seeds])
        appears = verdict([direction == "up"])
        sentences.append(
            f"{name}: better retrieval {appears}: text-to-image R@1 {change} % of "
            f"{before['items']} queries; {mended:.0f} mended, {broken:.0f} broken."
        )
    return "\n".join(sentences) or nothing_trained(found)


# Of the picture, in inches.
SIDE = 0.98  # from one picture to the next
ROW = 1.28  # from one query to the next
TEXT = 2.6  # the column of queries
GAP = 0.35  # between before and after


@drawing
def draw(found: Compared, name: str | None = None, number: int = 5):
    """Queries and the pictures they find, best first, before and after (`name`'s first seed): a
    check mark and a blue frame where it is the picture that the caption was written for, a cross
    and an orange frame where it is not."""
    before = found[BEFORE][0]
    if name is None:
        name = (trained(found) or [BEFORE])[-1]
    after = found[name][0]
    queries = interesting(before, after, number)
    k = len(before["found"][0])

    # Placed by hand: an automatic layout would give the rows of pictures different sizes.
    width = 3.0 + 2 * k * SIDE
    height = 0.5 + ROW * len(queries)
    figure = new_figure(width, height, layout="none")
    columns = [(TEXT, "before training", before), (TEXT + k * SIDE + GAP, name, after)]
    for left, title, numbers in columns:
        label = f"{title}: R@1 {numbers['t2i_r1']:.1f} % of {numbers['items']} queries"
        figure.text(left / width, 1 - 0.33 / height, label, fontsize=12, weight="bold")
    for row, query in enumerate(queries):
        bottom = height - 0.45 - ROW * (row + 1)
        words = wrapped(before["queries"][query], 26)
        style = dict(va="center", fontsize=11, style="italic")
        figure.text(0.01, (bottom + 0.75) / height, words, **style)
        for left, _, numbers in columns:
            draw_found(figure, left, bottom, numbers, query)
    return figure


def draw_found(figure, left: float, bottom: float, numbers: dict, query: int) -> None:
    """The pictures that a query finds, best first, from a place in inches on."""
    width, height = figure.get_size_inches()
    for index, score in zip(numbers["found"][query], numbers["scores"][query]):
        # Matplotlib counts in parts of the figure. Below a picture is room for its mark.
        place = (left / width, (bottom + 0.27) / height, 0.9 * SIDE / width, 0.9 / height)
        axes = figure.add_axes(place)
        show(axes, np.asarray(open_image(*numbers["images"][index])))
        is_own = index == query
        color = BLUE if is_own else ORANGE
        mark = "✓" if is_own else "✗"  # not by colour alone
        for spine in axes.spines.values():
            spine.set(visible=True, color=color, linewidth=4 if is_own else 1.5)
        axes.set_xlabel(f"{mark} {score:.2f}", color=color, fontsize=11, labelpad=5)
        left += SIDE
