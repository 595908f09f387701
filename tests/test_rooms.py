"""The rooms of the house: no circle, no arrow upwards, six packages and no other."""

import ast
import sys

import pytest
from conftest import PROJECT

MODULES = ("model", "lora", "losses", "data", "train", "eval")
CELLAR = ("formats", "runtime", "fast", "backbones")
ABOVE = ("examples", "toy", "figures", "workshop", "benchmarks", "tests")
PACKAGES = {"torch", "numpy", "PIL", "tqdm", "safetensors", "tokenizers"}

# A room may import those in the rows above its own, and itself.
LEVELS = [
    ("formats", "losses"),
    ("runtime", "model", "data"),
    ("backbones", "lora"),
    ("fast",),
    ("eval",),
    ("train",),
]


def files_of(room: str) -> list:
    single = PROJECT / f"{room}.py"
    return [single] if single.exists() else sorted((PROJECT / room).glob("*.py"))


def imports_of(path) -> list[tuple[str, bool]]:
    """The first names of what a file imports, and whether that happens inside of a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            inside.update(id(each) for each in ast.walk(node))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module]
        found += [(name.split(".")[0], id(node) in inside) for name in names]
    return found


@pytest.mark.parametrize("room", [*MODULES, *CELLAR])
def test_arrows_go_down(room):
    """The six modules and the cellar import what lies below them, and nothing from above."""
    level = next(number for number, rooms in enumerate(LEVELS) if room in rooms)
    below = {name for rooms in LEVELS[:level] for name in rooms} | {room}
    for path in files_of(room):
        for name, is_inside in imports_of(path):
            if name in (*MODULES, *CELLAR):
                assert name in below, f"{path}: imports {name}"
            # The default job alone draws the toy world, in the function that needs it.
            is_toy = room == "train" and name == "toy" and is_inside
            assert name not in ABOVE or is_toy, f"{path}: imports {name}, which is above it"


@pytest.mark.parametrize("room", [*MODULES, *CELLAR])
def test_six_packages_and_no_other(room):
    for path in files_of(room):
        for name, _ in imports_of(path):
            is_ours = name in (*MODULES, *CELLAR, "toy")
            is_known = name in PACKAGES or name in sys.stdlib_module_names
            assert is_ours or is_known, f"{path}: imports {name}"


def test_six_modules_at_the_root():
    found = {path.stem for path in PROJECT.glob("*.py")}
    assert found == set(MODULES)


def test_nothing_imports_a_file_that_is_run_as_itself():
    """`main()` stands where it is run: no module is imported a second time by its own __main__."""
    for path in [*PROJECT.glob("*.py"), *PROJECT.glob("examples/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                imported = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not imported, f"{path}: imports inside of `if __name__ == ...`"
