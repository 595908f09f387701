"""Test sets, read as their authors publish them.

    items = read_retrieval("dataset_coco.json", "coco/images", split="test")
    pictures, classes = read_imagenet("imagenet/val", "classes.txt")
    items = read_sugarcrepe("add_att.json", "coco/val2017", ("caption", "negative_caption"))
    items = read_winoground("winoground/examples.jsonl", "winoground/images")
    items, sizes = read_test("winoground", Path("winoground/examples.jsonl"), Path("images"))

They come back as plain lists of paths and texts. All readers raise InputError for a file that is
missing, broken, empty or of another shape, and for paths that leave the image root. What is blank
or null is left out, and counted in `left_out` where one is given.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from formats.captions import (
    Unusable,
    captions_of,
    has_lines,
    id_of,
    items_in,
    karpathys_name,
    picture_of,
)
from formats.files import (
    InputError,
    LeftOut,
    fields_of,
    inside,
    is_hidden,
    read_json,
    read_text,
)
from formats.pictures import PICTURE_ENDINGS, pictures_in
from formats.records import fault_of_caption, leaves, stripped


def read_retrieval(
    path: str | Path,
    image_root: str | Path,
    split: str = "test",
    most: int | None = None,
    left_out: LeftOut | None = None,
) -> list[tuple[Path, list[str]]]:
    """(image, its captions) of COCO's and nocaps' JSON, of one split of Karpathy's, or of a list or
    lines that name an image and its captions each, such as BLIP's.

    At most `most` captions an image are kept. An image without captions stays: it is one more to be
    mistaken for another."""
    path = Path(path)
    left_out = LeftOut() if left_out is None else left_out
    with fields_of(path):
        # Some files have a line for each caption, and an image must not compete with itself.
        captions_of = defaultdict(list)
        for name, captions in retrieval_items(path, split, left_out):
            # Said twice is two queries, as published.
            captions_of[name].extend(usable(captions, name, left_out))

        if not any(captions_of.values()):
            hint = f"(of split {split!r}, if it has splits)"
            raise InputError(f"{path}: no captions of images {hint}")
        return [
            (inside(Path(image_root), name), captions[:most])
            for name, captions in captions_of.items()
        ]


def retrieval_items(path: Path, split: str, left_out: LeftOut) -> Iterator[tuple[str, list]]:
    """(image, its captions as they stand there), by what the file is."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    is_list = path.suffix.lower() != ".json" or has_lines(path)
    content = None if is_list else read_json(path, (dict, list))
    if is_list or isinstance(content, list):
        return items_of_blip(path, split, left_out)
    if "annotations" in content:
        return items_of_coco(content, left_out)
    return items_of_karpathy(content, split)


def usable(values: list, name: str, left_out: LeftOut) -> list[str]:
    """The captions among what stands in a caption's place; the others are counted."""
    captions = []
    for value in leaves(values):
        fault = fault_of_caption(value)
        if fault:
            left_out.add(fault, name)
        else:
            captions.append(stripped(value))
    return captions


def items_of_blip(path: Path, split: str, left_out: LeftOut) -> Iterator[tuple[str, list]]:
    """{"image", "caption"} each, where "caption" is one or a list of them."""
    for place, item in items_in(path):
        try:
            if not isinstance(item, dict):
                raise Unusable("no object with an image and captions")
            captions = captions_of(item)
            if item.get("split", split) != split:
                left_out.add(f"of another split than {split}", place)
                continue
            yield picture_of(item), captions
        except Unusable as fault:
            # A test set of other pictures than published would be compared with what is published.
            raise InputError(f"{path}, {place}: not in the expected format ({fault})") from None


def items_of_coco(content: dict, left_out: LeftOut) -> Iterator[tuple[str, list]]:
    """COCO's and nocaps' {"images", "annotations"}, the annotations in any order."""
    captions_of = defaultdict(list)
    for annotation in content["annotations"]:
        captions_of[id_of(annotation["image_id"])].append(annotation["caption"])
    listed = {id_of(image["id"]) for image in content["images"]}
    for key in captions_of.keys() - listed:
        unlisted = "captions of a picture that is not listed"
        left_out.add(unlisted, f"image_id {key}", len(captions_of[key]))
    # A defaultdict: an image that has no annotation has no captions.
    for image in content["images"]:
        yield image["file_name"], captions_of[id_of(image["id"])]


