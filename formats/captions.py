"""Other people's files of captioned pictures, made into the JSON lines that data.py reads.

    left_out = convert(Path("llava_v1_5.json"), Path("train.jsonl"), image_root=Path("images"))

A source is one of

    .json, .jsonl   LLaVA's or ShareGPT4V's conversations; COCO's, nocaps' or Karpathy's captions;
                    Localized Narratives; BLIP's lists, metadata.jsonl and our own lines, of which
                    each names a picture and its captions
    .csv, .tsv, .txt  a table with a column of pictures and columns of captions
    a folder        pictures, each with a .txt file beside it; or img2dataset's .tar shards, which
                    are never unpacked: a line says where in its shard the picture stands

Each kind has one reader, a generator of records {"image": path, "captions": [text, ...]}, with
"part": [offset, bytes] where the picture stands inside of a shard. A reader is called as
`reader(path, left_out)`, and counts in `left_out`, by the reason, what it sees but does not yield.
What holds for all kinds, such as paths that leave the image root and captions that are none, is
checked in one place, in `fault_of` and `clean`. Reasons that begin with "captions" count captions,
those that begin with "members" files in a tar, all others records; what is written and what is
counted is all there is in the source.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TextIO

from formats.files import (
    InputError,
    LeftOut,
    as_on_disk,
    decoded,
    fields_of,
    inside,
    open_text,
    read_json,
    what_it_may_be,
)
from formats.pictures import files_in, pictures_in
from formats.records import (
    CAPTION_ENDINGS,
    CAPTION_KEYS,
    OTHER_CAPTION_KEYS,
    PICTURE_KEYS,
    SAID_BEFORE,
    Captions,
    clean,
    is_for_training,
)
from formats.shards import COMPRESSED_TARS, read_shards, shards_in
from formats.tables import read_table

# ---- From any source to our lines


def convert(source: Path, out: Path, image_root: Path) -> LeftOut:
    """Write a source as JSON lines, one a picture.

    Returns how many were "written", and how many others were not, by the reason.

    Raises:
        InputError: when the source is of no known kind, is broken, or has no usable record. A file
            that was at `out` before is then still there."""
    left_out = LeftOut()
    left_out["written"] = 0
    # A run may read `out` meanwhile, and a source may turn out to be broken at its last line.
    temporary = out.with_name(out.name + ".tmp")
    try:
        # fields_of: readers take a stranger's fields as they should be, and need not check each.
        with fields_of(source), open(temporary, "w", encoding="utf-8") as file:
            write_records(source, file, image_root, left_out)
        if not left_out["written"]:
            reasons = "; ".join(line for line in left_out.lines() if line != "0 written")
            raise InputError(f"{source}: no usable record; {reasons or 'it is empty'}")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return left_out


def write_records(source: Path, file: TextIO, image_root: Path, left_out: LeftOut) -> None:
    reader = reader_of(source)
    # Some sources have a line for each caption. Records of one picture become one record, since a
    # picture must not be its own negative in the contrastive loss.
    records = {}
    for record in reader(source, left_out):
        image = slashed(image_root, record["image"])
        kept = clean(record["captions"])
        fault = fault_of(image, kept, image_root)
        if fault:
            left_out.add(fault, image)
            continue
        kept.count(left_out, image)
        if "part" in record:
            # A shard names a picture once. Written at once, millions of them need no memory.
            written = {"image": image, "captions": kept.captions, "part": record["part"]}
            write_line(file, written)
            left_out["written"] += 1
        elif image in records:
            left_out.add("joined to an earlier line of the same picture", image)
            join(records[image], kept.captions, left_out)
        else:
            records[image] = {"image": image, "captions": kept.captions}
            if "group" in record:
                records[image]["group"] = record["group"]
    for record in records.values():
        write_line(file, record)
        left_out["written"] += 1


def write_line(file: TextIO, record: dict) -> None:
    file.write(json.dumps(record) + "\n")


def join(record: dict, captions: list[str], left_out: LeftOut) -> None:
    """Add captions to a record, those that it does not have."""
    for caption in captions:
        if caption in record["captions"]:
            left_out.add(SAID_BEFORE, record["image"])
        else:
            record["captions"].append(caption)


def slashed(image_root: Path, name: str) -> str:
    """A path as Windows wrote it, or with other accents -> the spelling that is on the disk."""
    try:
        return as_on_disk(image_root, name)
    except (OSError, ValueError):  # no path at all: `fault_of` says so
        return name


def fault_of(image: str, kept: "Captions", image_root: Path) -> str | None:
    """Why a record of any source cannot be used, or None."""
    try:
        path = inside(image_root, image)
    except InputError as error:  # counted, where data.py would refuse: one bad line is no bad file
        if "through a link" in str(error):
            return "a path that leaves the image root through a link; NANOVLADVA_ROOTS=FOLDER"
        return "a path that leaves the image root"
    if not path.is_file():
        return "no such picture"
    if not kept.captions:
        return kept.fault
    return None


# ---- Which reader


def reader_of(path: Path) -> Callable[[Path, LeftOut], Iterator[dict]]:
    """The reader of a source, by what the source is. Raises InputError where there is none."""
    if path.is_dir():
        return read_shards if any(shards_in(path, LeftOut())) else read_folder
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".jsonlines", ".ndjson"):
        return read_items
    if suffix == ".json":
        return reader_of_json(path)
    if suffix in (".csv", ".tsv", ".txt"):
        return read_table
    advice = "of .tar shards give the folder"
    raise InputError(f"{path}: not a .json, .jsonl, .csv or .tsv file; {advice}")


def reader_of_json(path: Path) -> Callable[[Path, LeftOut], Iterator[dict]]:
    if has_lines(path):
        return read_items
    content = read_json(path, (dict, list))
    if isinstance(content, list) or isinstance(content.get("data"), list):
        return read_items
    if "images" in content:
        return read_coco
    if content and all(isinstance(value, str | list) for value in content.values()):
        return read_mapping
    keys = ", ".join(sorted(content)[:5])
    raise InputError(f"{path}: an object of the keys {keys}, none of them images with captions")


def has_lines(path: Path) -> bool:
    """Is this a file with a JSON object in each line?"""
    with open_text(path) as file:
        first = file.readline()
        if not any(line.strip() for line in file):
            return False  # one line may be a whole file
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


# ---- The readers: JSON


class Unusable(Exception):
    """An item that is not used, and why."""


def read_items(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """A JSON list, or JSON lines, of which each item is a picture with captions."""
    for place, item in items_in(path):
        try:
            yield record_of(item)
        except Unusable as fault:
            left_out.add(str(fault), place)


def items_in(path: Path) -> Iterator[tuple[str, object]]:
    """(where it stands, item) of JSON lines, of a list, or of the list under "data".

    Raises InputError for a line that is no JSON."""
    with open_text(path) as file:
        head = file.read(1)
        while head.isspace():
            head = file.read(1)
    is_whole = path.suffix.lower() == ".json" and not has_lines(path)
    if head == "[" or is_whole:
        content = read_json(path, (list, dict))
        if isinstance(content, dict):
            content = content["data"]
        for number, item in enumerate(content):
            yield f"item {number}", item
        return
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", parsed(line, path, number)


def parsed(line: str, path: Path, number: int):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, line {number}: not in the expected format, which is a JSON object a line "
            f"({error}); {what_it_may_be(path)}"
        ) from None


def record_of(item) -> dict:
    """One item of a list -> {"image", "captions"}. Raises Unusable."""
    if not isinstance(item, dict):
        raise Unusable("neither a conversation nor a picture with captions")
    for key in ("conversations", "messages"):
        if key in item:
            return {"image": picture_of(item), "captions": [answer_of(item[key])]}
    if "dataset_id" in item and "image_id" in item:
        return narrative_of(item)
    captions = captions_of(item)
    if not is_for_training(item.get("split")):
        # Whoever trains on these could not compare with anyone.
        raise Unusable("of a split for tests")
    record = {"image": picture_of(item), "captions": captions}
    for key in ("part", "group"):  # our own lines have these
        if key in item:
            record[key] = item[key]
    return record


def picture_of(item: dict) -> str:
    """The path of an item's picture. Raises Unusable where there is none, or several."""
    for key in PICTURE_KEYS:
        value = item.get(key)
        if isinstance(value, list) and len(value) > 1:
            raise Unusable("more than one image")
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return value
    raise Unusable("no image")


