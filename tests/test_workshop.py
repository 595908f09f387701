"""The workshop: every checker fails on the blank and passes with the solution, every notebook runs
from top to bottom.

The notebooks themselves take some minutes: they run only where NANOVLADVA_WORKSHOP=1 is set.
"""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT

from workshop import build, checks
from workshop.pace import fewer

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")  # the notebooks' figures are shown nowhere

SOURCES = sorted((PROJECT / "workshop" / "source").glob("*.py"))
CELLS = {path.stem: build.read_cells(path) for path in SOURCES}
EXERCISES = [
    (stem, cell.name) for stem, cells in CELLS.items() for cell in cells if cell.kind == "exercise"
]

# What people write: exercise, the wrong line in place of the right one, a word of the hint.
MISTAKES = [
    ("1.1", "weight.flatten(1).T", "weight.transpose(2, 3).flatten(1).T", "numbers are not"),
    (
        "1.1",
        "patches.flatten(3).flatten(1, 2)",
        "patches.permute(0, 2, 1, 3, 4, 5).flatten(3).flatten(1, 2)",
        "order",
    ),
    ("1.2", "features.flatten(0, 1)", "features.flip(0).flatten(0, 1)", "order"),
    ("1.2", "input_ids == image_token_id", "input_ids != image_token_id", "is the mask right"),
    ("1.3", "masked_fill(future, -torch.inf)", "masked_fill(future, 0)", "future"),
    ("1.3", " / head_dim**0.5", "", "square root"),
    ("1.4", "hidden[0, -1]", "hidden[0, 0]", "LAST"),
    ("1.4", ".argmax().item()", ".argmax()", "item"),
    ("2.1", "lengths - 1", "-1", "padding"),
    ("2.1", "lengths - 1", "lengths.clamp(max=5)", "counted from 0"),
    ("2.2", "lengths - 1]", "-1]", "longest"),
    ("2.3", "(scores >= own)", "(scores > own)", "texts rank"),
    ("2.3", "(scores >= own).sum(dim=1)", "(scores > own).sum(dim=1) + 1", "equal"),
    ("2.4", "-(log_p.exp()", "(log_p.exp()", "sign"),
    (
        "3.1",
        "(F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2",
        "F.cross_entropy(similarity, target)",
        "one direction",
    ),
    ("3.1", "scale * images @ texts.T", "images @ texts.T / scale", "multiply"),
    ("3.1", "F.normalize(text_embeddings, dim=-1)", "text_embeddings", "unit length"),
    ("3.2", "position >= summary", "position > summary", "first token"),
    ("3.2", "following = ids.roll(-1)", "following = ids", "shift"),
    ("3.2", "len(ids) - 1", "len(ids)", "last token"),
    ("3.3", "chunk.summary]", "-1]", "behind the caption"),
    ("3.4", "1 - (p + q) / 2", "(p + q) / 2", "RIGHT"),
    ("3.4", "1 - (p + q) / 2", "1 - p", "both"),
    ("4.1", "self.scale * ", "", "scale"),
    ("4.2", "rank * (out + inside)", "out * inside", "counts W"),
    ("4.2", "rank * (out + inside)", "rank * out * inside", "two matrices"),
    ("4.3", "W + scale * B @ A", "W + B @ A", "scale"),
    ("4.3", "W + scale * B @ A", "W.add_(scale * B @ A)", "W itself"),
    ("4.4", "dy @ W + dp @ A", "dy @ W", "two ways"),
    ("4.4", "dp.T @ x", "x.T @ dp", "shape"),
    ("4.5", "(ids - V).clamp(min=0)", "ids.clamp(max=2)", "row i"),
    ("4.5", "(ids - V).clamp(min=0)", "ids", "subtract V"),
    ("5.1", "    optimizer.zero_grad()\n", "", "left over"),
    (
        "5.1",
        "    optimizer.step()\n    optimizer.zero_grad()\n",
        "    optimizer.zero_grad()\n    optimizer.step()\n",
        "after zero_grad",
    ),
    ("5.1", "    torch.nn.utils.clip_grad_norm_(parameters, 1.0)\n", "", "clip"),
    ("5.1", "clip_grad_norm_(parameters, 1.0)", "clip_grad_norm_(parameters, 100.0)", "to 1.0"),
    (
        "5.1",
        "    torch.nn.utils.clip_grad_norm_(parameters, 1.0)\n    optimizer.step()\n",
        "    optimizer.step()\n    torch.nn.utils.clip_grad_norm_(parameters, 1.0)\n",
        "BEFORE",
    ),
    (
        "5.2",
        "dict(soft_prompts=False, autoregressive_weight=0.0)",
        "dict(soft_prompts=False)",
        "it should not be: autoregressive_weight",
    ),
    ("5.3", "d.std()", "d.std(correction=0)", "n - 1"),
    ("5.3", "mean = d.mean()", "mean = d.mean().abs()", "negative"),
    ("5.4", "ids[places + 1]", "ids[places]", "real collate"),
    ("5.4", "labels[places[-1]] == layout.stop_id", "True", "stop"),
    ("5.4", "places[0] == start", "True", "first word"),
    ("6.1", "2 * torch.eye(len(images)) - 1", "torch.eye(len(images))", "sign 0"),
    ("6.1", "2 * torch.eye(len(images)) - 1", "torch.ones(len(images), len(images))", "count as"),
    ("6.1", "2 * torch.eye(len(images)) - 1", "1 - 2 * torch.eye(len(images))", "turned round"),
    ("6.1", ".sum() / len(images)", ".mean()", "mean over all pairs"),
    ("6.1", ".sum() / len(images)", ".sum()", "divide it by B"),
    ("6.1", "-F.logsigmoid", "F.logsigmoid", "the sign: minus"),
    ("6.1", "-F.logsigmoid(sign * logits)", "-torch.sigmoid(sign * logits).log()", "infinity"),
    ("6.1", " + bias", "", "bias is missing"),
    ("6.1", " + bias", " - bias", "plus the bias"),
    ("6.1", "scale * images @ texts.T + bias", "images @ texts.T / scale + bias", "multiply"),
    (
        "6.1",
        "-F.logsigmoid(sign * logits).sum() / len(images)",
        "F.cross_entropy(logits, torch.arange(len(images)))",
        "softmax",
    ),
    ("6.2", "torch.nn.Parameter(torch.tensor(-10.0))", "torch.tensor(-10.0)", "nn.Parameter"),
    ("6.2", "torch.tensor(-10.0)", "torch.zeros(1)", "one number"),
    ("6.2", "torch.tensor(-10.0)", "torch.tensor(0.0)", "start the bias low"),
    ("6.2", "model.log_scale.exp()", "model.log_scale", "logarithm"),
    ("6.2", "model.log_scale.exp()", "1 / model.log_scale.exp()", "already"),
    ("6.2", "model.log_scale.exp()", "model.log_scale.exp().item()", "model.log_scale"),
    ("6.2", "model.logit_bias)", "-10.0)", "model.logit_bias"),
    ("6.2", "siglip_weight: float = 1.0", "siglip_weight: float = 0.0", "and _weight"),
    ("6.3", ".square().sum()", ".square()", ".mean()?"),
    ("6.3", ".square().sum()", ".square().sum().item()", "not a tensor"),
    ("6.3", ".square().sum()", ".square().sum().detach()", "no gradient"),
    ("6.3", ".square().sum()", ".square().sum().sqrt()", "NaN"),
    (
        "6.3",
        "(images.mean(0) - texts.mean(0)).square().sum()",
        "(images - texts).square().sum()",
        "mean, not a sum",
    ),
    (
        "6.3",
        "(images.mean(0) - texts.mean(0)).square().sum()",
        "(images[0] - texts[0]).square().sum()",
        "another order",
    ),
    (
        "6.3",
        "(images.mean(0) - texts.mean(0)).square().sum()",
        "changes.siglip_loss(images, texts, model.log_scale.exp(), model.logit_bias)",
        "SigLIP loss again",
    ),
    ("6.4", "v.cumsum(dim=1) / seen[:, None]", "v.mean(1, keepdim=True).expand_as(v)", "BEHIND"),
    ("6.4", " / seen[:, None]", "", "divide by how many"),
    ("6.4", " / seen[:, None]", " / v.shape[1]", "divided by T"),
    ("6.4", "patches.flatten(2).transpose(1, 2)", "patches.flatten(2)", "shape"),
    (
        "6.4",
        "patches.flatten(2).transpose(1, 2)",
        "patches.flatten(2).reshape(len(patches), -1, patches.shape[1])",
        "wrong places",
    ),
    (
        "6.4",
        "patches.flatten(2).transpose(1, 2)",
        "patches.transpose(2, 3).flatten(2).transpose(1, 2)",
        "by columns",
    ),
    ("6.4", "return self.language_model.norm(x)", "return x", "final norm"),
    (
        "6.4",
        "return self.language_model.norm(x)",
        "return self.lm_head(self.language_model.norm(x))",
        "never logits",
    ),
    (
        "6.4",
        "self.language_model.embed_tokens(input_ids)",
        "self.language_model.embed_tokens.weight[input_ids]",
        "by the MODULE",
    ),
    ("6.4", "raise ValueError", "raise RuntimeError", "ValueError"),
    ("6.4", "is_image.sum() != ", "is_image.sum() > ", "more features"),
    ("6.5", "Summarize the image in one word:", "Describe the image in detail.", "about to say"),
    ("6.5", "Summarize the text in one word:", "Summarize the zebra:", "'zebra"),
    (
        "6.5",
        'MY_TEXT_PROMPT = "Summarize the text in one word:"',
        "MY_IMAGE_PROMPT = IMAGE_PROMPT; MY_TEXT_PROMPT = TEXT_PROMPT",
        "the paper's prompts",
    ),
    ("6.6", "[short, longer]", "[short, short]", "lets it through"),
    ("6.6", "[short, longer]", "[longer, short]", "healthy system ill"),
    ("6.6", "ids.roll(-1)[places]", "ids[places]", "healthy system ill"),
    ("6.6", "gradient is not None and bool(gradient != 0)", "True", "lets it through"),
    ("6.6", "captions[1:] + captions[:1]", "captions", "lets it through"),
    (
        "6.6",
        "return bool((own - others).abs().max() < 1e-3)",
        "return predicts_the_next(system, samples)",
        "healthy system ill|lets it through|also fails",
    ),
    ("6.7", '"A": broken.LABELS', '"A": broken.LEAK', "passes caption_stays_out"),
    ("6.7", '"A": broken.LABELS', '"A": "labels"', "is none of"),
    ("6.8", "lengths - 1]", "lengths - 2]", "last real token"),
    ("6.8", "lengths - 1]", "-1]", "padding"),
    ("6.8", "ids[places + 1]", "ids[places]", "itself"),
    ("6.8", "wanted[places] = ids[places + 1]", "wanted[places + 1] = ids[places + 1]", "too late"),
    ("6.8", "model.log_scale.exp()", "model.log_scale.exp().item()", "no gradient"),
    ("6.8", "model.log_scale.exp()", "model.log_scale", "logarithm"),
    ("6.8", "layout.image_side(caption)", "layout.image_side() + caption", "stop_id"),
    ("6.8", "layout.image_side(caption)", "layout.prefix() + caption", "BEHIND"),
]