def items_of_karpathy(content: dict, split: str) -> Iterator[tuple[str, list]]:
    """Karpathy's {"images"}, each with its split and its sentences (COCO, Flickr30k)."""
    for image in content["images"]:
        if image["split"] == split:
            yield karpathys_name(image), [sentence["raw"] for sentence in image["sentences"]]


def read_domains(path: str | Path, image_root: str | Path) -> dict[Path, str]:
    """The domain of each image of nocaps' file: in-domain, near-domain or out-domain.

    Empty for files that have none. Raises InputError."""
    path = Path(path)
    if path.suffix.lower() != ".json" or has_lines(path):
        return {}
    content = read_json(path, (dict, list))
    images = content.get("images") if isinstance(content, dict) else None
    domains = {}
    with fields_of(path):
        for image in images or []:
            if isinstance(image.get("domain"), str) and "file_name" in image:
                domains[inside(Path(image_root), image["file_name"])] = image["domain"]
    return domains


# ---- Classes


def read_imagenet(
    root: str | Path, names: str | Path | None = None, left_out: LeftOut | None = None
) -> tuple[list[tuple[Path, int]], list[str]]:
    """A folder a class -> (image, class) of every picture, and the names of the classes.

    Classes are numbered in the order of their folders: as numbers where all are numbers, else
    sorted. `names` is one of

    - a text file with a name a line, or a JSON list, in that order. The names of the folders
      themselves may come in any order; where the order of the folders is not clear, a list of other
      names is refused;
    - a text file with a folder and its name a line, such as "n01440764 tench, Tinca tinca";
    - a text file or a JSON object with a number and a name each, counted from 0 or 1;
    - a JSON object from folders to names, or from anything to [folder, name];
    - None: the folders' names are the classes' names.

    Of synonyms after a folder, the first is the name."""
    root = Path(root)
    left_out = LeftOut() if left_out is None else left_out
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    folders = in_order([name for name in found if not is_hidden(name)])
    for name in found:
        if is_hidden(name):
            left_out.add("hidden folders that are no classes", root / name)
    if not names:
        classes = [spaced(folder) for folder in folders]
    elif Path(names).suffix == ".json":
        content = read_json(names, (dict, list))
        classes = classes_of_json(Path(names), content, folders)
    else:
        classes = classes_of_text(Path(names), read_text(names), folders)

    if not folders or len(classes) != len(folders):
        counts = f"{len(classes)} class names for the {len(folders)} folders of {root}"
        raise InputError(f"{names or root}: {counts}")
    pictures = []
    for index, folder in enumerate(folders):
        for path in pictures_in(root / folder, left_out):
            pictures.append((path, index))
    if not pictures:
        raise InputError(f"{root}: no pictures in its {len(folders)} folders")
    return pictures, classes


def in_order(folders: list[str]) -> list[str]:
    """As a file's author counts them: 2 before 10."""
    if all(folder.isdecimal() for folder in folders):
        return sorted(folders, key=lambda folder: (int(folder), folder))
    return sorted(folders)


def order_is_clear(folders: list[str]) -> bool:
    """Whether a list in the order of these folders can mean one order only.

    Programs disagree about class_2 and class_10, and about Zebra and apple."""
    if all(folder.isdecimal() for folder in folders):
        return True
    orders = {
        tuple(sorted(folders)),
        tuple(sorted(folders, key=str.lower)),
        tuple(sorted(folders, key=by_numbers)),
    }
    return len(orders) == 1


