"""Other people's training files into the JSON lines of data.py, and a look at such lines.

    python data.py convert SOURCE train.jsonl --images DIR
    python data.py stats train.jsonl --model llava-1.5-7b-hf

SOURCE is LLaVA's or ShareGPT4V's .json; COCO's, nocaps' or Karpathy's .json; Localized Narratives' .jsonl; a .csv or
.tsv with the columns image and caption; a folder of pictures with .txt files; or a folder of img2dataset's .tar shards,
which are never unpacked: each line says where in its shard the picture stands. Captions are routed by their length when
they are read for training. What cannot be used is counted by its reason.

A reader yields (image, captions) or (image, captions, part of a file), or the reason why there is none.
"""

import argparse
import bisect
import csv
import json
import math
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from data import (
    LONG,
    LONGEST,
    CaptionDataset,
    DataError,
    Layout,
    TextTokenizer,
    fields_of,
    inside,
    pictures_in,
    read_json,
)


def read_conversations(path: Path):
    """LLaVA's blip_laion_cc_sbu_558k.json and ShareGPT4V's files: the answer is the caption."""
    for item in read_json(path, list):
        turns = item.get("conversations") if isinstance(item, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            yield "no conversation"
        elif not isinstance(item.get("image"), str):
            yield "no image"
        elif [turn.get("from") for turn in turns] != ["human", "gpt"] or not isinstance(turns[1].get("value"), str):
            yield "not one question and one answer"
        else:
            yield item["image"], [turns[1]["value"]]


def read_coco(path: Path):
    """COCO's and nocaps' captions: images, and annotations in any order. Or Karpathy's JSON: its training splits."""
    content, captions = read_json(path), {}
    for annotation in content.get("annotations", []):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    listed = {image.get("id") for image in content["images"]}
    yield from ("captions of a picture that is not listed" for key in captions.keys() - listed)
    for image in content["images"]:
        if "file_name" in image:
            yield image["file_name"], captions.get(image["id"], [])
        elif image["split"] in ("train", "restval"):
            yield str(Path(image.get("filepath", ""), image["filename"])), [each["raw"] for each in image["sentences"]]
        else:
            yield "of a split for tests"


def read_narratives(path: Path):
    """Localized Narratives, one JSON object a line. COCO's pictures have numbers of 12 digits."""
    with open(path, encoding="utf-8") as file:
        for item in map(json.loads, filter(str.strip, file)):
            name = str(item["image_id"])
            yield f"{name.zfill(12) if 'coco' in item['dataset_id'] else name}.jpg", [item["caption"]]


def read_table(path: Path):
    """CSV or TSV with a header: a column "image", and one or several whose names begin with "caption"."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        columns = [name for name in rows.fieldnames or [] if name.startswith("caption")]
        if "image" not in (rows.fieldnames or []) or not columns:
            raise DataError(f"{path}: the first line must name a column image and a column caption")
        try:
            for row in rows:
                yield row["image"] or "", [row[name] or "" for name in columns]
        except csv.Error as error:  # with `strict`: a quote that never ends would swallow the rows behind it
            raise DataError(f"{path}, behind line {rows.line_num}: {error}; see to the quotes") from None


def read_folder(path: Path):
    """Pictures, each with a .txt of the same name beside it, one caption a line."""
    for image in pictures_in(path):
        text = image.with_suffix(".txt")
        with fields_of(text):
            captions = text.read_text(encoding="utf-8").split("\n") if text.is_file() else []
        yield str(image.relative_to(path)), captions


def read_shards(path: Path):
    """A folder of img2dataset's tar files (CC3M, CC12M), where key.jpg, key.txt and key.json follow one another. The
    pictures stay where they are; the records say from which byte on."""
    for shard in tqdm(sorted(path.glob("*.tar")), desc="indexing", unit=" shards"):
        parts, captions = {}, {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    key, kind = (folder, stem), kind.lower()
                    if kind in ("jpg", "jpeg", "png", "webp", "gif", "bmp") and member.isreg():
                        parts[key] = [member.offset_data, member.size]
                    elif kind in ("txt", "json") and member.isreg() and member.size < 2**20:
                        text = tar.extractfile(member).read().decode("utf-8", "replace")
                        try:
                            caption = text if kind == "txt" else str(json.loads(text).get("caption") or "")
                        except (ValueError, AttributeError, RecursionError):
                            yield "a .json in a shard that is no JSON object"
                            continue
                        captions.setdefault(key, []).append(caption)
                tar.fileobj.seek(tar.offset)  # where Python's reader stopped: at the end, or at what it cannot read
                if any(block.strip(b"\0") for block in iter(partial(tar.fileobj.read, 2**20), b"")):  # zeros: the end
                    yield f"{shard.name} is damaged (or two in one) from byte {tar.offset} on; that was not read"
        except (tarfile.TarError, ValueError, OSError) as error:
            yield f"{shard.name} is damaged ({error}); what follows was not read"
        yield from ("captions without a picture" for key in captions.keys() - parts.keys())
        yield from ((shard.name, captions.get(key, []), part) for key, part in parts.items())


def reader_of(path: Path) -> Callable:
    """What kind of source this is, by what is in it."""
    if path.is_dir():
        return read_shards if any(path.glob("*.tar")) else read_folder
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix not in (".json", ".jsonl", ".csv", ".tsv"):
        raise DataError(f"{path}: not a .json, .jsonl, .csv or .tsv file; of .tar shards give the folder")
    if path.suffix == ".json":
        return read_conversations if isinstance(read_json(path, (dict, list)), list) else read_coco
    return read_table if path.suffix in (".csv", ".tsv") else read_narratives


def convert(source: Path, out: Path, image_root: Path) -> Counter:
    """Write `source` as our JSON lines, one a picture. Returns how many, and how many others for which reason."""
    temporary = out.with_name(out.name + ".tmp")
    try:
        with fields_of(source), open(temporary, "w", encoding="utf-8") as file:
            counts = write_records(source, file, image_root)
        if not counts["written"]:
            raise DataError(f"{source}: no usable record ({dict(counts)})")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def write_records(source: Path, file: TextIO, image_root: Path) -> Counter:
    records, counts = {}, Counter(written=0)

    def write(record: dict) -> None:
        file.write(json.dumps(record) + "\n")
        counts["written"] += 1

    for found in reader_of(source)(source):
        if isinstance(found, str):
            counts[found] += 1
            continue
        image, captions, *part = found
        captions = list(dict.fromkeys(text.strip() for text in captions if text.strip()))
        try:
            is_there = inside(image_root, image).is_file()
        except DataError:
            counts["a path that leaves the image root"] += 1
            continue
        if not captions or not is_there:
            counts["no caption" if is_there else "no such picture"] += 1
        elif part:  # a shard names a picture once: written at once, millions of them need no memory
            write({"image": image, "captions": captions, "part": part[0]})
        elif image in records:
            counts["joined to an earlier line of the same picture"] += 1
            records[image] = list(dict.fromkeys(records[image] + captions))
        else:
            records[image] = captions
    for image, captions in records.items():
        write({"image": image, "captions": captions})
    return counts


def stats(dataset: CaptionDataset) -> None:
    """Print how many captions there are of which length, and what training will do with them."""
    edges, lengths, kinds, missing = (0, 10, 20, LONG, 60, 120, 250, LONGEST), Counter(), Counter(), 0
    for index in tqdm(range(len(dataset)), desc="counting", leave=False):
        record = dataset.record(index)
        try:
            missing += not inside(dataset.root, record["image"]).is_file()
        except DataError:
            missing += 1
        for text in record["short"] + record["long"] + record["captions"]:
            lengths[bisect.bisect(edges, len(dataset.layout.tokenizer.encode(text.strip())))] += 1
        has = ["short" if kind == 0 else "long" for kind, found in enumerate(dataset.captions(record)) if found]
        kinds[" and ".join(has) or "no"] += 1
    print(
        f"{len(dataset):,} pictures: " + ", ".join(f"{count:,} with {kind} captions" for kind, count in kinds.items())
    )
    for place, (low, high) in enumerate(zip(edges, (*edges[1:], math.inf)), 1):
        bar = "#" * round(40 * lengths[place] / max(lengths.values()))
        note = " contrastive" if high <= LONG else " autoregressive" if high <= LONGEST else " cut at a sentence"
        print(f"{low:>4} tokens and more {lengths[place]:>10,} {bar}{note}")
    if missing:
        print(f"{missing:,} pictures are not in {dataset.root} (--images), training skips them")
    for reason, count in dataset.faults.items():
        print(f"{count:,} lines left out: {reason}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("convert", help="write the JSON lines that train.py reads")
    command.add_argument("source", type=Path, help="a file or a folder, see above")
    command.add_argument("out", type=Path, help="the file to write")
    command.add_argument("--images", type=Path, help="where the pictures are (beside the source, or in it)")
    command = commands.add_parser("stats", help="how many captions of which length, and what becomes of them")
    command.add_argument("data", type=Path, help="JSON lines as train.py reads them")
    command.add_argument("--images", type=Path, help="where the pictures are (beside the data)")
    command.add_argument("--model", default="toy/tiny-llava", help="whose tokenizer counts (toy/tiny-llava)")
    args = parser.parse_args(arguments)
    try:
        if args.command == "stats":
            stats(CaptionDataset(args.data, Layout(TextTokenizer(args.model), 1), None, args.images))
        else:
            images = args.images or (args.source if args.source.is_dir() else args.source.parent)
            print("\n".join(f"{n:,} {what}" for what, n in convert(args.source, args.out, images).items()))
            print(f"Train with --data {args.out} --image_root {images}")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