def captions_of(item: dict) -> list:
    """All captions of an item, as they stand there. Raises Unusable where no key is known."""
    keys = [key for key in CAPTION_KEYS if key in item]
    if not keys:
        keys = [key for key in OTHER_CAPTION_KEYS if key in item][:1]
    if not keys:
        raise Unusable("neither a conversation nor a picture with captions")
    values = []
    for key in keys:
        value = item[key]
        values += value if isinstance(value, list) else [value]
    return values


SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def answer_of(turns) -> str:
    """The one answer of a conversation, as LLaVA's 558k and ShareGPT4V have them: the caption."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("no conversation")
    speakers = [turn.get("from", turn.get("role")) for turn in turns]
    if speakers[:1] == ["system"]:
        speakers = speakers[1:]
        turns = turns[1:]
    # Longer conversations are about details of a picture: no answer in them describes all of it.
    speakers = [SPEAKERS.get(speaker) if isinstance(speaker, str) else None for speaker in speakers]
    if speakers != ["user", "assistant"]:
        raise Unusable("not one question and one answer")
    answer = turns[1].get("value", turns[1].get("content"))
    if isinstance(answer, list):  # [{"type": "text", "text": ...}]
        parts = [part.get("text") for part in answer if isinstance(part, dict)]
        answer = " ".join(part for part in parts if isinstance(part, str))
    if not isinstance(answer, str):
        raise Unusable("not one question and one answer")
    return answer


def narrative_of(item: dict) -> dict:
    """Localized Narratives."""
    name = str(item["image_id"])
    # COCO's pictures are named by numbers of 12 digits, the file has them without zeros.
    if "coco" in str(item["dataset_id"]):
        name = name.zfill(12)
    return {"image": f"{name}.jpg", "captions": [item["caption"]]}


def read_mapping(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """An object from pictures to captions: {"0.jpg": ["a red square"]}."""
    for name, captions in read_json(path).items():
        yield {"image": name, "captions": captions if isinstance(captions, list) else [captions]}


def read_coco(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """COCO's and nocaps' files, and Karpathy's, of which the training splits are read."""
    content = read_json(path)
    # Annotations stand in any order, so all of them come before the first picture.
    captions_of = defaultdict(list)
    for annotation in content.get("annotations", []):
        captions_of[id_of(annotation["image_id"])].append(annotation["caption"])

    listed = {id_of(image.get("id")) for image in content["images"]}
    for key in captions_of.keys() - listed:
        unlisted = "captions of a picture that is not listed"
        left_out.add(unlisted, f"image_id {key}", len(captions_of[key]))

    for image in content["images"]:
        if "file_name" in image:  # COCO's own
            # One that stands there without captions is yielded too, and counted.
            yield {"image": image["file_name"], "captions": captions_of.get(id_of(image["id"]), [])}
        elif is_for_training(image["split"]):  # Karpathy's
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield {"image": karpathys_name(image), "captions": captions}
        else:
            left_out.add("of a split for tests", image["filename"])


