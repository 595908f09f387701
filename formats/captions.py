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

import ast
import csv
import json
import math
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TextIO

from tqdm import tqdm

from formats.files import (
    InputError,
    LeftOut,
    allowed_roots,
    as_on_disk,
    decoded,
    fields_of,
    inside,
    is_hidden,
    open_text,
    read_json,
    what_it_may_be,
)

PICTURE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
# Pictures too, that data.py does not open.
OTHER_PICTURES = (".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd")
CAPTION_ENDINGS = (".txt", ".caption")
COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
MEGABYTE = 2**20

# Under which names people's files have a picture's path, and its captions.
PICTURE_KEYS = (
    *("image", "images", "file_name", "filename", "image_file", "image_path", "image_name"),
    *("filepath", "file_path", "file", "path", "img"),
)
CAPTION_KEYS = ("caption", "captions", "short", "long")
# Where there is none of those, the first of these.
OTHER_CAPTION_KEYS = ("text", "description", "caption_str", "comment", "sentences", "title")

# What programs write where there is no caption.
PLACEHOLDERS = {"nan", "-nan", "none", "null", "nil", "n/a", "#n/a", "na", "<na>", "undefined"}


# ---- Folders


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
    for name, folders, files in os.walk(root, followlinks=True):
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


# ---- What is a caption, and what is none

BLANK = "captions that are blank or null"
PLACEHOLDER = "captions that are placeholders, such as nan or None"
NO_TEXT = "captions that are no text"
SAID_BEFORE = "captions that the picture has already"


class Captions:
    """The captions of a record, and how many others were left out of it, by the reason."""

    def __init__(self):
        self.captions: list[str] = []
        self.others = Counter()

    @property
    def fault(self) -> str:
        """Why there is none."""
        if PLACEHOLDER in self.others:
            return "no caption but a placeholder, such as nan or None"
        if NO_TEXT in self.others:
            return "no caption that is text"
        return "no caption"

    def count(self, left_out: LeftOut, image: str) -> None:
        for reason, number in self.others.items():
            left_out.add(reason, image, number)


def clean(values) -> Captions:
    """A file's captions, whatever they are -> those that are captions, stripped, each once."""
    kept = Captions()
    for value in leaves(values):
        fault = fault_of_caption(value)
        if fault:
            kept.others[fault] += 1
        elif stripped(value) in kept.captions:
            kept.others[SAID_BEFORE] += 1
        else:
            kept.captions.append(stripped(value))
    return kept


def stripped(text: str) -> str:
    """Without white space around it, and without the marks of files that were put together."""
    return text.strip().strip("\ufeff").strip()


def leaves(value) -> Iterator:
    """What stands in lists inside of lists; a text that is a list is one too."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str) and LIST_AS_TEXT.fullmatch(value):
        # What is quoted in there is a text, whatever it looks like.
        items = LIST_ITEM.findall(value)
        yield from (unquoted(item) for item in items)
        if not items:
            yield value
    else:
        yield value


# What Python, JSON or NumPy, which puts no commas between, print of a list: ['one', "two"], [nan]
LIST_ITEM = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|None|null|nan""")
LIST_AS_TEXT = re.compile(
    rf"\s*[\[(]\s*(?:(?:{LIST_ITEM.pattern})(?:[,\s]+(?:{LIST_ITEM.pattern}))*)?,?\s*[\])]\s*"
)


def unquoted(item: str) -> str | None:
    try:
        return ast.literal_eval(item)
    except (ValueError, SyntaxError):  # null, nan, and escapes that Python does not know
        return item[1:-1] if item[0] in "'\"" else None


def fault_of_caption(value) -> str | None:
    """Why something is no caption, or None."""
    if value is None:
        return BLANK
    if isinstance(value, float) and math.isnan(value):
        return PLACEHOLDER
    if not isinstance(value, str):
        return NO_TEXT
    if not stripped(value):
        return BLANK
    if stripped(value).lower() in PLACEHOLDERS or LIST_AS_TEXT.fullmatch(value):
        return PLACEHOLDER
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


def is_for_training(split) -> bool:
    if not isinstance(split, str):
        return True
    return split.lower().startswith("train") or split.lower() == "restval"


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


