"""Makes the notebooks: each source, `source/*.py`, gives one with blanks and one with solutions.

    python workshop/build.py            writes workshop/*.ipynb and workshop/solutions/*.ipynb
    python workshop/build.py --check    writes nothing, fails where a notebook is out of date
    python workshop/build.py --share 0.2    the same for a room in which a fifth of a core is free

A source is plain Python in cells ("percent format"). What follows `# %%` says what a cell is:

    # %% [markdown]      text, as comments
    # %%                 code, in both notebooks
    # %% home            the same, for readers alone: a room skips it, and nothing else needs it
    # %% setup           in both, and the exercises need it (a test runs these, then an exercise)
    # %% exercise 1.1    code with a blank, in the participants' notebook
    # %% solution 1.1    what stands in its place in solutions/
    # %% check 1.1       the call of the checker, in both

An exercise whose heading says "at home" is one, too. Such cells begin with "# At home.".
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class Cell(NamedTuple):
    kind: str  # "[markdown]", "", "home", "setup", "exercise", "solution", "check"
    name: str  # "1.1"
    text: str


def read_cells(path: Path) -> list[Cell]:
    """The cells of a source, in order; what stands above the first one is left out."""
    source = path.read_text(encoding="utf-8")
    parts = re.split(r"^# %%", source, flags=re.MULTILINE)
    cells = []
    for part in parts[1:]:
        head, _, body = part.partition("\n")
        kind, _, name = head.strip().partition(" ")
        if kind == "[markdown]":
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(Cell(kind, name, body.strip("\n")))
    return cells


def is_at_home(cell: Cell, cells: list[Cell]) -> bool:
    """Whether a room leaves out this cell of code."""
    if cell.kind in ("exercise", "solution", "check"):
        heading = rf"### Exercise {cell.name}: .*at home\)"
        return any(re.search(heading, each.text) for each in cells if each.kind == "[markdown]")
    return cell.kind == "home"


def notebook(cells: list[Cell], solved: bool) -> str:
    """The text of an .ipynb file, without outputs, so that changes stay readable."""
    left_out = "exercise" if solved else "solution"
    content = []
    for cell in cells:
        if cell.kind == left_out:
            continue
        text = cell.text
        if is_at_home(cell, cells):
            text = f"# At home.\n{text}"
        # The keys in the order in which Jupyter writes them.
        entry = {"cell_type": "markdown" if cell.kind == "[markdown]" else "code"}
        if entry["cell_type"] == "code":
            entry["execution_count"] = None
        entry["id"] = f"cell-{len(content):02}"
        entry["metadata"] = {}
        if entry["cell_type"] == "code":
            entry["outputs"] = []
        entry["source"] = text.splitlines(keepends=True)
        content.append(entry)
    book = {"cells": content, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def notebooks(share: float = 1.0) -> dict[Path, str]:
    """Every notebook's path and text. `share`: the setting at the top of each."""
    result = {}
    for source in sorted((HERE / "source").glob("*.py")):
        cells = []
        for cell in read_cells(source):
            if cell.text == "SHARE = 1.0":
                cell = cell._replace(text=f"SHARE = {share}")
            cells.append(cell)
        result[HERE / f"{source.stem}.ipynb"] = notebook(cells, solved=False)
        result[HERE / "solutions" / f"{source.stem}.ipynb"] = notebook(cells, solved=True)
    return result


def is_up_to_date(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a notebook is out of date"
    )
    share = "what SHARE is at the top of each notebook (1.0: a core of one's own)"
    parser.add_argument("--share", type=float, default=1.0, metavar="NUMBER", help=share)
    args = parser.parse_args()
    for path, text in notebooks(args.share).items():
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not is_up_to_date(path, text):
            name = path.relative_to(HERE)
            sys.exit(f"{name} is not what its source gives: run python workshop/build.py")


if __name__ == "__main__":
    main()
