"""Files, as carefully as strangers' files need: one error for all that cannot be used, whole
writes, safe paths.

All that reads or writes a file here stands on this; it stands on nothing of ours.
"""

import codecs
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class InputError(ValueError):
    """A file or a setting that cannot be used: its name, what was found, and what to do."""


class LeftOut(Counter):
    """How much of a source is not used, by the reason, and where each reason was met first."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, reason: str, place: object = "", number: int = 1) -> None:
        self[reason] += number
        self.first.setdefault(reason, str(place))

    def lines(self) -> Iterator[str]:
        """For people: "3 no caption (the first: cats/017.jpg)"."""
        for reason, number in self.items():
            place = self.first.get(reason)
            # A lone surrogate, in a name that is no UTF-8, could not be printed.
            where = f" (the first: {without_surrogates(place)})" if place else ""
            yield f"{number:,} {reason}{where}"


def tell(source: Path, left_out: LeftOut) -> None:
    """Print what is not used, and where it was met first."""
    for line in left_out.lines():
        print(f"{source}: left out: {line}")


# ---- Text

# What text begins with that a Windows program, or a spreadsheet, has written. UTF-32's comes before
# UTF-16's, which is its beginning.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LFS_POINTER = b"version https://git-lfs"


def encoding_of(head: bytes) -> str:
    """How a text is encoded that begins with these bytes: UTF-8, unless a mark says otherwise."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    return "utf-8-sig"  # UTF-8, with a byte order mark or without


def decoded(content: bytes, where: object) -> str:
    """Bytes of a text file -> its text, without a byte order mark.

    Raises InputError for other encodings and for Git LFS pointers; `where` names the file."""
    if content.startswith(LFS_POINTER):
        raise InputError(f"{where}: {IS_LFS_POINTER}")
    try:
        return content.decode(encoding_of(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(not_utf8(where, line)) from None


def not_utf8(where: object, line: int) -> str:
    advice = "save it as UTF-8 (iconv -f cp1252 -t utf-8), or download it again"
    return f"{where}, line {line}: not UTF-8, perhaps Windows' cp1252; {advice}"


def read_text(path: str | Path) -> str:
    """A text file, whichever byte order mark it begins with. Raises InputError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return decoded(content, path)


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file that is read a line at a time; as `read_text` otherwise."""
    with open(path, "rb") as file:
        head = file.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise InputError(f"{path}: {IS_LFS_POINTER}")
    with open(path, newline=newline, encoding=encoding_of(head)) as file:
        try:
            yield file
        except UnicodeDecodeError:
            raise InputError(not_utf8(path, first_line_not_utf8(path))) from None


def first_line_not_utf8(path: Path) -> int:
    """The number of the first line that is no UTF-8; 1 where there is none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def without_surrogates(text: str) -> str:
    """Lone surrogates are legal in JSON but not in UTF-8. They become question marks."""
    return text.encode("utf-8", "replace").decode()


# ---- JSON


def read_json(path: str | Path, expected: type | tuple[type, ...] = dict):
    """The content of a JSON file, which must be of a type `expected`. Raises InputError."""
    path = Path(path)
    try:
        content = json.loads(decoded(path.read_bytes(), path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    # RecursionError: a file of a million opening brackets.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); {what_it_may_be(path)}") from None
    if not isinstance(content, expected):
        found = JSON_NAMES.get(type(content), "value")
        raise InputError(f"{path}: holds a JSON {found}, not what was expected here")
    return content


JSON_NAMES = {dict: "object", list: "list", str: "string", int: "number", float: "number"}
IS_LFS_POINTER = "it is a Git LFS pointer: run `git lfs pull`, or download the file itself"


def what_it_may_be(path: Path) -> str:
    """What a downloaded file that cannot be read often turns out to be, and what to do about it."""
    if not path.is_file():
        return "it is not a file"
    with open(path, "rb") as file:
        head = file.read(8)
    if head == b"version ":
        return IS_LFS_POINTER
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


# ---- Paths that a stranger's file names

# Folders outside of an image root, into which links in it may lead: their paths, separated as in
# PATH. It is for the user to say this, never for a file.
ALLOWED_ROOTS = "NANOVLADVA_ROOTS"


def inside(root: Path, name: str) -> Path:
    """The path `name` below `root`.

    A name with backslashes, as Windows writes them, and one whose accents are composed otherwise
    than on the disk, are found too.
    Raises InputError where it leads outside: an absolute path, `..`, a link. Links, and absolute
    paths, may lead into the folders that NANOVLADVA_ROOTS lists."""
    try:
        path = (root / as_on_disk(root, name)).resolve()
        roots = [root, *allowed_roots()]
        if any(path.is_relative_to(each.resolve()) for each in roots):
            return path
    except (OSError, ValueError, RuntimeError):
        # No path at all: a null byte, a lone surrogate, a loop of links.
        raise InputError(f"{name!r} lies outside of {root}: it is no path") from None
    if Path(name).is_absolute() or ".." in Path(name).parts:
        advice = "set the image root to a folder that holds all images"
        raise InputError(f"{name!r} lies outside of {root}; {advice}")
    advice = f"where that is your own folder: {ALLOWED_ROOTS}={path.parent} (or one above it)"
    raise InputError(f"{name!r} lies outside of {root}, through a link to {path}; {advice}")


def allowed_roots() -> list[Path]:
    names = os.environ.get(ALLOWED_ROOTS, "").split(os.pathsep)
    return [Path(name) for name in names if name]


def as_on_disk(root: Path, name: str) -> str:
    """The spelling of a path under which there is a file; the name itself where there is none."""
    slashed = name.replace("\\", "/")
    # A Mac writes an accent after its letter (NFD), most others write one letter for both (NFC).
    for spelling in (name, slashed):
        for form in (None, "NFC", "NFD"):
            candidate = unicodedata.normalize(form, spelling) if form else spelling
            if (root / candidate).exists():
                return candidate
    return name


# What programs put beside people's pictures: copies, thumbnails, things that were deleted.
FOREIGN_FOLDERS = {
    "__MACOSX",
    "@eaDir",
    "@Recycle",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}


def is_hidden(name: str) -> bool:
    """Whether a file's or a folder's name says that it is none of the user's own.

    Such as .ipynb_checkpoints, ._photo.jpg (a Mac's), .thumbnails, @eaDir (a NAS's)."""
    return name.startswith((".", "@__thumb")) or name in FOREIGN_FOLDERS


# ---- Folders that commands name

ROOT = Path(__file__).parent.parent  # this project, from wherever its commands are run


def find_folder(folder: str | Path) -> Path | None:
    """A model's folder, also where a relative path is meant from the project's: toy/tiny-llava is
    found from anywhere. None where there is no such folder."""
    for candidate in (Path(folder), ROOT / folder):
        if candidate.is_dir():
            return candidate
    return None
