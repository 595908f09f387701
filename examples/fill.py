"""Give training data the long captions that it lacks: by this model, for pictures without one.

    python -m examples.fill captions.jsonl --images photos --model llava-1.5-7b-hf

writes captions.filled.jsonl. Lines that have a long caption stay as they are; the others get one,
and "long_by" says by which model. Interrupted, it goes on where it stopped.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data import LONG, CaptionDataset, open_image
from eval import DESCRIBE, TOY_MODEL, Embedder, caption, open_embedder
from formats.files import InputError, inside
from runtime.options import add_answer_options, add_model_options
from runtime.terminal import errors_in_one_line


def fill(embedder: Embedder, source: Path, args: argparse.Namespace) -> None:
    """Write the file, a batch of lines at a time, and print how many lines got what."""
    out = source.with_suffix(".filled.jsonl")
    dataset = CaptionDataset(source, embedder.layout, None, args.images)
    counts = Counter()
    for reason, count in dataset.faults.items():
        counts[f"lines left out: {reason}"] = count
    done = lines_done(out, dataset)
    with open(out, "ab") as file:
        file.truncate(sum(len(line) for line in done))
        starts = range(len(done), len(dataset), args.batch)
        for start in tqdm(starts, desc="filling", unit=" batches"):
            stop = min(start + args.batch, len(dataset))
            records = [dataset.record(index) for index in range(start, stop)]
            fill_batch(embedder, records, dataset, args, counts, is_first=start == 0)
            write_lines(file, records)
    for what, count in counts.items():
        print(f"{count:>10,} {what}")
    print(f"written: {out}")


def lines_done(out: Path, dataset: CaptionDataset) -> list[bytes]:
    """The whole lines of a file that was begun, none if there is no file.

    Raises InputError where they are not the beginning of this very data."""
    if not out.exists():
        return []
    lines = out.read_bytes().splitlines(keepends=True)
    lines = [line for line in lines if line.endswith(b"\n")]  # the last one may be torn
    try:
        for index, line in enumerate(lines):
            if as_given(json.loads(line)) != as_given(dataset.record(index)):
                raise ValueError
    # Another line, no JSON, no object, more lines than there are records.
    except (ValueError, AttributeError, IndexError):
        source = dataset.path
        raise InputError(f"{out}: does not begin as {source} does; move it away") from None
    return lines


def as_given(record: dict) -> dict:
    """A record without what filling changes."""
    return {key: value for key, value in record.items() if key not in ("long", "long_by")}


def fill_batch(
    embedder: Embedder,
    records: list[dict],
    dataset: CaptionDataset,
    args: argparse.Namespace,
    counts: Counter,
    is_first: bool,
) -> None:
    """Caption the records that lack a long caption, in place; count what was done with each.

    Raises InputError where not one picture of the first batch is there: the folder is wrong."""
    wanting = []
    pictures = []
    unreadable = []
    for record in records:
        short, long = dataset.captions(record)
        if long:
            counts["had a long caption"] += 1
            continue
        try:
            path = inside(dataset.root, record["image"])
            pictures.append(open_image(path, record.get("part")))
            wanting.append(record)
        except InputError as error:
            counts[f"left as it was: {error}"] += 1
            unreadable.append(error)
    if is_first and len(unreadable) == len(records):
        advice = f"no picture is there ({unreadable[0]}); give --images DIR"
        raise InputError(f"{dataset.path}: {advice}")
    if not pictures:
        return
    answers = caption(embedder, pictures, args.question, args.max_new_tokens, args.temperature)
    for record, answer in zip(wanting, answers):
        # A shorter one would be trained on as a short caption: it must not pass for a description.
        if len(embedder.tokenizer.encode(answer)) < LONG:
            counts[f"left as it was: the answer is shorter than {LONG} tokens"] += 1
            continue
        record["long"] = [*record["long"], answer]
        record["long_by"] = str(args.model)
        counts["filled"] += 1


def write_lines(file: BinaryIO, records: list[dict]) -> None:
    for record in records:
        file.write(json.dumps(record).encode() + b"\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = "training data, JSON lines as train.py reads them"
    images = "folder of the pictures (beside the file)"
    parser.add_argument("source", type=Path, metavar="FILE", help=source)
    parser.add_argument("--images", type=Path, metavar="DIR", help=images)
    add_answer_options(parser, DESCRIBE)
    add_model_options(parser, TOY_MODEL)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        fill(open_embedder(args), args.source, args)


if __name__ == "__main__":
    main()