def by_numbers(name: str) -> list:
    """What sorts class_2 before class_10."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def listed_in_order(path: Path, names: list[str], folders: list[str]) -> list[str]:
    """The classes of a plain list. Raises InputError where its order may mean another one."""
    name_of = {spaced(name).lower(): name for name in names}
    wanted = [spaced(folder).lower() for folder in folders]
    if len(names) == len(name_of) and set(wanted) == set(name_of):
        return [name_of[folder] for folder in wanted]
    if not order_is_clear(folders):
        found = "programs sort these folders in different orders, so a plain list is not safe"
        raise InputError(f"{path}: {found}; write a folder and its name in each line")
    return names


# What may stand between a folder or a number and a name, in the order in which it is looked for.
SEPARATORS = (r"\t", r":", r",", r";", r"\s")


def classes_of_text(path: Path, text: str, folders: list[str]) -> list[str]:
    """The names of the classes, in the order of the folders. Raises InputError."""
    if text.lstrip().startswith(("{", "[")):
        # A well-known list is a dictionary as Python prints it: {0: 'tench, Tinca tinca', ...}
        try:
            content = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            kind = type(error).__name__
            raise InputError(f"{path}: no list or object, as it begins ({kind})") from None
        if isinstance(content, dict):
            content = {str(key): value for key, value in content.items()}
        return classes_of_json(path, content, folders)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return classes_of_lines(path, lines, folders)


def classes_of_lines(path: Path, lines: list[str], folders: list[str]) -> list[str]:
    """The names of the classes, in the order of the folders. Raises InputError."""
    for separator in SEPARATORS:
        pairs = [re.split(rf"\s*{separator}\s*", line, maxsplit=1) for line in lines]
        if any(len(pair) < 2 for pair in pairs):
            continue
        name_of = {pair[0]: without_number(pair[1], pairs) for pair in pairs}
        if set(folders) <= set(name_of):
            return [first_synonym(name_of[folder]) for folder in folders]
        classes = counted(name_of) if len(name_of) == len(lines) else None
        if classes:
            return listed_in_order(path, classes, folders)
        # The other way round: "tench n01440764".
        pairs = [re.split(rf"\s*{separator}\s*(?=\S+$)", line, maxsplit=1) for line in lines]
        name_of = {pair[-1]: pair[0] for pair in pairs}
        if set(folders) <= set(name_of):
            return [first_synonym(name_of[folder]) for folder in folders]
        # Not after a space: "digit 0", "digit 1" are names.
        if separator != r"\s" and len(name_of) == len(lines):
            classes = counted(name_of)
            if classes:
                return listed_in_order(path, [spaced(name) for name in classes], folders)
    refuse_some_ids(path, lines, folders)
    return listed_in_order(path, lines, folders)


def without_number(name: str, pairs: list[list[str]]) -> str:
    """ImageNet's own map has "n02119789 1 kit_fox": a folder, a number, a name."""
    if all(re.match(r"\d+\s+\D", pair[1]) for pair in pairs):
        return spaced(name.split(maxsplit=1)[1])
    return spaced(name)


def counted(name_of: dict[str, str]) -> list[str] | None:
    """The names in the order of their keys, where these are 0, 1, ... or 1, 2, ...; else None."""
    if not all(key.isdecimal() for key in name_of):
        return None
    keys = sorted(name_of, key=int)
    for first in (0, 1):
        if [int(key) for key in keys] == list(range(first, first + len(keys))):
            return [name_of[key] for key in keys]
    return None


def refuse_some_ids(path: Path, lines: list[str], folders: list[str]) -> None:
    """Raise InputError where ids would stand in the prompts: keys of only some folders, or of
    others."""
    known = set(folders)
    for number, line in enumerate(lines, start=1):
        words = re.split(r"[\s:,;]+", line)
        is_key = len(words) > 1 and words[0] in known
        if is_key or re.match(r"n\d{8}\b", line) or re.match(r"\d+\s*[:,;\t]", line):
            found = f"line {number} begins with an id, {words[0]!r}"
            advice = "give each of the folders a line with its name after it"
            raise InputError(f"{path}: {found}, but not every folder has one; {advice}")


def classes_of_json(path: Path, content: dict | list, folders: list[str]) -> list[str]:
    with fields_of(path):
        if isinstance(content, list):
            return listed_in_order(path, [spaced(name).strip() for name in content], folders)
        name_of = {}
        for key, value in content.items():
            # The usual file: {"0": ["n01440764", "tench"], ...}
            is_pair = isinstance(value, list) and len(value) == 2 and key not in folders
            if is_pair:
                folder, name = value
                name_of[folder] = name
            elif isinstance(value, list):  # synonyms
                name_of[key] = value[0]
            else:
                name_of[key] = value
        classes = None
        if not set(folders) <= set(name_of):
            classes = counted(name_of)
        if classes:
            classes = [spaced(name).strip() for name in classes]
            return listed_in_order(path, classes, folders)
        return [spaced(name_of[folder]).strip() for folder in folders]


def first_synonym(names: str) -> str:
    return names.split(",")[0].strip()


def spaced(name: str) -> str:
    """Lists of classes write "fire_truck", prompts do not."""
    return name.replace("_", " ")


# ---- Compositional tests