# ---- The readers: tables

CAPTION_COLUMN = re.compile(r"captions?([ ._-]?\d+)?|caption[ _-](short|long|text|raw)|short|long")


def read_table(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """CSV or TSV: a column of pictures, such as "image", and columns of captions.

    Raises InputError, with the line, where cells do not fit their columns."""
    # newline="": a line break inside of quotes belongs to its caption.
    with open_text(path, newline="") as file:
        header = file.readline()
        delimiter = delimiter_of(path, header)
        lines = KeptLines(header, file)
        csv.field_size_limit(16 * MEGABYTE)
        # strict: else a quote that never ends swallows the rows behind it without a word.
        rows = csv.reader(
            lines, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t"
        )
        begins = 0
        try:
            names = [name.strip().lower() for name in next(rows, [])]
            picture, captions = columns_of(path, names, left_out)
            split = names.index("split") if "split" in names else None
            begins = rows.line_num
            for row in rows:
                place = f"{path}, line {begins + 1}"
                begins = rows.line_num
                if not any(cell.strip() for cell in row):
                    continue
                check_row(row, names, delimiter, place)
                row += [""] * (len(names) - len(row))  # a row that is too short
                if split is not None and row[split] and not is_for_training(row[split]):
                    left_out.add("of a split for tests", place)
                    continue
                # An empty cell is no caption, of which there may be fewer than columns.
                yield {
                    "image": row[picture].strip(),
                    "captions": [row[index] for index in captions if row[index].strip()],
                }
        except csv.Error as error:
            place = f"{path}, behind line {begins}"
            raise InputError(f"{place}: {error}; {QUOTES}") from None


QUOTES = "see to the quotes: a cell that begins with one must end with one, and others are doubled"


class KeptLines:
    """The first line, then the others of a file; some files end lines with a bare \\r."""

    def __init__(self, first: str, file: TextIO):
        self.first = first
        self.file = file

    def __iter__(self) -> Iterator[str]:
        yield self.first
        yield from self.file


def delimiter_of(path: Path, header: str) -> str:
    """What stands between the names of the columns, whatever the file's ending says."""
    by_ending = "\t" if path.suffix.lower() == ".tsv" else ","
    candidates = [by_ending, "\t", ",", ";", "|"]
    for delimiter in candidates:
        names = [name.strip().strip('"').lower() for name in header.split(delimiter)]
        if any(name in PICTURE_KEYS for name in names) and len(names) > 1:
            return delimiter
    return by_ending


def columns_of(path: Path, names: list[str], left_out: LeftOut) -> tuple[int, list[int]]:
    """The places of the column of pictures and of those of captions. Raises InputError."""
    pictures = [index for index, name in enumerate(names) if name in PICTURE_KEYS]
    captions = [index for index, name in enumerate(names) if CAPTION_COLUMN.fullmatch(name)]
    if not captions:
        captions = [index for index, name in enumerate(names) if name in OTHER_CAPTION_KEYS][:1]
    # "image" before "path", where a table has both.
    pictures.sort(key=lambda index: PICTURE_KEYS.index(names[index]))
    if not pictures or not captions:
        advice = "the first line must name a column image and a column caption"
        raise InputError(f"{path}: {advice}; it is {names[:6]}")
    if names.count(names[pictures[0]]) > 1:
        raise InputError(f"{path}: two columns are named {names[pictures[0]]}; rename one")
    for index, name in enumerate(names):
        # Such as caption_id and caption_lang. What is a caption, the user may know better.
        if name.startswith("caption") and index not in captions:
            left_out.add("column named like captions and not read; caption_1 would be", name)
    return pictures[0], captions


def check_row(row: list[str], names: list[str], delimiter: str, place: str) -> None:
    """Raise InputError for a row that holds more than its columns, or another row."""
    surplus = row[len(names) :]
    if any(cell.strip() for cell in surplus):
        found = f"{len(row)} cells for {len(names)} columns"
        raise InputError(f"{place}: {found}; put captions that hold {delimiter!r} into quotes")
    for cell in row:
        if "\n" in cell and holds_a_row(cell, delimiter, len(names)):
            raise InputError(f"{place}: a cell between quotes holds whole rows; {QUOTES}")


def holds_a_row(cell: str, delimiter: str, columns: int) -> bool:
    """Has a cell of several lines swallowed what were rows?"""
    for line in cell.splitlines():
        if any(is_picture(part.strip()) for part in line.split(delimiter)):
            return True
    # Tabs hardly stand in captions. As many as rows would have are rows.
    breaks = cell.count("\n")
    return delimiter == "\t" and columns > 1 and cell.count("\t") >= breaks * (columns - 1)


# ---- The readers: folders and shards


def read_folder(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """Pictures, each with a .txt of the same name beside it, one caption a line."""
    pictures = []
    texts = {}  # by their name in lower case: 0.TXT belongs to 0.jpg
    for file in files_in(path, left_out):
        ending = file.suffix.lower()
        if ending in PICTURE_ENDINGS:
            pictures.append(file)
        elif ending in CAPTION_ENDINGS:
            texts[str(file).lower()] = file
        elif file.name.lower().endswith(COMPRESSED_TARS):
            left_out.add("compressed shards, which are not read: unpack them with gunzip", file)
        else:
            count_other_picture(file, left_out)

    used = set()
    for image in sorted(pictures):
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


def shards_in(folder: Path, left_out: LeftOut) -> list[Path]:
    return sorted(path for path in files_in(folder, left_out) if path.suffix.lower() == ".tar")


def read_shards(path: Path, left_out: LeftOut) -> Iterator[dict]:
    """A folder of img2dataset's tar files (CC3M, CC12M), read where they stand."""
    shards = []
    for file in sorted(files_in(path, left_out)):
        if file.suffix.lower() == ".tar":
            shards.append(file)
        elif file.name.lower().endswith(COMPRESSED_TARS):
            left_out.add("compressed shards, which are not read: unpack them with gunzip", file)
        elif is_picture(file.name):
            left_out.add("pictures beside the shards, which are not read", file)
    for shard in tqdm(shards, desc="indexing", unit=" shards"):
        name = shard.relative_to(path).as_posix()
        yield from read_shard(shard, name, left_out)


COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def compression_of(path: Path) -> str | None:
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, name in COMPRESSION.items():
        if head.startswith(magic):
            return name
    return None


def read_shard(shard: Path, name: str, left_out: LeftOut) -> Iterator[dict]:
    """One tar file, where key.jpg, key.txt and key.json follow one another.

    Of a damaged one, what stands in front of the damage is used."""
    compression = compression_of(shard)
    if compression:  # a picture in it has no place in the file
        left_out.add(f"compressed shards ({compression}), which are not read: unpack them", name)
        return
    # Kept for one shard only, so a data set of any size can be read.
    members = ShardMembers()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                members.read(tar, member, left_out, name)
            if not ends_here(tar):
                place = f"{name} is damaged (or two in one) from byte {tar.offset} on"
                left_out[f"{place}; that was not read"] += 1
    except (tarfile.TarError, ValueError, OSError) as error:
        left_out[f"{name} is damaged ({error}); what follows was not read"] += 1
    for part, captions in members.samples(left_out, name):
        yield {"image": name, "captions": captions, "part": part}


class ShardMembers:
    """The pictures and texts of one shard, and which belong together.

    000.jpg belongs to 000.txt and 000.json. What has no partner of just its name may have one whose
    name is the same up to the first dot, 000.image.jpg to 000.caption.txt, if that is clear."""

    def __init__(self):
        self.pictures = defaultdict(list)  # name without ending -> [offset, bytes] of each
        self.texts = defaultdict(list)  # name without ending -> text of each .txt
        self.metadata = defaultdict(list)  # name without ending -> captions of each .json

    def read(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, left_out: LeftOut, shard: str
    ) -> None:
        """Note one member, or count it."""
        place = f"{shard}: {member.name}"
        stem, _, ending = member.name.rpartition(".")
        ending = "." + ending.lower()
        if member.isdir():
            return
        parts = [part for part in member.name.split("/") if part not in (".", "..")]
        if any(is_hidden(part) for part in parts):
            left_out.add("members that are hidden copies", place)
        elif not member.isreg():  # a link could lead anywhere
            left_out.add("members that are no files but links", place)
        elif ending in PICTURE_ENDINGS:
            self.pictures[stem].append([member.offset_data, member.size])
        elif ending not in (*CAPTION_ENDINGS, ".json"):
            name = member.name.rpartition("/")[2]
            kind = f"ending in {ending}" if "." in name else "without an ending"
            left_out.add(f"members {kind}, which are not read", place)
        elif member.size >= MEGABYTE:
            # No captions, and they could fill the memory.
            left_out.add("members that are texts of more than a megabyte", place)
        else:
            self.read_text(stem, ending, tar.extractfile(member).read(), left_out, place)

    def read_text(
        self, stem: str, ending: str, content: bytes, left_out: LeftOut, place: str
    ) -> None:
        try:
            text = decoded(content, place)
            if ending == ".json":
                self.metadata[stem].append(captions_of_metadata(json.loads(text)))
            else:
                self.texts[stem].append(text)
        except InputError:
            left_out.add("members that are texts and not UTF-8, perhaps Windows' cp1252", place)
        except (ValueError, AttributeError, RecursionError):
            left_out.add("a .json in a shard that is no JSON object", place)

    def samples(self, left_out: LeftOut, shard: str) -> Iterator[tuple[list[int], list]]:
        """([offset, bytes], captions) of every picture, in the order of the shard."""
        captions_of = {}
        for stem in self.pictures:
            # Where there are two pictures, which of them the text describes is not said.
            if len(self.pictures[stem]) == 1 and self.has_text(stem):
                captions_of[stem] = self.take(stem)
        for key in self.join_by_key():
            picture, words, fields = key
            captions_of[picture] = self.take(words) + self.take(fields)

        for stem, parts in self.pictures.items():
            if len(parts) > 1:
                place = f"{shard}: {stem}"
                left_out.add("members that are several pictures of one name", place, len(parts))
                continue
            yield parts[0], captions_of.get(stem, [])
        alone = "captions without a picture"
        for stem in self.texts.keys() | self.metadata.keys():
            number = len(self.texts.get(stem, [])) + len(self.metadata.get(stem, []))
            # A picture of two, which was counted, may have metadata without a caption.
            if self.has_text(stem) or stem not in self.pictures:
                left_out.add(alone, f"{shard}: {stem}", number)

    def has_text(self, stem: str) -> bool:
        return stem in self.texts or any(self.metadata.get(stem, []))

    def take(self, stem: str | None) -> list:
        """The captions under a name, which are not there any more afterwards."""
        captions = list(self.texts.pop(stem, []))
        for each in self.metadata.pop(stem, []):
            # img2dataset writes the same words into both files.
            captions += [caption for caption in each if caption not in captions]
        return captions

    def join_by_key(self) -> list[tuple[str, str, str | None]]:
        """(picture, text, metadata) whose names are the same up to the first dot, and which are the
        only ones of their kind under that name."""
        pictures = by_key(stem for stem in self.pictures if not self.has_text(stem))
        whole = {stem for stem in self.pictures if self.has_text(stem)}
        texts = by_key(stem for stem in self.texts if stem not in whole)
        metadata = by_key(
            stem for stem in self.metadata if stem not in whole and any(self.metadata[stem])
        )
        joined = []
        for key, stems in pictures.items():
            words = texts.get(key, [])
            fields = metadata.get(key, [])
            if len(stems) > 1 or len(self.pictures[stems[0]]) > 1 or len(words) + len(fields) == 0:
                continue
            if len(words) <= 1 and len(fields) <= 1:
                first, second = [*words, *fields, None][:2]
                joined.append((stems[0], first, second))
        return joined


def by_key(stems: Iterator[str]) -> dict[str, list[str]]:
    """Names by what stands in front of their first dot; a folder's name may have dots too."""
    groups = defaultdict(list)
    for stem in stems:
        folder, _, name = stem.rpartition("/")
        groups[f"{folder}/{name.partition('.')[0]}"].append(stem)
    return groups


def captions_of_metadata(fields: dict) -> list:
    """The captions in img2dataset's .json, none where there are none.

    Raises AttributeError for what is no object."""
    for key in (*CAPTION_KEYS, "text"):
        value = fields.get(key)
        if value is not None:
            return value if isinstance(value, list) else [value]
    return []


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
