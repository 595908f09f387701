"""The pictures in a folder: which files are some, and which are none of the user's own.

left_out = LeftOut()
paths = pictures_in("photos", left_out)     # in order, those of the folders below it too
paths = list_pictures([Path("photos"), Path("cat.jpg")])     # what a command is given
"""

import os
from collections.abc import Iterator
from pathlib import Path

from formats.files import InputError, LeftOut, allowed_roots, is_hidden, tell

PICTURE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
# Pictures too, that formats/images.py does not open.
OTHER_PICTURES = (".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd")


def pictures_in(folder: str | Path, left_out: LeftOut | None = None) -> list[Path]:
    """The pictures in a folder and in the folders below it, by their names' endings, in order.

    What programs put there, such as .ipynb_checkpoints, is not among them, nor are pictures of
    kinds that are not read, such as .tif; `left_out` counts both."""
    left_out = LeftOut() if left_out is None else left_out
    pictures = []
    for path in files_in(Path(folder), left_out):
        if is_picture(path.name):
            pictures.append(path)
        else:
            count_other_picture(path, left_out)
    return sorted(pictures)


def count_other_picture(path: Path, left_out: LeftOut) -> None:
    ending = path.suffix.lower()
    if ending in OTHER_PICTURES:
        left_out.add(f"pictures ending in {ending}, which are not read: save them as JPEG", path)


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_ENDINGS)


def files_in(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """All files in a folder and below it; hidden pictures and links to elsewhere are counted."""
    seen = set()  # folders that links led to
    for name, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folder = Path(name)
        # os.walk goes into those that are left in the list.
        folders[:] = [
            each for each in sorted(folders) if is_to_be_read(root, folder / each, seen, left_out)
        ]
        for each in sorted(files):
            path = folder / each
            if is_hidden(each):
                if is_picture(each):
                    left_out.add("hidden copies of pictures", path)
            elif path.is_file():
                yield path


def refuse(error: OSError) -> None:
    """A folder that cannot be read would be left out without a word."""
    raise error


def is_to_be_read(root: Path, folder: Path, seen: set[Path], left_out: LeftOut) -> bool:
    """Does a folder below `root` hold pictures of the user's, that are not read elsewhere?"""
    if is_hidden(folder.name):
        for _, _, files in os.walk(folder):
            for name in filter(is_picture, files):
                left_out.add("hidden copies of pictures", folder / name)
        return False
    if not folder.is_symlink():
        return True
    # A link into the root leads to what is read anyway; and a loop must end.
    target = folder.resolve()
    if target in seen or target.is_relative_to(root.resolve()):
        return False
    seen.add(target)
    if any(target.is_relative_to(each.resolve()) for each in allowed_roots()):
        return True
    advice = "NANOVLADVA_ROOTS=FOLDER allows one"
    left_out.add(f"linked folders that lie elsewhere; {advice}", f"{folder} -> {target}")
    return False


def list_pictures(given: list[Path]) -> list[Path]:
    """Pictures as they are named, all in folders that are named, and what a pattern matches that
    the shell has left as it is (Windows' do). Says what is left out in folders."""
    paths = []
    for path in given:
        if path.is_dir():
            left_out = LeftOut()
            paths += pictures_in(path, left_out)
            tell(path, left_out)
        elif any(sign in path.name for sign in "*?[") and not path.exists():
            matching = sorted(each for each in path.parent.glob(path.name) if is_picture(each.name))
            if not matching:
                raise InputError(f"{path}: no picture has such a name")
            paths += matching
        else:
            paths.append(path)
    if not paths:
        names = ", ".join(str(path) for path in given)
        raise InputError(f"{names}: there are no pictures to embed or to describe")
    return paths
