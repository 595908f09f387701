"""Other people's files of captioned pictures, made into the JSON lines that data.py reads.

    counts = convert(Path("llava_v1_5.json"), Path("train.jsonl"), image_root=Path("images"))

A source is one of

    .json           LLaVA's or ShareGPT4V's conversations; COCO's, nocaps' or Karpathy's captions
    .jsonl          Localized Narratives
    .csv, .tsv      a table with the columns image and caption
    a folder        pictures, each with a .txt file beside it; or img2dataset's .tar shards, which
                    are never unpacked: a line says where in its shard the picture stands

Each kind has one reader, a generator of records {"image": path, "captions": [text, ...]}, with
"part": [offset, bytes] where the picture stands inside of a shard. A reader is called as
`reader(path, left_out)`, and counts in `left_out`, by the reason, what it sees but does not yield.
What holds for all kinds, such as paths that leave the image root, is checked in one place, in
`fault_of`.
"""

import csv
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from formats.files import InputError, fields_of, inside, read_json

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MEGABYTE = 2**20


def pictures_in(folder: str | Path) -> list[Path]:
    """The pictures in a folder and in the folders below it, by their names' endings, in order."""
    pictures = []
    for path in Path(folder).rglob("*"):
        if path.suffix.lower() in PICTURE_ENDINGS and path.is_file():
            pictures.append(path)
    return sorted(pictures)


# ---- From any source to our lines


def convert(source: Path, out: Path, image_root: Path) -> Counter:
    """Write a source as JSON lines, one a picture.

    Returns how many were "written", and how many others were not, by the reason.

    Raises:
        InputError: when the source is of no known kind, is broken, or has no usable record. A file
            that was at `out` before is then still there."""
    counts = Counter(written=0)
    # A run may read `out` meanwhile, and a source may turn out to be broken at its last line.
    temporary = out.with_name(out.name + ".tmp")
    try:
        # fields_of: readers take a stranger's fields as they should be, and need not check each.
        with fields_of(source), open(temporary, "w", encoding="utf-8") as file:
            write_records(source, file, image_root, counts)
        if not counts["written"]:
            raise InputError(f"{source}: no usable record ({dict(counts)})")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def write_records(source: Path, file: TextIO, image_root: Path, counts: Counter) -> None:
    reader = reader_of(source)
    # Some sources have a line for each caption. Records of one picture become one record, since a
    # picture must not be its own negative in the contrastive loss.
    captions_of = {}
    for record in reader(source, counts):
        image = record["image"]
        captions = distinct(record["captions"])
        fault = fault_of(image, captions, image_root)
        if fault:
            counts[fault] += 1
        elif "part" in record:
            # A shard names a picture once. Written at once, millions of them need no memory.
            write_line(file, {"image": image, "captions": captions, "part": record["part"]})
            counts["written"] += 1
        elif image in captions_of:
            captions_of[image] = distinct(captions_of[image] + captions)
            counts["joined to an earlier line of the same picture"] += 1
        else:
            captions_of[image] = captions
    for image, captions in captions_of.items():
        write_line(file, {"image": image, "captions": captions})
        counts["written"] += 1


def write_line(file: TextIO, record: dict) -> None:
    file.write(json.dumps(record) + "\n")


def distinct(captions: list[str]) -> list[str]:
    """Captions without the space around them, without empty ones, each once, in their order."""
    stripped = [text.strip() for text in captions]
    # A dictionary keeps the order in which its keys came, a set does not.
    return list(dict.fromkeys(text for text in stripped if text))


def fault_of(image: str, captions: list[str], image_root: Path) -> str | None:
    """Why a record of any source cannot be used, or None."""
    try:
        path = inside(image_root, image)
    except InputError:  # counted, where data.py would refuse: one bad line is no bad file
        return "a path that leaves the image root"
    if not path.is_file():
        return "no such picture"
    if not captions:
        return "no caption"
    return None


def reader_of(path: Path) -> Callable[[Path, Counter], Iterator[dict]]:
    """The reader of a source, by what the source is. Raises InputError where there is none."""
    if path.is_dir():
        has_shards = any(path.glob("*.tar"))
        return read_shards if has_shards else read_folder
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        content = read_json(path, (dict, list))
        return read_conversations if isinstance(content, list) else read_coco
    if path.suffix == ".jsonl":
        return read_narratives
    if path.suffix in (".csv", ".tsv"):
        return read_table
    advice = "of .tar shards give the folder"
    raise InputError(f"{path}: not a .json, .jsonl, .csv or .tsv file; {advice}")


# ---- The readers


def read_conversations(path: Path, left_out: Counter) -> Iterator[dict]:
    """LLaVA's blip_laion_cc_sbu_558k.json and ShareGPT4V's files: the answer is the caption."""
    for item in read_json(path, list):
        fault = fault_of_conversation(item)
        if fault:
            left_out[fault] += 1
            continue
        _, answer = item["conversations"]
        yield {"image": item["image"], "captions": [answer["value"]]}


def fault_of_conversation(item) -> str | None:
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "no conversation"
    if not isinstance(item.get("image"), str):
        return "no image"
    # Longer conversations are about details of a picture: no answer in them describes all of it.
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"] or not isinstance(turns[1].get("value"), str):
        return "not one question and one answer"
    return None