def id_of(value) -> str:
    """Some files have the same id as a number and as a string."""
    return str(value)


def karpathys_name(image: dict) -> str:
    """COCO's pictures lie in two folders, Flickr's in one that has no name."""
    return str(PurePosixPath(image.get("filepath", ""), image["filename"]))


# ---- The readers: a folder


def read_folder(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """Pictures, each with a .txt of the same name beside it, one caption a line."""
    pictures = pictures_in(path, left_out)
    texts = {}  # by their name in lower case: 0.TXT belongs to 0.jpg
    for file in files_in(path, LeftOut()):  # what is hidden was counted with the pictures
        if file.suffix.lower() in CAPTION_ENDINGS:
            texts[str(file).lower()] = file
        elif file.name.lower().endswith(COMPRESSED_TARS):
            left_out.add("compressed shards, which are not read: unpack them with gunzip", file)

    used = set()
    for image in pictures:
        captions = []
        for ending in CAPTION_ENDINGS:
            # photo.txt or photo.jpg.txt
            for name in (image.with_suffix(ending), f"{image}{ending}"):
                text = texts.get(str(name).lower())
                if text:
                    used.add(text)
                    captions += lines_of(text, left_out)
        # A picture without its .txt is yielded too, so that it is counted as one without a caption.
        yield {"image": image.relative_to(path).as_posix(), "captions": captions}
    for text in sorted(set(texts.values()) - used):
        left_out.add("texts without a picture of that name", text)


def lines_of(text: Path, left_out: LeftOut) -> list[str]:
    """The captions in a text file; one that cannot be read is counted."""
    try:
        lines = decoded(text.read_bytes(), text).split("\n")
    except InputError as error:
        # With the whole advice, once: there may be thousands of them.
        reason = str(error).partition(": ")[2]
        left_out.add(f"texts that cannot be read: {reason}", text)
        return []
    return [line for line in lines if line.strip()]