@pytest.fixture(scope="module")
def after_setup():
    """A function: notebook -> the names that its setup cells give. All in one process, in the
    project's folder."""
    made = {}
    folder = os.getcwd()
    os.chdir(PROJECT)

    def names(stem: str) -> dict:
        if stem not in made:
            made[stem] = {"__name__": "notebook"}
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                for cell in CELLS[stem]:
                    if cell.kind == "setup":
                        exec(compile(cell.text, f"{stem}, setup", "exec"), made[stem])
            torch.set_grad_enabled(True)  # some notebooks switch it off
        return dict(made[stem])

    yield names
    os.chdir(folder)


def text_of(stem: str, kind: str, name: str) -> str:
    return next(cell.text for cell in CELLS[stem] if (cell.kind, cell.name) == (kind, name))


def check(names: dict, stem: str, name: str, answer: str) -> None:
    exec(answer, names)
    exec(text_of(stem, "check", name), names)


@pytest.mark.parametrize(("stem", "name"), EXERCISES)
def test_the_blank_fails_and_the_solution_passes(stem, name, after_setup, capsys):
    with pytest.raises(checks.NotYet, match=f"^exercise {re.escape(name)}: ") as blank:
        check(after_setup(stem), stem, name, text_of(stem, "exercise", name))
    assert "blank" in str(blank.value) or "missing" in str(blank.value) or name == "5.4", (
        blank.value
    )
    check(after_setup(stem), stem, name, text_of(stem, "solution", name))
    assert f"✓ exercise {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "right", "wrong", "hint"), MISTAKES)
