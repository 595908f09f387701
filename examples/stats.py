"""What training makes of a file of captions: how many there are of which length, what is left out.

    python -m examples.stats train.jsonl --model llava-1.5-7b-hf --images coco

Lengths are counted in tokens of the model's own tokenizer; no weights are read.
"""

import argparse
import bisect
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import backbones
from data import LONG, LONGEST, CaptionDataset, Layout, TextTokenizer, captions_of
from eval import TOY_MODEL
from formats.files import InputError, find_folder, inside
from runtime.terminal import print_any_text

EDGES = [0, 10, 20, LONG, 60, 120, 250, LONGEST]  # where the bars begin, in tokens
WIDTH = 40  # characters of the longest bar


def is_there(dataset: CaptionDataset, image: str) -> bool:
    try:
        return inside(dataset.root, image).is_file()
    except InputError:
        return False


def kinds_of(dataset: CaptionDataset, record: dict) -> str:
    """Which kinds of captions a record has, as training will see them."""
    short, long = dataset.captions(record)
    if short and long:
        return "short and long"
    if short:
        return "short"
    return "long" if long else "no"


def use_of(low: int) -> str:
    """What training does with captions from `low` tokens on, up to the next edge."""
    if low < LONG:
        return "contrastive"
    if low < LONGEST:
        return "autoregressive"
    return "cut at a sentence"


def stats(dataset: CaptionDataset) -> None:
    """Count, then print."""
    captions_from = Counter()  # by the edge that their length has reached
    records_with = Counter()  # by the kinds of their captions
    missing = 0
    for index in tqdm(range(len(dataset)), desc="counting", leave=False):
        record = dataset.record(index)
        records_with[kinds_of(dataset, record)] += 1
        if not is_there(dataset, record["image"]):
            missing += 1
        for text in captions_of(record):
            # Of the whole caption: dataset.captions has cut the longest ones already.
            length = len(dataset.layout.tokenizer.encode(text.strip()))
            edge = EDGES[bisect.bisect(EDGES, length) - 1]
            captions_from[edge] += 1

    parts = [f"{count:,} with {kinds} captions" for kinds, count in records_with.items()]
    print(f"{len(dataset):,} pictures: {', '.join(parts)}")
    most = max(captions_from.values())
    for edge in EDGES:
        count = captions_from[edge]
        bar = "#" * round(WIDTH * count / most)
        print(f"{edge:>4} tokens and more {count:>10,} {bar} {use_of(edge)}")
    if missing:
        print(f"{missing:,} pictures are not in {dataset.root} (--images), training skips them")
    for reason, count in dataset.faults.items():
        print(f"{count:,} lines left out: {reason}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="JSON lines as train.py reads them")
    parser.add_argument("--model", default=TOY_MODEL, help="whose tokenizer counts (the toy's)")
    parser.add_argument("--images", type=Path, help="where the pictures are (beside the data)")
    args = parser.parse_args(arguments)
    print_any_text()
    try:
        # Nothing is laid out and no picture is read here, so any number of image tokens will do.
        folder = find_folder(args.model) or args.model
        template = backbones.family_of(folder).template
        layout = Layout(TextTokenizer(folder), num_image_tokens=1, template=template)
        dataset = CaptionDataset(args.data, layout, processor=None, image_root=args.images)
        stats(dataset)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
