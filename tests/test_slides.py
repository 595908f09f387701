"""The slides: one file without network, up to date, with notes, five for each notebook."""

import ast
import re
import runpy
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import PROJECT

SLIDES = PROJECT / "workshop" / "slides"
# By its path: the folder is no package.
build = SimpleNamespace(**runpy.run_path(str(SLIDES / "build.py")))


@pytest.fixture(scope="module")
def page() -> str:
    return build.page((SLIDES / "slides.md").read_text(encoding="utf-8"))


def test_the_file_is_what_the_source_gives(page):
    """But for the code on it: who changes a loss need not make the slides again at once."""
    made = (SLIDES / "slides.html").read_text(encoding="utf-8")
    assert without_code(made) == without_code(page), "run python workshop/slides/build.py"


def without_code(text: str) -> str:
    return re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)


def test_it_needs_no_network(page):
    without_pictures = re.sub(r'src="data:[^"]+"', "", page)
    for tag in ("<link", "<iframe", "<script src", "@import", "url(", "fetch(", "src=", "import("):
        assert tag not in without_pictures, tag
    # A link that somebody clicks is all that leads out of the file.
    outside = re.findall(r"https?://[^\s\"'<)]+", without_pictures)
    clicked = re.findall(r'<a href="(https?://[^"]+)"', without_pictures)
    assert sorted(outside) == sorted(clicked)


def test_every_slide_has_notes_and_every_notebook_five(page):
    sections = re.findall(r"<section.*?</section>\n<aside>(.*?)</aside>", page, re.DOTALL)
    assert 25 <= len(sections) <= 35
    assert all(len(notes) > 60 for notes in sections)
    parts = Counter(re.findall(r"<footer><span>(.*?)</span>", page))
    notebooks = [part for part in parts if part[0].isdigit()]
    assert [part[0] for part in notebooks] == ["1", "2", "3", "4", "5"]
    assert all(parts[part] == 5 for part in notebooks)


def test_nothing_is_left_unfilled_or_unrendered(page):
    without_pictures = re.sub(r'src="data:[^"]+"', "", page)
    body = without_pictures[without_pictures.index("<main>") : without_pictures.index("</main>")]
    body = without_code(body)
    for sign in ("{{", "}}", "```", "**", "|||", "![", "_{", "^{"):
        assert sign not in body, sign


def test_numbers_are_those_of_the_files(page):
    results = (PROJECT / "toy" / "ablation.md").read_text(encoding="utf-8")
    row = next(line for line in results.splitlines() if line.startswith("| both + AR |"))
    assert build.toy_cell("both + AR", "T2I@1") == row.split("|")[2].strip()
    assert build.toy_cell("both + AR", "T2I@1").replace(" ± ", "\u00a0±\u00a0") in page
    with pytest.raises(ValueError, match="no row"):
        build.toy_cell("both", "no such column")
    with pytest.raises(ValueError, match="does not compare"):
        build.toy_difference("both", "both", "swap")


def test_a_source_is_the_function_without_its_docstring():
    shown = build.source_of("losses.py", "contrastive_loss").strip("`\n")
    tree = ast.parse((PROJECT / "losses.py").read_text(encoding="utf-8"))
    named = [each for each in tree.body if getattr(each, "name", "") == "contrastive_loss"]
    del named[0].body[0]
    assert ast.dump(ast.parse(shown).body[0]) == ast.dump(named[0])
    with pytest.raises(ValueError, match="has no"):
        build.source_of("losses.py", "no_such_function")


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("# A *b*", "<h1>A <i>b</i></h1>"),
        ("one\ntwo", "<p>one two</p>"),
        ("- a\n  more\n- **b**", "<ul><li>a more</li><li><b>b</b></li></ul>"),
        ("`a*b*` < 1", "<p><code>a*b*</code> &lt; 1</p>"),
        ("x_{i}^{T}", "<p>x<sub>i</sub><sup>T</sup></p>"),
        (
            "| a | b |\n|---|---|\n| 1 ± 2 | |",
            "<table><tr><th>a</th><th>b</th></tr><tr><td>1\u00a0±\u00a02</td><td></td></tr></table>",
        ),
        (
            "```strip\nblue a b* | white c\n```",
            '<div class="strip"><span class="blue">a</span><span class="blue framed">b</span>'
            '<span class="white">c</span></div>',
        ),
    ],
)
def test_markdown(markdown, wanted):
    assert build.to_html(markdown) == wanted
