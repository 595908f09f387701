"""Makes slides.html of slides.md: one file that any browser shows, without network.

    python workshop/slides/build.py            writes workshop/slides/slides.html
    python workshop/slides/build.py --check    writes nothing, fails where it is out of date

It needs Python alone. In slides.md, lines of `---` part the slides, and behind a line `Notes:`
stands what the speaker says. The rest is the Markdown that people know, and four things more:

    ||| alone on a line        what follows stands in the next column
    ```math                    a formula, set large; _{i} and ^{i} are set below and above
    ```strip                   boxes for tokens: "COLOR token token* | COLOR token ...";
                               a star frames a token
    {{...}}                    a number, a table or a function, taken from where it is kept, so that
                               no slide grows old (see `FILLERS`)
"""

import argparse
import ast
import base64
import html
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGET = HERE / "slides.html"
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
WIDTH = 1152  # of a slide's text, in the units of template.html
CODE_SIZE = 27  # of the letters of code, at most
MATH_SIZE = 42
CODE_HEIGHT = 380


class Slide(NamedTuple):
    body: str  # Markdown
    notes: str  # Markdown


def read_slides(text: str) -> list[Slide]:
    slides = []
    for part in re.split(r"^---$", text, flags=re.MULTILINE):
        body, _, notes = part.partition("\nNotes:")
        slides.append(Slide(body.strip(), notes.strip()))
    return slides


# ---- What {{...}} stands for


def toy_cell(row: str, column: str) -> str:
    """{{toy ROW | COLUMN}}: a cell of the ablation's table, "89.8 ± 0.8"."""
    table = tables_of(ROOT / "toy" / "ablation.md")[0]
    names = table[0]
    for cells in table[1:]:
        if cells[0] == row and column in names:
            return cells[names.index(column)]
    raise ValueError(f"toy/ablation.md has no row {row!r} with a column {column!r}")


def toy_difference(first: str, second: str, column: str) -> str:
    """{{difference ROW | ROW | COLUMN}}: paired by seed, with the verdict."""
    for cells in tables_of(ROOT / "toy" / "ablation.md")[1][1:]:
        if cells[:3] == [first, second, column]:
            return f"{cells[3]}, {cells[4]}"
    raise ValueError(f"toy/ablation.md does not compare {first!r} with {second!r} in {column!r}")


def tables_of(path: Path) -> list[list[list[str]]]:
    """The Markdown tables of a file, as rows of cells, without the line below the heads."""
    tables = []
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [cells_of(line) for line in block.splitlines()]
        tables.append([rows[0], *rows[2:]])
    return tables


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main_number(*keys: str) -> str:
    """{{main before | retrieval | t2i_r1}}: a number of the main command's results."""
    value = json.loads((ROOT / "docs" / "main.json").read_text())
    for key in keys:
        value = value[key]
    return f"{value:.1f}"


def paper_number(table: str, row: str, column: str) -> str:
    """{{paper TABLE | ROW | COLUMN}}: a number that the paper reports."""
    return f"{json.loads((ROOT / 'docs' / 'paper.json').read_text())[table][row][column]:.1f}"


