"""Captions in img2dataset's tar shards (CC3M, CC12M), which are read where they stand.

    for record in read_shards(Path("cc3m"), LeftOut()):
        record["image"], record["captions"], record["part"]     # the shard; [offset, bytes] in it

A reader as in formats/captions.py. Nothing is unpacked, no link in a shard is followed.
"""

import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from formats.files import InputError, LeftOut, decoded, is_hidden
from formats.pictures import PICTURE_ENDINGS, files_in, is_picture
from formats.records import CAPTION_ENDINGS, CAPTION_KEYS

MEGABYTE = 2**20
COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


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
        stem, _, ending = member.name.removeprefix("./").rpartition(".")
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
    """Are there only zeros after the place where Python's reader stopped?

    It stops at the end of an archive, but without a word also at a header that it cannot read."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(MEGABYTE)
    while block:
        if block.strip(b"\0"):
            return False
        block = tar.fileobj.read(MEGABYTE)
    return True
