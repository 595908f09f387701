"""Writes the tables of results in the documents, from the JSON that the runs wrote.

    python -m docs.tables            rewrites every block between two marks, in all documents
    python -m docs.tables --check    says which are not as the JSON has them

A block stands between `<!-- NAME: ... -->` and `<!-- end -->`. Sources: docs/main.json, which is
the results.json of `python train.py`, toy/ablation.json of `python -m toy.ablation`, and
docs/one-page.txt, which `python workshop/one_page.py` printed. A test holds documents and these
files equal.
"""

import argparse
import io
import json
import re
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import eval
from toy import ablation

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- (\w+): [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
# The columns of README: one of retrieval each way, composition, captions.
SHORT = ("T2I@1", "I2T@1", "swap", "wino group", "attributes")
README_ROWS = ("no training", "both", "both + AR", "CLIP from scratch")


def main_table() -> str:
    """Five columns of what `python train.py` prints: before, after, the paper's rows."""
    results = json.loads((ROOT / "docs" / "main.json").read_text())
    rows = {
        "untrained": eval.table_columns(results["before"]),
        "trained": eval.table_columns(results["after"]),
    }
    rows["difference"] = {
        name: value - rows["untrained"][name] for name, value in rows["trained"].items()
    }
    paper = eval.paper_rows()
    for name in ("paper: no training", "paper: LoRA + soft prompts + AR"):
        rows[name] = paper[name]
    output = io.StringIO()
    with redirect_stdout(output):
        eval.print_table({label: chosen(row, SHORT) for label, row in rows.items()})
    return f"```\n{output.getvalue().rstrip()}\n```\n"


def chosen(row: dict[str, float], columns: tuple[str, ...]) -> dict[str, float]:
    return {name: row[name] for name in columns if name in row}


def toy_table() -> str:
    """Four rows of the ablation, means over its seeds with 95 % intervals."""
    results = json.loads((ROOT / "toy" / "ablation.json").read_text())
    lines = ["| | " + " | ".join(SHORT) + " |", "|---" * (len(SHORT) + 1) + "|"]
    for name in README_ROWS:
        runs = [run["columns"] for run in results[name].values()]
        cells = [cell(runs, column) for column in SHORT]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(runs: list[dict[str, float]], column: str) -> str:
    values = [run[column] for run in runs if column in run]
    if not values:
        return "-"
    mean, half = ablation.interval(values)
    if len(values) == 1:  # the base is the same for every seed
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {half:.1f}"


def ablation_table() -> str:
    """Everything that the ablation found."""
    results = json.loads((ROOT / "toy" / "ablation.json").read_text())
    return ablation.report(results) + "\n"


def one_page() -> str:
    """What `python workshop/one_page.py > docs/one-page.txt` printed, in lines that fit a page."""
    lines = []
    for line in (ROOT / "docs" / "one-page.txt").read_text(encoding="utf-8").splitlines():
        lines += textwrap.wrap(line, 100, subsequent_indent="       ")
    return "```\n" + "\n".join(lines) + "\n```\n"


TABLES = {"main": main_table, "toy": toy_table, "ablation": ablation_table, "one_page": one_page}


def renewed(text: str) -> str:
    """A document with its blocks as the JSON has them."""

    def replace(match: re.Match) -> str:
        return match[1] + TABLES[match[2]]() + match[3]

    return BLOCK.sub(replace, text)


def documents() -> list[Path]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("toy/*.md")]
    return [path for path in sorted(found) if BLOCK.search(path.read_text(encoding="utf-8"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    args = parser.parse_args()
    old = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        new = renewed(text)
        if new != text:
            old.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'not as the JSON has it' if args.check else 'renewed'}: {', '.join(old) or 'nothing'}")
    if args.check and old:
        sys.exit(1)


if __name__ == "__main__":
    main()
