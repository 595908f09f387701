"""What the documents say about files, commands and names is true of this folder."""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
from functools import cache

import pytest
from conftest import PROJECT

from docs import tables
from workshop import build

MODULES = ("model", "lora", "losses", "data", "eval", "train")
DOCUMENTS = {
    str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8")
    for path in sorted([*PROJECT.glob("*.md"), *PROJECT.glob("*/*.md")])
    if not any(part.startswith(".") or part == "runs" for part in path.relative_to(PROJECT).parts)
}
NOTEBOOKS = {
    f"workshop/{path.name}": "\n\n".join(
        cell.text for cell in build.read_cells(path) if cell.kind == "[markdown]"
    )
    for path in sorted((PROJECT / "workshop" / "source").glob("*.py"))
}
TEXTS = DOCUMENTS | NOTEBOOKS
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FOLDERS = [
    path.name for path in PROJECT.iterdir() if path.is_dir() and not path.name.startswith(".")
]
MADE = ("toy/data", "toy/tiny-llava-plain", "runs/")  # what commands make: not in git


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(text: str) -> list[str]:
    """Every Python command of a document, in fences and in the text, without comments and variables
    in front.
    """
    lines = FENCE.sub(lambda fence: fence[0].replace("\\\n", " "), text)
    blocks = [line for block in FENCE.findall(lines) for line in block.splitlines()]
    found = [
        re.sub(r"^([A-Z_]+=\S+ )+", "", line.strip()) for line in [*inline_code(text), *blocks]
    ]
    return [re.sub(r"\s+# .*", "", line) for line in found if re.match(r"(python|torchrun) ", line)]


def is_file_of_ours(word: str, document: str) -> bool:
    """Is this the path of a file of the project, and not an example or something that a command
    makes?
    """
    if any(sign in word for sign in "*{}<> ") or word.startswith(MADE) or "://" in word:
        return False
    return (
        word.split("/")[0] in FOLDERS
        and "/" in word
        or bool(re.fullmatch(r"[\w/.-]+\.(py|md|ipynb|svg)", word))
    )


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_to_files(document):
    folder = (PROJECT / document).parent
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[document]):
        assert "://" in target or (folder / target).exists(), f"{document}: no such file: {target}"


@pytest.mark.parametrize("document", TEXTS)
def test_files_that_are_named_exist(document):
    folders = (PROJECT, (PROJECT / document).parent)
    for code in inline_code(TEXTS[document]):
        word, _, test = code.partition("::")
        if is_file_of_ours(word, document):
            assert any((folder / word).exists() for folder in folders), (
                f"{document}: no such file: {word}"
            )
            assert f"def {test}" in (PROJECT / word).read_text() if test else True, (
                f"{document}: no such test: {code}"
            )


@cache
def help_of(target: str, *words: str) -> str:
    """What `python target words --help` prints; `target` is a file or "-m name". In this process:
    imports are done.
    """
    output, arguments, path = io.StringIO(), sys.argv, list(sys.path)
    sys.argv = [target, *words, "--help"]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            file = target
            if target.startswith("-m "):
                file = target[3:].replace(".", "/")
                file += "/__main__.py" if (PROJECT / file).is_dir() else ".py"
            runpy.run_path(str(PROJECT / file), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{target} {' '.join(words)} --help: {output.getvalue()}"
    finally:
        sys.argv, sys.path[:] = arguments, path
    return output.getvalue()


@pytest.mark.parametrize(
    ("document", "command"),
    [(document, line) for document, text in TEXTS.items() for line in commands(text)],
)
def test_commands_name_files_subcommands_and_flags_that_exist(document, command):
    words = [
        word for word in shlex.split(command.replace("[", " ").replace("]", " ")) if word != "..."
    ][1:]
    while words and words[0].startswith("--nproc"):  # torchrun's own
        words.pop(0)
    target = words.pop(0)
    if target == "-m":
        target = f"-m {words.pop(0)}"
        module = target[3:].replace(".", "/")
        if not ((PROJECT / f"{module}.py").exists() or (PROJECT / module).is_dir()):
            assert target in ("-m pytest", "-m pip", "-m venv"), (
                f"{document}: {command}: no such module"
            )
            for word in words:
                assert (
                    word.startswith("-") or not word.endswith(".py") or (PROJECT / word).exists()
                ), command
            return
    else:
        assert (PROJECT / target).is_file(), f"{document}: {command}: no such file"
    try:
        usage = help_of(target)
    except ModuleNotFoundError as missing:  # what the ecosystem extra brings
        assert missing.name in ("datasets", "mteb", "clip_benchmark", "sentence_transformers"), (
            missing
        )
        pytest.skip(f"needs {missing.name}")
    assert usage.startswith("usage:"), f"{target} has no --help"
    # argparse ends the usage of a command with sub-commands by "...", and lists them in braces or
    # indented by four.
    if re.search(r"^usage:.*\.\.\.$", usage, re.MULTILINE):
        braces = re.search(r"\{([^}]+)\} \.\.\.", usage)
        known = braces[1].split(",") if braces else re.findall(r"^ {4}(\S+)", usage, re.MULTILINE)
        assert words and words[0] in [*known, "--help"], (
            f"{document}: {command}: no such sub-command, there are {known}"
        )
        if words[0] == "--help":
            return
        usage = help_of(target, words[0])
    for word in words:
        if word.startswith("--"):
            flag = re.escape(word.split("=")[0])
            assert re.search(rf"{flag}(?![\w-])", usage), f"{document}: {command}: no flag {word}"


def test_tables_are_made_from_what_the_runs_wrote():
    """Every block of results in a document is what docs/tables.py makes of the JSON."""
    paths = tables.documents()
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert tables.renewed(text) == text, f"{path}: python -m docs.tables renews it"


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_bytes()) <= 10_000


def test_names_in_the_documents_are_in_the_modules():
    seen = 0
    for document, text in TEXTS.items():
        for code in inline_code(text):
            match = re.fullmatch(rf"({'|'.join(MODULES)})\.([A-Za-z_][\w.]*)(\(.*\))?", code)
            variable = document in NOTEBOOKS and code.startswith(
                "model."
            )  # in the notebooks `model` is a Llava
            if not match or variable or match[2] in ("py", "json", "jsonl", "safetensors"):
                continue
            owner = importlib.import_module(match[1])
            for name in match[2].split("."):
                assert hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", {}), (
                    f"{document}: {code}"
                )
                owner = getattr(owner, name, None)
            seen += 1
    assert seen > 20


def test_imports_in_the_documents_work():
    for document, text in TEXTS.items():
        for module, names in re.findall(
            rf"^from ({'|'.join(MODULES)}) import ([\w, ]+)", text, re.MULTILINE
        ):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), (
                    f"{document}: {module} has no {name}"
                )


def test_flags_in_the_documents_exist():
    """Those that stand alone in the text, without their command."""
    known = help_of("train.py")
    known += "".join(help_of("eval.py", name) for name in ("caption", "retrieval"))
    known += "".join(help_of(f"-m examples.{name}") for name in ("embed", "export", "check"))
    known += help_of("-m toy.pretrain") + help_of("workshop/build.py")
    for document in ("README.md", "docs/models.md", "docs/long-runs.md", "workshop/README.md"):
        for flag in re.findall(r"`(--[a-z_]+)[ `]", TEXTS[document]):
            assert re.search(rf"{flag}(?![\w-])", known), f"{document}: {flag} is no flag"
