"""What people call a picture's path and its captions, and what is no caption in a caption's place.

kept = clean(["a cat", " ", "nan", "['one', 'two']"])
kept.captions                               # ["a cat", "one", "two"]
kept.others                                 # how many were left out, by the reason
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Iterator

from formats.files import LeftOut

# Under which names people's files have a picture's path, and its captions.
PICTURE_KEYS = (
    *("image", "images", "file_name", "filename", "image_file", "image_path", "image_name"),
    *("filepath", "file_path", "file", "path", "img"),
)
CAPTION_KEYS = ("caption", "captions", "short", "long")
# Where there is none of those, the first of these.
OTHER_CAPTION_KEYS = ("text", "description", "caption_str", "comment", "sentences", "title")

CAPTION_ENDINGS = (".txt", ".caption")  # of files beside a picture

# What programs write where there is no caption.
PLACEHOLDERS = {"nan", "-nan", "none", "null", "nil", "n/a", "#n/a", "na", "<na>", "undefined"}


def is_for_training(split) -> bool:
    if not isinstance(split, str):
        return True
    return split.lower().startswith("train") or split.lower() == "restval"


# ---- What is a caption, and what is none

BLANK = "captions that are blank or null"
PLACEHOLDER = "captions that are placeholders, such as nan or None"
NO_TEXT = "captions that are no text"
SAID_BEFORE = "captions that the picture has already"


class Captions:
    """The captions of a record, and how many others were left out of it, by the reason."""

    def __init__(self):
        self.captions: list[str] = []
        self.others = Counter()

    @property
    def fault(self) -> str:
        """Why there is none."""
        if PLACEHOLDER in self.others:
            return "no caption but a placeholder, such as nan or None"
        if NO_TEXT in self.others:
            return "no caption that is text"
        return "no caption"

    def count(self, left_out: LeftOut, image: str) -> None:
        for reason, number in self.others.items():
            left_out.add(reason, image, number)


def clean(values) -> Captions:
    """A file's captions, whatever they are -> those that are captions, stripped, each once."""
    kept = Captions()
    for value in leaves(values):
        fault = fault_of_caption(value)
        if fault:
            kept.others[fault] += 1
        elif stripped(value) in kept.captions:
            kept.others[SAID_BEFORE] += 1
        else:
            kept.captions.append(stripped(value))
    return kept


def stripped(text: str) -> str:
    """Without white space around it, and without the marks of files that were put together."""
    return text.strip().strip("\ufeff").strip()


def leaves(value) -> Iterator:
    """What stands in lists inside of lists; a text that is a list is one too."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str) and LIST_AS_TEXT.fullmatch(value):
        # What is quoted in there is a text, whatever it looks like.
        items = LIST_ITEM.findall(value)
        yield from (unquoted(item) for item in items)
        if not items:
            yield value
    else:
        yield value


# What Python, JSON or NumPy, which puts no commas between, print of a list: ['one', "two"], [nan]
LIST_ITEM = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|None|null|nan""")
LIST_AS_TEXT = re.compile(
    rf"\s*[\[(]\s*(?:(?:{LIST_ITEM.pattern})(?:[,\s]+(?:{LIST_ITEM.pattern}))*)?,?\s*[\])]\s*"
)


def unquoted(item: str) -> str | None:
    try:
        return ast.literal_eval(item)
    except (ValueError, SyntaxError):  # null, nan, and escapes that Python does not know
        return item[1:-1] if item[0] in "'\"" else None


def fault_of_caption(value) -> str | None:
    """Why something is no caption, or None."""
    if value is None:
        return BLANK
    if isinstance(value, float) and math.isnan(value):
        return PLACEHOLDER
    if not isinstance(value, str):
        return NO_TEXT
    if not stripped(value):
        return BLANK
    if stripped(value).lower() in PLACEHOLDERS or LIST_AS_TEXT.fullmatch(value):
        return PLACEHOLDER
    return None
