"""Keep a tenth of a file of captions back, to see afterwards what training was good for.

    python -m examples.hold_out captions.jsonl --images photos

writes captions.train.jsonl, captions.test.json (the short captions of the others, as `python
eval.py retrieval` reads them) and captions.tests.json, with which train.py prints the table before
and after: python train.py --data captions.train.jsonl --image_root photos --tests
captions.tests.json. Which pictures are held out depends on their names alone.
"""

import argparse
import hashlib
import json
from pathlib import Path

from data import CaptionDataset, Layout, TextTokenizer
from eval import TOY_MODEL
from formats.files import InputError, find_folder, write_whole
from runtime.options import positive
from runtime.terminal import errors_in_one_line


def hold_out(dataset: CaptionDataset, every: int) -> tuple[list[int], list[int]]:
    """The records that train, and those that test: one of `every`, and two at least.

    Those of one group go the same way: twins on both sides would make the test easy."""
    numbers = {}
    for index in range(len(dataset)):
        record = dataset.record(index)
        if "part" in record:
            raise InputError(f"{dataset.path}: pictures inside of shards cannot be tested on")
        key = record["group"] if record.get("group") is not None else record["image"]
        numbers[index] = hashlib.sha256(repr(key).encode("utf-8", "replace")).hexdigest()
    shuffled = sorted(numbers, key=lambda index: (numbers[index], index))
    border = max(2, len(dataset) // every)
    while 0 < border < len(shuffled) and (
        numbers[shuffled[border]] == numbers[shuffled[border - 1]]
    ):
        border += 1
    if border >= len(dataset):
        raise InputError(f"{dataset.path}: {len(dataset)} pictures are too few to hold some out")
    return sorted(shuffled[border:]), sorted(shuffled[:border])


def write(dataset: CaptionDataset, training: list[int], testing: list[int]) -> list[Path]:
    """The three files beside the source; each whole, or as it was."""
    items = []
    for index in testing:
        record = dataset.record(index)
        short, _ = dataset.captions(record)
        # Without short ones it stays in the test, as one more to be mistaken for another.
        items.append({"image": record["image"], "caption": short})
    if not any(item["caption"] for item in items):
        raise InputError(f"{dataset.path}: no short caption to test with")
    lines = [json.dumps(dataset.record(index)) + "\n" for index in training]
    train = dataset.path.with_suffix(".train.jsonl")
    test = dataset.path.with_suffix(".test.json")
    tests = dataset.path.with_suffix(".tests.json")
    settings = {"retrieval": {"file": test.name, "images": str(dataset.root.resolve())}}
    write_whole(train, "".join(lines))
    write_whole(test, json.dumps(items, indent=1) + "\n")
    write_whole(tests, json.dumps(settings, indent=1) + "\n")
    return [train, test, tests]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = "whose tokenizer tells short captions from long ones (the toy's)"
    parser.add_argument("data", type=Path, metavar="FILE", help="JSON lines as train.py reads them")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the pictures (beside the file)")
    parser.add_argument("--every", type=positive, default=10, metavar="N", help="one of N (10)")
    parser.add_argument("--model", default=TOY_MODEL, metavar="DIR", help=model)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        # No picture is read here, so any number of image tokens will do.
        layout = Layout(TextTokenizer(find_folder(args.model) or args.model), num_image_tokens=1)
        dataset = CaptionDataset(args.data, layout, processor=None, image_root=args.images)
        training, testing = hold_out(dataset, args.every)
        train, test, tests = write(dataset, training, testing)
        for reason, number in dataset.faults.items():
            print(f"{number:,} lines left out: {reason}")
        print(f"{len(training):,} pictures to train on, {len(testing):,} held out. Next:")
        root = f"--image_root {dataset.root}"
        print(f"  python train.py --data {train} {root} --tests {tests} --out runs/mine")
        print(f"  python eval.py retrieval {test} --images {dataset.root} --model runs/mine --both")


if __name__ == "__main__":
    main()