def read_sugarcrepe(
    path: str | Path,
    image_root: str | Path,
    captions: tuple[str, ...],
    left_out: LeftOut | None = None,
) -> list[dict]:
    """One file of SugarCrepe (an object keyed by numbers, with gaps) or SugarCrepe++ (a list).

    Returns its items, each with the path of its "image" and the fields named in `captions`."""
    content = read_json(path, (dict, list))
    items = content if isinstance(content, list) else list(content.values())
    result = []
    with fields_of(path):
        for number, item in enumerate(items):
            checked = {"image": inside(Path(image_root), item["filename"])}
            if has_captions(item, captions, f"item {number}", left_out):
                for key in captions:
                    checked[key] = item[key].strip()
                result.append(checked)
    if not result:
        raise InputError(f"{path}: holds no items")
    return result


def has_captions(item: dict, keys: tuple[str, ...], place: str, left_out: LeftOut | None) -> bool:
    """Whether none of the captions is blank or null; such an item asks nothing, and is counted."""
    faults = [fault_of_caption(item[key]) for key in keys if not is_wrong(item[key])]
    faults = [fault for fault in faults if fault]
    if faults and left_out is not None:
        left_out.add(f"items with {faults[0]}", place)
    return not faults


def is_wrong(value) -> bool:
    """No text, and nothing that stands for one that is missing: the file is of another shape."""
    return not isinstance(value, str | float | None)


def read_winoground(
    path: str | Path, image_root: str | Path, left_out: LeftOut | None = None
) -> list[dict]:
    """examples.jsonl -> items with "caption_0", "caption_1", and "image_0", "image_1" as paths."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: cannot be read (no such file)")
    result = []
    with fields_of(path):
        for place, item in items_in(path):
            keys = ("caption_0", "caption_1")
            if not has_captions(item, keys, place, left_out):
                continue
            checked = {key: item[key].strip() for key in keys}
            for key in ("image_0", "image_1"):
                checked[key] = picture_named(Path(image_root), item[key])
            result.append(checked)
    if not result:
        raise InputError(f"{path}: holds no examples")
    return result


def picture_named(root: Path, name: str) -> Path:
    """The file names pictures without their ending, which is .png as published."""
    for ending in ("", ".png", *PICTURE_ENDINGS):
        path = inside(root, name + ending)
        if path.is_file():
            return path
    return inside(root, name + ".png")  # who opens it says that it is not there


# ---- A whole test

SUGARCREPE = (
    "replace_obj",
    "replace_att",
    "replace_rel",
    "swap_obj",
    "swap_att",
    "add_obj",
    "add_att",
)
SUGARCREPE_PP = SUGARCREPE[:5]  # it has no add_* files
# How much there is of the published test sets, as `read_test` counts it.
SIZES = {
    # images and captions
    "retrieval": {
        (1000, 5000): "Flickr30k",
        (5000, 25010): "COCO",
        (5000, 25000): "COCO",
        (4500, 45000): "nocaps",
    },
    # items of each file
    "sugarcrepe": {(1652, 788, 1406, 245, 666, 2062, 692): "SugarCrepe"},
    "sugarcrepe++": {(1652, 788, 1406, 245, 666): "SugarCrepe++"},
    # items
    "winoground": {(400,): "Winoground"},
    # images and classes
    "imagenet": {(50000, 1000): "ImageNet"},
}


def read_test(
    name: str,
    file: Path,
    images: Path,
    split: str = "test",
    captions_per_image: int | None = None,
    classes: Path | None = None,
    left_out: LeftOut | None = None,
) -> tuple:
    """One of the tests in eval.METRICS, from its authors' files: what its metric wants, and how
    much of it there is, as in SIZES. What is not used is counted in `left_out`.

    Raises InputError."""
    if name == "retrieval":
        items = read_retrieval(file, images, split, captions_per_image, left_out)
        num_captions = sum(len(captions) for _, captions in items)
        return items, (len(items), num_captions)
    if name == "winoground":
        items = read_winoground(file, images, left_out)
        return items, (len(items),)
    if name == "imagenet":
        pictures, names = read_imagenet(file, classes, left_out)
        return (pictures, names), (len(pictures), len(names))
    if not file.is_dir():
        advice = f"give the one that holds {SUGARCREPE[0]}.json and the other files"
        raise InputError(f"{file}: is not a folder; {advice}")
    if name == "sugarcrepe":
        kinds = SUGARCREPE
        captions = ("caption", "negative_caption")
    else:
        kinds = SUGARCREPE_PP
        captions = ("caption", "caption2", "negative_caption")
    files = {}
    for kind in kinds:
        files[kind] = read_sugarcrepe(file / f"{kind}.json", images, captions, left_out)
    return files, tuple(len(items) for items in files.values())