def block_of(file: str, name: str) -> str:
    """{{block FILE | NAME}}: what docs/tables.py writes between two marks of a document."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: .*?-->\n(.*?)<!-- end -->", text, re.DOTALL)
    if not found:
        raise ValueError(f"{file} has no block {name!r}")
    return found[1].strip()


def source_of(file: str, name: str) -> str:
    """{{source FILE | NAME}}: a function or a method, "Class.method", without its docstring."""
    text = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        named = [each for each in node.body if getattr(each, "name", None) == part]
        if not named:
            raise ValueError(f"{file} has no {name!r}")
        node = named[0]
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        del lines[docstring.lineno - node.lineno : docstring.end_lineno - node.lineno + 1]
    indent = len(lines[0]) - len(lines[0].lstrip())
    code = "\n".join(without_long_comment(line[indent:]) for line in lines)
    return f"```\n{code}\n```"


def without_long_comment(line: str) -> str:
    """Behind code, a comment that makes the line too long for a wall is left out."""
    if len(line) > 80 and not line.strip().startswith("#"):
        return re.sub(r"  # .*", "", line)
    return line


def text_of(file: str) -> str:
    """{{text FILE}}: a whole file, as it is."""
    return f"```\n{(ROOT / file).read_text(encoding='utf-8').rstrip()}\n```"


FILLERS = {
    "toy": toy_cell,
    "difference": toy_difference,
    "main": main_number,
    "paper": paper_number,
    "block": block_of,
    "source": source_of,
    "text": text_of,
}


def fill(text: str) -> str:
    def replace(match: re.Match) -> str:
        name, _, rest = match[1].partition(" ")
        arguments = [argument.strip() for argument in rest.split("|")]
        return FILLERS[name](*arguments)

    return re.sub(r"\{\{(.+?)\}\}", replace, text)


# ---- Markdown to HTML, as much of it as slides need


def inline(text: str) -> str:
    """Bold, italic, code, links, and what is set below or above."""
    parts = re.split(r"(`[^`]+`)", text)
    result = []
    for part in parts:
        if part.startswith("`") and part.endswith("`") and len(part) > 1:
            result.append(f"<code>{html.escape(part[1:-1])}</code>")
            continue
        part = html.escape(part, quote=False)
        part = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', part)
        part = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", part)
        part = re.sub(r"\*(.+?)\*", r"<i>\1</i>", part)
        part = re.sub(r"_\{(.+?)\}", r"<sub>\1</sub>", part)
        part = re.sub(r"\^\{(.+?)\}", r"<sup>\1</sup>", part)
        result.append(part)
    return "".join(result)


def to_html(markdown: str) -> str:
    """The blocks of a slide or of its notes, one after another."""
    lines = markdown.splitlines()
    result = []
    while lines:
        line = lines.pop(0)
        if line.startswith("```"):
            content = take_while(lines, lambda each: not each.startswith("```"))
            lines.pop(0)  # the closing fence
            result.append(fence(line[3:].strip(), content))
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            result.append(f"<h{level}>{inline(line.lstrip('# '))}</h{level}>")
        elif line.startswith("- "):
            items = [line, *take_while(lines, lambda each: each.startswith(("- ", "  ")))]
            result.append(list_of(items))
        elif line.startswith("|"):
            rows = [line, *take_while(lines, lambda each: each.startswith("|"))]
            result.append(table(rows))
        elif line.startswith("!["):
            result.append(picture(line))
        elif line.startswith("> "):
            result.append(f"<blockquote>{inline(line[2:])}</blockquote>")
        elif line.strip():
            rest = take_while(lines, is_text)
            result.append(f"<p>{inline(' '.join([line, *rest]))}</p>")
    return "\n".join(result)


def is_text(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(("```", "#", "- ", "|", "![", "> "))


def take_while(lines: list[str], wanted) -> list[str]:
    """The first lines that are wanted, taken away from `lines`."""
    taken = []
    while lines and wanted(lines[0]):
        taken.append(lines.pop(0))
    return taken


def list_of(lines: list[str]) -> str:
    items = []
    for line in lines:
        if line.startswith("- "):
            items.append(line[2:])
        else:  # the item goes on
            items[-1] += f" {line.strip()}"
    return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"


def table(lines: list[str]) -> str:
    rows = []
    for number, line in enumerate(lines):
        if number == 1:  # |---|---|
            continue
        tag = "th" if number == 0 else "td"
        # A number and its interval stay on one line.
        line = line.replace(" ± ", "\u00a0±\u00a0")
        cells = "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in cells_of(line))
        rows.append(f"<tr>{cells}</tr>")
    return "<table>" + "".join(rows) + "</table>"


def picture(line: str) -> str:
    """![what it shows](path from the project's folder), put into the file itself."""
    alternative, path = re.fullmatch(r"!\[(.*?)\]\((.+?)\)", line.strip()).groups()
    file = ROOT / path
    content = base64.b64encode(file.read_bytes()).decode()
    source = f"data:{MEDIA_TYPES[file.suffix]};base64,{content}"
    return f'<figure><img alt="{html.escape(alternative)}" src="{source}"></figure>'


def fence(kind: str, lines: list[str]) -> str:
    longest = max(len(re.sub(r"[_^]\{|\}", "", line)) for line in lines)
    if kind == "math":
        size = min(MATH_SIZE, int(WIDTH / (0.56 * longest)))
        formula = "<br>".join(inline(line) for line in lines)
        return f'<div class="math" style="font-size: {size}px">{formula}</div>'
    if kind == "strip":
        return "".join(strip(line) for line in lines)
    # As large as its lines allow: a letter is 0.62 as wide as it is high, a line 1.4 times as high.
    by_width = int((WIDTH - 42) / (0.62 * longest))
    by_height = int(CODE_HEIGHT / (1.45 * len(lines)))
    size = min(CODE_SIZE, by_width, by_height)
    code = html.escape("\n".join(lines), quote=False)
    return f'<pre style="font-size: {size}px">{code}</pre>'


def strip(line: str) -> str:
    """One row of tokens: "blue a b* | green c"."""
    boxes = []
    for segment in line.split(" | "):
        color, *tokens = segment.split()
        for token in tokens:
            framed = " framed" if token.endswith("*") else ""
            boxes.append(f'<span class="{color}{framed}">{html.escape(token.rstrip("*"))}</span>')
    return f'<div class="strip">{"".join(boxes)}</div>'


# ---- The page


def section(slide: Slide, number: int, part: str) -> str:
    """One slide: its title, and below what stands in front of the first |||, in full width."""
    title, _, rest = slide.body.partition("\n")
    head, *columns = re.split(r"^\|\|\|$", fill(rest), flags=re.MULTILINE)
    body = to_html(head)
    if columns:
        body += '<div class="columns">'
        body += "".join(f"<div>{to_html(column)}</div>" for column in columns)
        body += "</div>"
    kind = ' class="title"' if number == 1 else ""
    footer = f"<span>{html.escape(part)}</span><span>{number}</span>"
    return (
        f'<section{kind}>{to_html(title)}<div class="body">{body}</div>'
        f"<footer>{footer}</footer></section>\n<aside>{to_html(fill(slide.notes))}</aside>"
    )


def page(text: str) -> str:
    """slides.md -> the whole HTML. A first line `<!-- part: NAME -->` begins a part."""
    sections = []
    part = ""
    for number, slide in enumerate(read_slides(text), start=1):
        mark = re.match(r"<!-- part: (.+?) -->\n", slide.body)
        if mark:
            part = mark[1]
            slide = slide._replace(body=slide.body[mark.end() :])
        sections.append(section(slide, number, part))
    template = (HERE / "template.html").read_text(encoding="utf-8")
    return template.replace("<!-- slides -->", "\n".join(sections))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where slides.html is out of date"
    )
    args = parser.parse_args()
    made = page((HERE / "slides.md").read_text(encoding="utf-8"))
    if not args.check:
        TARGET.write_text(made, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != made:
        sys.exit("slides.html is not what slides.md gives: run python workshop/slides/build.py")


if __name__ == "__main__":
    main()
