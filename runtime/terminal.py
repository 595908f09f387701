"""What a terminal may not be able to show.

print_any_text()      # once, before a command prints names and captions
"""

import sys


def print_any_text() -> None:
    """From now on a character that the terminal's encoding lacks is printed as a question mark.

    Without this, a picture called 猫.png would end a search with a traceback where a terminal knows
    Western letters only, and its result would be lost."""
    for stream in (sys.stdout, sys.stderr):
        # Not every stream has this: notebooks and tests put their own in place.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
