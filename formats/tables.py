"""Captions in tables: CSV, TSV, and what has another delimiter than its ending says.

    for record in read_table(Path("captions.csv"), LeftOut()):
        record["image"], record["captions"]

A reader as in formats/captions.py. What cannot be told apart is refused, with its line.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from formats.files import InputError, LeftOut, open_text
from formats.pictures import is_picture
from formats.records import OTHER_CAPTION_KEYS, PICTURE_KEYS, is_for_training

LONGEST_CELL = 2**24  # characters

CAPTION_COLUMN = re.compile(r"captions?([ ._-]?\d+)?|caption[ _-](short|long|text|raw)|short|long")


def read_table(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """CSV or TSV: a column of pictures, such as "image", and columns of captions.

    Raises InputError, with the line, where cells do not fit their columns."""
    # newline="": a line break inside of quotes belongs to its caption.
    with open_text(path, newline="") as file:
        header = file.readline()
        delimiter = delimiter_of(path, header)
        lines = KeptLines(header, file)
        csv.field_size_limit(LONGEST_CELL)
        # strict: else a quote that never ends swallows the rows after it without a word.
        rows = csv.reader(
            lines, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t"
        )
        begins = 0
        try:
            names = [name.strip().lower() for name in next(rows, [])]
            picture, captions = columns_of(path, names, left_out)
            split = names.index("split") if "split" in names else None
            begins = rows.line_num
            for row in rows:
                place = f"{path}, line {begins + 1}"
                begins = rows.line_num
                if not any(cell.strip() for cell in row):
                    continue
                check_row(row, names, delimiter, place)
                row += [""] * (len(names) - len(row))  # a row that is too short
                if split is not None and row[split] and not is_for_training(row[split]):
                    left_out.add("of a split for tests", place)
                    continue
                # An empty cell is no caption, of which there may be fewer than columns.
                yield {
                    "image": row[picture].strip(),
                    "captions": [row[index] for index in captions if row[index].strip()],
                }
        except csv.Error as error:
            place = f"{path}, after line {begins}"
            raise InputError(f"{place}: {error}; {QUOTES}") from None


QUOTES = "see to the quotes: a cell that begins with one must end with one, and others are doubled"


class KeptLines:
    """The first line, then the others of a file; some files end lines with a bare \\r."""

    def __init__(self, first: str, file: TextIO):
        self.first = first
        self.file = file

    def __iter__(self) -> Iterator[str]:
        yield self.first
        yield from self.file


def delimiter_of(path: Path, header: str) -> str:
    """What stands between the names of the columns, whatever the file's ending says."""
    by_ending = "\t" if path.suffix.lower() == ".tsv" else ","
    candidates = [by_ending, "\t", ",", ";", "|"]
    for delimiter in candidates:
        names = [name.strip().strip('"').lower() for name in header.split(delimiter)]
        if any(name in PICTURE_KEYS for name in names) and len(names) > 1:
            return delimiter
    return by_ending


def columns_of(path: Path, names: list[str], left_out: LeftOut) -> tuple[int, list[int]]:
    """The places of the column of pictures and of those of captions. Raises InputError."""
    pictures = [index for index, name in enumerate(names) if name in PICTURE_KEYS]
    captions = [index for index, name in enumerate(names) if CAPTION_COLUMN.fullmatch(name)]
    if not captions:
        captions = [index for index, name in enumerate(names) if name in OTHER_CAPTION_KEYS][:1]
    # "image" before "path", where a table has both.
    pictures.sort(key=lambda index: PICTURE_KEYS.index(names[index]))
    if not pictures or not captions:
        advice = "the first line must name a column image and a column caption"
        raise InputError(f"{path}: {advice}; it is {names[:6]}")
    if names.count(names[pictures[0]]) > 1:
        raise InputError(f"{path}: two columns are named {names[pictures[0]]}; rename one")
    for index, name in enumerate(names):
        # Such as caption_id and caption_lang. What is a caption, the user may know better.
        if name.startswith("caption") and index not in captions:
            left_out.add("column named like captions and not read; caption_1 would be", name)
    return pictures[0], captions


def check_row(row: list[str], names: list[str], delimiter: str, place: str) -> None:
    """Raise InputError for a row that holds more than its columns, or another row."""
    surplus = row[len(names) :]
    if any(cell.strip() for cell in surplus):
        found = f"{len(row)} cells for {len(names)} columns"
        raise InputError(f"{place}: {found}; put captions that hold {delimiter!r} into quotes")
    for cell in row:
        if "\n" in cell and holds_a_row(cell, delimiter, len(names)):
            raise InputError(f"{place}: a cell between quotes holds whole rows; {QUOTES}")


def holds_a_row(cell: str, delimiter: str, columns: int) -> bool:
    """Has a cell of several lines swallowed what were rows?"""
    for line in cell.splitlines():
        if any(is_picture(part.strip()) for part in line.split(delimiter)):
            return True
    # Tabs hardly stand in captions. As many as rows would have are rows.
    breaks = cell.count("\n")
    return delimiter == "\t" and columns > 1 and cell.count("\t") >= breaks * (columns - 1)