def test_common_mistakes_get_a_hint(name, right, wrong, hint, after_setup):
    stem = next(stem for stem, each in EXERCISES if each == name)
    solution = text_of(stem, "solution", name)
    assert right in solution
    with pytest.raises(checks.NotYet) as found:
        check(after_setup(stem), stem, name, solution.replace(right, wrong))
    assert any(word in str(found.value) for word in hint.split("|")), found.value


def test_every_exercise_has_its_cells_and_the_share_that_is_typed_in_advance():
    assert len(CELLS) == 6
    for stem, cells in CELLS.items():
        by_kind = {
            kind: [c.name for c in cells if c.kind == kind]
            for kind in ("exercise", "solution", "check")
        }
        assert by_kind["exercise"] == by_kind["solution"] == by_kind["check"]
        most = 8 if stem.startswith("6") else 5  # the last one is an afternoon of its own
        assert 3 <= len(by_kind["exercise"]) <= most
        blank = {line for c in cells if c.kind != "solution" for line in c.text.splitlines()}
        solved = [
            line
            for c in cells
            if c.kind not in ("exercise", "[markdown]")
            for line in c.text.splitlines()
        ]
        typed = sum(line not in blank for line in solved)
        assert typed <= 0.2 * len(solved), stem


def test_a_room_can_leave_out_what_is_for_home():
    """No cell of the room reads a name that only cells for home make."""
    some_are_home = False
    for stem, cells in CELLS.items():
        code = [cell for cell in cells if cell.kind not in ("[markdown]", "solution")]
        made = {True: set(), False: set()}  # by cells for home, by the others
        read = set()  # by the others
        for cell in code:
            is_home = build.is_at_home(cell, cells)
            some_are_home |= is_home
            for node in ast.walk(ast.parse(cell.text)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    made[is_home].add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    made[is_home].add(node.id)
                elif isinstance(node, ast.Name) and not is_home:
                    read.add(node.id)
        assert not read & (made[True] - made[False]), stem
    assert some_are_home


def test_notebooks_are_what_their_sources_give():
    for path, text in build.notebooks().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python workshop/build.py"
    assert len(list((PROJECT / "workshop").glob("*.ipynb"))) == len(SOURCES)
    assert len(list((PROJECT / "workshop" / "solutions").glob("*.ipynb"))) == len(SOURCES)


def test_the_build_command_finds_a_changed_notebook(tmp_path):
    folder = tmp_path / "workshop"
    (folder / "source").mkdir(parents=True)
    (folder / "build.py").write_text((PROJECT / "workshop" / "build.py").read_text())
    (folder / "source" / "1.py").write_text("# %% [markdown]\n# # Title\n\n# %%\nx = 1\n")

    def build_there(*flags):
        command = [sys.executable, folder / "build.py", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    assert build_there("--check").returncode
    assert not build_there().returncode
    assert not build_there("--check").returncode
    book = json.loads((folder / "1.ipynb").read_text())
    assert [cell["source"] for cell in book["cells"]] == [["# Title"], ["x = 1"]]
    (folder / "1.ipynb").write_text("{}")
    assert "1.ipynb is not what its source gives" in build_there("--check").stderr

    (folder / "source" / "1.py").write_text("# %% setup\nSHARE = 1.0\n")
    assert not build_there("--share", "0.2").returncode
    book = json.loads((folder / "1.ipynb").read_text())
    assert [cell["source"] for cell in book["cells"]] == [["SHARE = 0.2"]]


def test_one_setting_at_the_top():
    """It is the first code cell of each, alone, and it reaches every number of steps."""
    for stem, cells in CELLS.items():
        code = [cell.text for cell in cells if cell.kind != "[markdown]"]
        assert code[0] == "SHARE = 1.0", stem
        for text in code:
            for steps in re.findall(r"[^_]steps=([^,)]+)", text):
                if steps == "steps":  # a function's argument: what is it called with?
                    steps = " ".join(re.findall(r"^steps = (.*)", "\n".join(code), re.MULTILINE))
                assert "fewer(" in steps or steps in ("10", "30", "12"), f"{stem}: steps={steps}"


def test_a_share_of_a_core_gives_fewer_steps_and_never_none():
    assert fewer(40, 1.0) == fewer(40, 20) == 40
    assert fewer(40, 0.2) == 18
    assert fewer(40, 0.25) == 20
    assert fewer(40, 0) == fewer(40, -1) == 8
    assert fewer(1, 0.04) == 1
    assert fewer(30, 0.2, least=24) == 24 and fewer(30, 1.0, least=24) == 30


def test_a_hint_is_shown_without_a_traceback():
    with pytest.raises(checks.NotYet) as found:
        checks.exercise_2_4(lambda logits: logits.no_such_thing)
    assert found.value._render_traceback_() == [f"✗ {found.value}"]
    assert "AttributeError" in str(found.value)


def test_replaced_puts_everything_back():
    class Thing:
        x = 1

    thing = Thing()
    with checks.replaced(thing, "x", 2):
        assert thing.x == 2
    assert thing.x == 1 and "x" not in vars(thing)


@pytest.mark.skipif(
    not os.environ.get("NANOVLADVA_WORKSHOP"), reason="minutes: set NANOVLADVA_WORKSHOP=1"
)
@pytest.mark.parametrize("solved", [True, False], ids=["solutions", "blanks"])
@pytest.mark.parametrize("stem", list(CELLS))
def test_notebooks_run_from_top_to_bottom(stem, solved, monkeypatch):
    """With solutions: without an error, in the project's folder. With blanks: from workshop/, with
    nothing but the checkers' hints, as nothing depends on an answer (and with the smallest
    SHARE)."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = PROJECT if solved else PROJECT / "workshop"
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    path = PROJECT / "workshop" / ("solutions" if solved else ".") / f"{stem}.ipynb"
    book = nbformat.read(path, as_version=4)
    if not solved:
        for cell in book.cells:
            cell.source = cell.source.replace("SHARE = 1.0", "SHARE = 0.04")
    client = nbclient.NotebookClient(
        book,
        timeout=900,
        kernel_name="python3",
        allow_errors=not solved,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    errors = [
        out
        for cell in book.cells
        if cell.cell_type == "code"
        for out in cell.outputs
        if "ename" in out
    ]
    wanted = [] if solved else ["NotYet"] * sum(exercise[0] == stem for exercise in EXERCISES)
    assert [error["ename"] for error in errors] == wanted, [error["evalue"] for error in errors]
