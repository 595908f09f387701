"""Files, as carefully as strangers' files need: one error for all that cannot be used, whole
writes, safe paths.

All that reads or writes a file here stands on this; it stands on nothing of ours.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A file or a setting that cannot be used: its name, what was found, and what to do."""


def read_json(path: str | Path, expected: type | tuple[type, ...] = dict):
    """The content of a JSON file, which must be of a type `expected`. Raises InputError."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    # RecursionError: a file of a million opening brackets.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); {what_it_may_be(path)}") from None
    if not isinstance(content, expected):
        found = type(content).__name__
        raise InputError(f"{path}: holds a JSON {found}, not what was expected here")
    return content


def what_it_may_be(path: Path) -> str:
    """What a downloaded file that cannot be read often turns out to be, and what to do about it."""
    if not path.is_file():
        return "it is not a file"
    with open(path, "rb") as file:
        head = file.read(8)
    if head == b"version ":
        return "it is a Git LFS pointer: run `git lfs pull`, or download the file itself"
    if head[:1] == b"<":
        return "it is an HTML page: download it again"
    return "it may be incomplete: download it again"


@contextmanager
def fields_of(path: str | Path) -> Iterator[None]:
    """Inside, a missing key or a wrong type becomes an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    # ValueError is JSON's and UTF-8's.
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        kind = type(error).__name__
        raise InputError(f"{path}: not in the expected format ({kind}: {error})") from None


def sync(path: Path) -> None:
    """Come back when a file, or a folder's list of names, has reached the disk."""
    if os.name == "nt":  # Windows does not open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path: Path, content: str | Callable[[Path], object]) -> None:
    """Replace a file by a text, or by what a function writes to the path it is given.

    Whatever happens meanwhile, the old file or the new one is there, and it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only where something failed
    sync(path.parent)


def inside(root: Path, name: str) -> Path:
    """The path `name` below `root`.

    Raises InputError where it leads outside: an absolute path, `..`, a link."""
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root.resolve()):
            return path
    except (OSError, ValueError, RuntimeError):
        pass  # no path at all: a null byte, a lone surrogate, a loop of links
    advice = "set the image root to a folder that holds all images"
    raise InputError(f"{name!r} lies outside of {root}; {advice}")
