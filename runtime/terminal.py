"""What a command shows in a terminal: any text, and errors in one line.

print_any_text()              # once, before a command prints names and captions
with errors_in_one_line():    # around what a command does; it begins with print_any_text()
    ...
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from formats.files import InputError

USER_ERRORS = (InputError, OSError)  # shown as one line, without a traceback


def print_any_text() -> None:
    """From now on a character that the terminal's encoding lacks is printed as a question mark.

    Without this, a picture called 猫.png would end a search with a traceback where a terminal knows
    Western letters only, and its result would be lost."""
    for stream in (sys.stdout, sys.stderr):
        # Not every stream has this: notebooks and tests put their own in place.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Inside, what a user can mend ends the program with one line instead of a traceback."""
    print_any_text()
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