def read_coco(path: Path, left_out: Counter) -> Iterator[dict]:
    """COCO's and nocaps' files, and Karpathy's, of which the training splits are read."""
    content = read_json(path)
    # Annotations stand in any order, so all of them come before the first picture.
    captions_of = {}
    for annotation in content.get("annotations", []):
        captions_of.setdefault(annotation["image_id"], []).append(annotation["caption"])

    listed = {image.get("id") for image in content["images"]}
    unlisted = captions_of.keys() - listed
    if unlisted:
        left_out["captions of a picture that is not listed"] += len(unlisted)

    for image in content["images"]:
        if "file_name" in image:  # COCO's own
            yield {"image": image["file_name"], "captions": captions_of.get(image["id"], [])}
        elif image["split"] in ("train", "restval"):  # Karpathy's
            name = Path(image.get("filepath", ""), image["filename"])
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield {"image": str(name), "captions": captions}
        else:
            # Whoever trains on these could not compare with anyone.
            left_out["of a split for tests"] += 1


def read_narratives(path: Path, left_out: Counter) -> Iterator[dict]:
    """Localized Narratives, one JSON object a line."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                continue
            item = json.loads(line)
            name = str(item["image_id"])
            # COCO's pictures are named by numbers of 12 digits, the file has them without zeros.
            if "coco" in item["dataset_id"]:
                name = name.zfill(12)
            yield {"image": f"{name}.jpg", "captions": [item["caption"]]}


def read_table(path: Path, left_out: Counter) -> Iterator[dict]:
    """CSV or TSV with a header: a column "image", and columns whose names begin with "caption"."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    # utf-8-sig: spreadsheets put a byte order mark in front of the first column's name.
    with open(path, newline="", encoding="utf-8-sig") as file:
        # strict: else a quote that never ends swallows the rows behind it without a word.
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = rows.fieldnames or []
            columns = [name for name in names if name.startswith("caption")]
            if "image" not in names or not columns:
                advice = "the first line must name a column image and a column caption"
                raise InputError(f"{path}: {advice}")
            for row in rows:
                # A row that is too short has None in its last columns.
                captions = [row[name] or "" for name in columns]
                yield {"image": row["image"] or "", "captions": captions}
        except csv.Error as error:
            place = f"{path}, behind line {rows.line_num}"
            raise InputError(f"{place}: {error}; see to the quotes") from None


def read_folder(path: Path, left_out: Counter) -> Iterator[dict]:
    """Pictures, each with a .txt of the same name beside it, one caption a line."""
    # A picture without its .txt is yielded too, so that it is counted as one without a caption.
    for image in pictures_in(path):
        text = image.with_suffix(".txt")
        captions = []
        if text.is_file():
            with fields_of(text):
                captions = text.read_text(encoding="utf-8").split("\n")
        yield {"image": str(image.relative_to(path)), "captions": captions}


def read_shards(path: Path, left_out: Counter) -> Iterator[dict]:
    """A folder of img2dataset's tar files (CC3M, CC12M), read where they stand."""
    shards = sorted(path.glob("*.tar"))
    for shard in tqdm(shards, desc="indexing", unit=" shards"):
        yield from read_shard(shard, left_out)


def read_shard(shard: Path, left_out: Counter) -> Iterator[dict]:
    """One tar file, where key.jpg, key.txt and key.json follow one another.

    Of a damaged one, what stands in front of the damage is used."""
    # Both are kept for one shard only, so a data set of any size can be read.
    part_of = {}  # key -> [offset, bytes] of its picture
    captions_of = {}  # key -> its captions
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                read_member(tar, member, part_of, captions_of, left_out)
            if not ends_here(tar):
                place = f"{shard.name} is damaged (or two in one) from byte {tar.offset} on"
                left_out[f"{place}; that was not read"] += 1
    except (tarfile.TarError, ValueError, OSError) as error:
        left_out[f"{shard.name} is damaged ({error}); what follows was not read"] += 1

    alone = captions_of.keys() - part_of.keys()
    if alone:
        left_out["captions without a picture"] += len(alone)
    for key, part in part_of.items():
        yield {"image": shard.name, "captions": captions_of.get(key, []), "part": part}


def read_member(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    part_of: dict,
    captions_of: dict,
    left_out: Counter,
) -> None:
    """Note one member of a shard in `part_of` or in `captions_of`."""
    # The key is what stands in front of the name's first dot; a folder's name may have dots too.
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    key = (folder, stem)
    ending = "." + ending.lower()
    if not member.isreg():  # a link could lead anywhere
        return
    if ending in PICTURE_ENDINGS:
        part_of[key] = [member.offset_data, member.size]
    elif ending in (".txt", ".json") and member.size < MEGABYTE:
        # Larger ones are no captions, and could fill the memory.
        text = tar.extractfile(member).read().decode("utf-8", "replace")
        try:
            caption = text if ending == ".txt" else caption_in(text)
        except (ValueError, AttributeError, RecursionError):
            left_out["a .json in a shard that is no JSON object"] += 1
            return
        captions_of.setdefault(key, []).append(caption)


def caption_in(text: str) -> str:
    """The caption in img2dataset's .json, "" where there is none."""
    return str(json.loads(text).get("caption") or "")


def ends_here(tar: tarfile.TarFile) -> bool:
    """Are there only zeros behind where Python's reader stopped?

    It stops at the end of an archive, but without a word also at a header that it cannot read."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(MEGABYTE)
    while block:
        if block.strip(b"\0"):
            return False
        block = tar.fileobj.read(MEGABYTE)
    return True
