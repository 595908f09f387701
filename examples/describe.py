"""From a bare folder of pictures to training data: the model itself writes the captions.

    python -m examples.describe photos captions.jsonl --model llava-1.5-7b-hf
    python -m examples.describe photos captions.jsonl --model llava-1.5-7b-hf --all

The first command describes a dozen pictures and draws captions.look.png: look at it before the
rest is paid for. The second describes the rest. Each picture gets a long caption and two short ones
(the second is sampled); of copies of one picture, one is described. Lines are written as they come:
interrupted, it goes on where it stopped. Next: python -m examples.hold_out captions.jsonl
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data import LONG, open_image
from eval import DESCRIBE, TOY_MODEL, Embedder, caption, open_embedder
from formats.files import InputError, LeftOut, tell, without_surrogates
from formats.pictures import pictures_in
from runtime.embeddings import digest_of_file
from runtime.gallery import gallery
from runtime.options import add_model_options, check_parent, positive
from runtime.terminal import errors_in_one_line

BRIEFLY = "Describe the image briefly."
LOOK = 12  # pictures that are described before anyone has looked
WARMTH = 0.7  # temperature of the second short caption: other words for the same picture


def describe(embedder: Embedder, args: argparse.Namespace) -> None:
    """Write the lines that are missing, of the first dozen pictures or of all."""
    left_out = LeftOut()
    digests = distinct_pictures(args.images, left_out)
    names = list(digests)
    lines = lines_done(args.out, Path(args.model).name)
    check_pictures(lines, digests, args.out)
    done = {record["image"] for record in lines}
    wanted = names if args.all else names[:LOOK]
    missing = [name for name in wanted if name not in done]
    print(f"{args.images}: {len(names):,} pictures, {len(done):,} described, now {len(missing):,}")

    with open(args.out, "ab") as file:
        # A line that was torn when the program was stopped is written again.
        file.truncate(sum(len(encoded(record)) for record in lines))
        for start in tqdm(range(0, len(missing), args.batch), desc="describing", unit=" batches"):
            some = missing[start : start + args.batch]
            for record in records_of(embedder, some, args, left_out):
                record["sha256"] = digests[record["image"]]
                file.write(encoded(record))
                lines.append(record)
            file.flush()
    tell(args.images, left_out)
    if not args.all:
        look(lines[:LOOK], args)
    if len(wanted) < len(names):
        print("Where these captions are good, the same command with --all describes the rest.")
    else:
        print(f"{len(lines):,} lines in {args.out}. Next:")
        print(f"  python -m examples.hold_out {args.out} --images {args.images}")


def distinct_pictures(folder: Path, left_out: LeftOut) -> dict[str, str]:
    """The pictures below a folder, by name, with their digests; of copies the first only.

    A copy would be a picture's negative in the contrastive loss, with the same captions.
    Raises InputError where there is none."""
    first_of = {}
    for path in tqdm(pictures_in(folder, left_out), desc="looking", delay=2, leave=False):
        digest = digest_of_file(path)
        if digest in first_of:
            left_out.add("copies of other pictures", path)
        else:
            first_of[digest] = path.relative_to(folder).as_posix()
    if not first_of:
        raise InputError(f"{folder}: there is no picture in this folder")
    return {name: digest for digest, name in first_of.items()}


def check_pictures(lines: list[dict], digests: dict[str, str], out: Path) -> None:
    """Raise InputError where a picture is another one than was described under its name."""
    for number, record in enumerate(lines, start=1):
        name = record["image"]
        if name not in digests:
            found = f"{name} is gone, or a copy of another picture"
        elif record.get("sha256") != digests[name]:
            found = f"{name} is another picture now"
        else:
            continue
        raise InputError(f"{out}, line {number}: {found}; delete this line")


def encoded(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"


def lines_done(out: Path, model: str) -> list[dict]:
    """The whole lines of a file that was begun, none if there is no file.

    Raises InputError where another program or another model wrote them."""
    if not out.exists():
        return []
    records = []
    for line in out.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):  # torn
            break
        try:
            record = json.loads(line)
            is_ours = encoded(record) == line and record["by"] == model
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            found = f"line {len(records) + 1} is not one that {model} wrote here"
            raise InputError(f"{out}: {found}; choose another file, or move this one away")
        records.append(record)
    return records


def records_of(
    embedder: Embedder, names: list[str], args: argparse.Namespace, left_out: LeftOut
) -> Iterator[dict]:
    """The lines of a few pictures; what cannot be read, or gets no caption, is counted."""
    pictures = {}
    for name in names:
        try:
            pictures[name] = open_image(args.images / name)
        except InputError as error:
            reason = str(error).partition(": ")[2]
            left_out.add(f"pictures that cannot be read: {reason}", name)
    if not pictures:
        return
    images = list(pictures.values())
    torch.manual_seed(args.seed)  # of the sampled caption
    long = caption(embedder, images, args.long_question, args.max_new_tokens)
    short = caption(embedder, images, args.short_question, args.max_new_tokens)
    other = caption(embedder, images, args.short_question, args.max_new_tokens, WARMTH)
    for index, name in enumerate(pictures):
        record = {"image": name, "short": [], "long": [], "by": Path(args.model).name}
        for text in dict.fromkeys((short[index], other[index])):
            if 0 < length(embedder, text) < LONG:
                record["short"].append(text)
            else:
                left_out.add(f"short captions that are empty, or of {LONG} tokens and more", name)
        # A shorter one would be contrasted: it must not pass for a description.
        if length(embedder, long[index]) >= LONG:
            record["long"].append(long[index])
        else:
            left_out.add(f"long captions of less than {LONG} tokens", name)
        if record["short"] or record["long"]:
            yield record
        else:
            left_out.add("pictures that got no caption", name)


def length(embedder: Embedder, text: str) -> int:
    return len(embedder.tokenizer.encode(text))


def look(records: list[dict], args: argparse.Namespace) -> None:
    """Print and draw the first dozen."""
    rows = []
    for record in records:
        text = " / ".join(record["short"] + record["long"])
        print(f"{record['image']}: {text}")
        picture = open_image(args.images / record["image"])
        rows.append((text, [(picture, False, without_surrogates(record["image"]))]))
    if rows:
        sheet = args.out.with_suffix(".look.png")
        gallery(sheet, rows, size=192)
        print(f"The first {len(rows)} are drawn in {sheet}.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    long = f"what the long caption answers ({DESCRIBE!r})"
    short = f"what the short ones answer ({BRIEFLY!r})"
    parser.add_argument("images", type=Path, metavar="DIR", help="a folder of pictures")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file of captions to write")
    parser.add_argument("--all", action="store_true", help="all pictures, not the first dozen")
    parser.add_argument("--long_question", default=DESCRIBE, metavar="TEXT", help=long)
    parser.add_argument("--short_question", default=BRIEFLY, metavar="TEXT", help=short)
    parser.add_argument("--max_new_tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="at a time (4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is sampled (0)")
    add_model_options(parser, TOY_MODEL)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        check_parent(args.out)
        describe(open_embedder(args), args)


if __name__ == "__main__":
    main()
