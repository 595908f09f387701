"""Test sets, read as their authors publish them.

    items = read_retrieval("dataset_coco.json", "coco/images", split="test")
    pictures, classes = read_imagenet("imagenet/val", "classes.txt")
    items = read_sugarcrepe("add_att.json", "coco/val2017", ("caption", "negative_caption"))
    items = read_winoground("winoground/examples.jsonl", "winoground/images")

They come back as plain lists of paths and texts. All readers raise InputError for a file that is
missing, broken, empty or of another shape, and for paths that leave the image root.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from formats.captions import pictures_in
from formats.files import InputError, fields_of, inside, read_json


def read_retrieval(
    path: str | Path, image_root: str | Path, split: str = "test", most: int | None = None
) -> list[tuple[Path, list[str]]]:
    """(image, its captions) of COCO's and nocaps' JSON, of one split of Karpathy's, or of BLIP's.

    At most `most` captions an image are kept. An image without captions stays: it is one more to be
    mistaken for another."""
    content = read_json(path, (dict, list))
    with fields_of(path):
        if isinstance(content, list):
            items = items_of_blip(content)
        elif "annotations" in content:
            items = items_of_coco(content)
        else:
            items = items_of_karpathy(content, split)
        # Some files have a line for each caption, and an image must not compete with itself.
        captions_of = defaultdict(list)
        for name, captions in items:
            captions_of[name].extend(captions)

        if not any(captions_of.values()):
            hint = f"(of split {split!r}, if it has splits)"
            raise InputError(f"{path}: no captions of images {hint}")
        result = []
        for name, captions in captions_of.items():
            stripped = [text.strip() for text in captions[:most]]
            result.append((inside(Path(image_root), name), stripped))
        return result


def items_of_blip(content: list) -> Iterator[tuple[str, list[str]]]:
    """A list of {"image", "caption"}, where "caption" is one or a list of them."""
    for item in content:
        name = item["image"]
        captions = item["caption"]
        if isinstance(captions, str):
            captions = [captions]
        yield name, captions


def items_of_coco(content: dict) -> Iterator[tuple[str, list[str]]]:
    """COCO's and nocaps' {"images", "annotations"}, the annotations in any order."""
    captions_of = defaultdict(list)
    for annotation in content["annotations"]:
        captions_of[annotation["image_id"]].append(annotation["caption"])
    # A defaultdict: an image that has no annotation has no captions.
    for image in content["images"]:
        yield image["file_name"], captions_of[image["id"]]


def items_of_karpathy(content: dict, split: str) -> Iterator[tuple[str, list[str]]]:
    """Karpathy's {"images"}, each with its split and its sentences (COCO, Flickr30k)."""
    for image in content["images"]:
        if image["split"] != split:
            continue
        # COCO's pictures lie in two folders, Flickr's in one that has no name.
        name = Path(image.get("filepath", "")) / image["filename"]
        yield str(name), [sentence["raw"] for sentence in image["sentences"]]


def read_imagenet(
    root: str | Path, names: str | Path | None = None
) -> tuple[list[tuple[Path, int]], list[str]]:
    """A folder a class -> (image, class) of every picture, and the names of the classes.

    Classes are numbered in the sorted order of their folders. `names` is one of

    - a text file with a name a line, or a JSON list, in the order of the folders;
    - a JSON object from folders to names, or from anything to [folder, name];
    - None: the folders' names are the classes' names."""
    root = Path(root)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not names:
        classes = [spaced(folder) for folder in folders]
    elif Path(names).suffix == ".json":
        classes = classes_of_json(names, folders)
    else:
        # fields_of: a file that is not UTF-8 is named too.
        with fields_of(names), open(names, encoding="utf-8") as file:
            classes = [line.strip() for line in file if line.strip()]

    if not folders or len(classes) != len(folders):
        found = f"{len(classes)} class names for the {len(folders)} folders of {root}"
        raise InputError(f"{names or root}: {found}")
    pictures = []
    for index, folder in enumerate(folders):
        for path in pictures_in(root / folder):
            pictures.append((path, index))
    if not pictures:
        raise InputError(f"{root}: no pictures in its {len(folders)} folders")
    return pictures, classes


def classes_of_json(path: str | Path, folders: list[str]) -> list[str]:
    content = read_json(path, (dict, list))
    with fields_of(path):
        if isinstance(content, list):
            classes = content
        else:
            name_of = {}
            for key, value in content.items():
                if isinstance(value, list):  # the usual file: {"0": ["n01440764", "tench"], ...}
                    folder, name = value
                    name_of[folder] = name
                else:
                    name_of[key] = value
            classes = [name_of[folder] for folder in folders]
        return [spaced(name).strip() for name in classes]


def spaced(name: str) -> str:
    """Lists of classes write "fire_truck", prompts do not."""
    return name.replace("_", " ")


def read_sugarcrepe(
    path: str | Path, image_root: str | Path, captions: tuple[str, ...]
) -> list[dict]:
    """One file of SugarCrepe (an object keyed by numbers, with gaps) or SugarCrepe++ (a list).

    Returns its items, each with the path of its "image" and the fields named in `captions`."""
    content = read_json(path, (dict, list))
    items = list(content.values()) if isinstance(content, dict) else content
    if not items:
        raise InputError(f"{path}: holds no items")
    result = []
    with fields_of(path):
        for item in items:
            checked = {"image": inside(Path(image_root), item["filename"])}
            for key in captions:
                checked[key] = item[key].strip()
            result.append(checked)
    return result


def read_winoground(path: str | Path, image_root: str | Path) -> list[dict]:
    """examples.jsonl -> items with "caption_0", "caption_1", and "image_0", "image_1" as paths."""
    items = []
    try:
        text = Path(path).read_text(encoding="utf-8")
        # Not splitlines(): captions may hold other line breaks that are legal in JSON.
        for line in text.split("\n"):
            if line.strip():
                items.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not items:
        raise InputError(f"{path}: holds no examples")
    result = []
    with fields_of(path):
        for item in items:
            checked = {}
            for key in ("caption_0", "caption_1"):
                checked[key] = item[key].strip()
            # The file names pictures without their ending.
            for key in ("image_0", "image_1"):
                checked[key] = inside(Path(image_root), item[key] + ".png")
            result.append(checked)
    return result
