"""The commands of eval.py: captions, conversations, search, embeddings in files, and the paper's tables.

Each gets a run (eval.load_run) and the arguments of its command; the tables of both are at the end of the file.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import eval
from data import IMAGE_PROMPT, LONG, TEXT_PROMPT, CaptionDataset, DataError, fields_of, inside, open_image, pictures_in
from eval import (
    DESCRIBE,
    SIZES,
    TESTS,
    TOY_MODEL,
    USER_ERRORS,
    Embeddings,
    Run,
    caption,
    captioning,
    cider_d,
    encode_image,
    encode_text,
    gallery,
    load_run,
    paper_rows,
    print_table,
    read_test,
    room_for_answer,
    summary,
)
from lora import adapters_disabled

# ---- Captions and conversations


def caption_command(run: Run, args) -> None:
    """Captions, or answers, a few pictures at a time."""
    if args.fill and args.pictures:
        raise DataError("caption: give pictures or --fill FILE, not both")
    if args.fill:
        return fill(run, args)
    batches = [args.pictures[i : i + args.batch] for i in range(0, len(args.pictures), args.batch)]
    if not batches:
        raise DataError("caption: give pictures, or --fill FILE")
    for batch in tqdm(batches, desc="captions", disable=len(batches) < 2):
        images = [open_image(path) for path in batch]
        for path, answer in zip(batch, caption(run, images, args.question, args.max_new_tokens, args.temperature)):
            tqdm.write(f"{path}: {answer}")


def fill(run: Run, args) -> None:
    """Write FILE.filled.jsonl: the training data FILE, with a long caption by this model for every picture that has
    none. Interrupted, it goes on where it stopped."""
    out, dataset = args.fill.with_suffix(".filled.jsonl"), CaptionDataset(args.fill, run.layout, None, args.images)
    counts = Counter({f"lines left out: {reason}": count for reason, count in dataset.faults.items()})
    done = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    done = [line for line in done if line.endswith(b"\n")]  # the last one may be torn
    given = lambda record: {key: value for key, value in record.items() if key not in ("long", "long_by")}  # noqa: E731
    try:
        agrees = all(given(json.loads(line)) == given(dataset.record(index)) for index, line in enumerate(done))
    except (ValueError, AttributeError, IndexError):  # not JSON, not an object, more lines than there are records
        agrees = False
    if not agrees:
        raise DataError(f"{out}: does not begin as {args.fill} does; move it away")
    with open(out, "ab") as file:
        file.truncate(sum(map(len, done)))
        for start in tqdm(range(len(done), len(dataset), args.batch), desc="filling", unit=" batches"):
            records = [dataset.record(index) for index in range(start, min(start + args.batch, len(dataset)))]
            pictures, wanting, unreadable = [], [], []
            for record in records:
                if dataset.captions(record)[1]:
                    counts["had a long caption"] += 1
                    continue
                try:
                    pictures.append(open_image(inside(dataset.root, record["image"]), record.get("part")))
                    wanting.append(record)
                except DataError as error:
                    counts[f"left as it was: {error}"] += 1
                    unreadable.append(error)
            if start == 0 and len(unreadable) == len(records):
                raise DataError(f"{args.fill}: no picture is there ({unreadable[0]}); give --images DIR")
            answers = caption(run, pictures, args.question, args.max_new_tokens, args.temperature) if pictures else []
            for record, answer in zip(wanting, answers):
                if len(run.tokenizer.encode(answer)) < LONG:
                    counts[f"left as it was: the answer is shorter than {LONG} tokens"] += 1
                else:
                    record |= {"long": [*record["long"], answer], "long_by": str(args.model)}
                    counts["filled"] += 1
            file.writelines(json.dumps(record).encode() + b"\n" for record in records)
    print("\n".join(f"{count:>10,} {what}" for what, count in counts.items()) + f"\nwritten: {out}")


class Conversation:
    """Questions and answers about one image. What was said stays in the key-value cache and is not computed again."""

    def __init__(self, run: Run, image: Image.Image, max_new_tokens: int = 256):
        self.run, self.image, self.max_new_tokens = run, image, max_new_tokens
        self.ids: list[int] = []
        self.cache = run.model.new_cache(1)

    def ask(self, question: str) -> str:
        layout, first = self.run.layout, not self.ids
        ids = self.ids + (layout.question(question) if first else layout.next_question(question))
        pixels = self.run.pixel_values([self.image]) if first else None
        room = room_for_answer(self.run, ids, self.max_new_tokens)
        answer = self.run.model.generate([ids], pixels, room, cache=self.cache)[0]
        self.ids = ids + answer
        return self.run.tokenizer.decode(answer)


def chat(run: Run, args) -> None:
    """Questions and answers about a picture, until an empty line."""
    conversation = Conversation(run, open_image(args.image), args.max_new_tokens)
    print(f"Ask about {args.image}; an empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        print(conversation.ask(question))


# ---- Search, match, embed


def search(run: Run, args) -> None:
    """Rank the pictures of a folder by words or by a picture; list and draw the best. Embeddings are kept."""
    if not args.images:
        raise DataError("search: give --images DIR, the folder to search in")
    embeddings, found, faults = Embeddings(run, args.cache), pictures_in(args.images), []
    pictures = []
    for start in tqdm(range(0, len(found), 64), desc="pictures", unit=" x 64", delay=2, leave=False):
        pictures += readable(embeddings, found[start : start + 64], faults)
    for reason in faults:
        print(f"left out: {reason}")
    if not pictures:
        raise DataError(f"{args.images}: there is no picture in this folder that can be read")
    vectors = embeddings.images(pictures)
    is_picture = os.path.isfile(args.query)  # Path's would fail on a text that is too long for a name
    query = embeddings.images([Path(args.query)]) if is_picture else embeddings.texts([args.query])
    scores, order = (vectors @ query[0]).topk(min(args.top, len(pictures)))
    found = [(pictures[index], False, f"{score:.3f}") for score, index in zip(scores.tolist(), order.tolist())]
    for path, _, score in found:
        print(f"{score}  {path}")
    rows = [(args.query if start == 0 else "", found[start : start + 4]) for start in range(0, len(found), 4)]
    gallery(args.out, rows, size=192)
    print(f"the best {len(found)} of {len(pictures):,} pictures are drawn in {args.out}")


def readable(embeddings: Embeddings, paths: list[Path], faults: list[str]) -> list[Path]:
    """Embed pictures; returns those that could be, and adds the others' reasons to `faults`."""
    try:
        embeddings.images(paths)
        return paths
    except DataError as error:
        if len(paths) == 1:
            faults.append(str(error))
            return []
        half = len(paths) // 2
        return [*readable(embeddings, paths[:half], faults), *readable(embeddings, paths[half:], faults)]


def match(run: Run, args) -> None:
    """Cosine similarities of one picture and several captions, the best first."""
    scores = encode_text(run, args.captions) @ encode_image(run, [open_image(args.image)])[0]
    for score, text in sorted(zip(scores.tolist(), args.captions), reverse=True):
        print(f"{score:.3f}  {text}")


def embed(run: Run, args) -> None:
    """Write the embeddings of pictures, or of the lines of a text file: .npy, or .safetensors with the rows' names."""
    if args.out.suffix not in (".npy", ".safetensors") or bool(args.inputs) == bool(args.texts):
        raise DataError("embed: OUT ends in .npy or .safetensors, then come either pictures or --texts FILE")
    embeddings = Embeddings(run, args.cache)
    if args.texts:
        with fields_of(args.texts), open(args.texts, encoding="utf-8") as file:
            names = [line.rstrip("\n") for line in file]
        vectors = embeddings.texts(names)
    else:
        paths = [pictures_in(path) if path.is_dir() else [path] for path in args.inputs]
        names = [str(path) for part in paths for path in part]
        vectors = embeddings.images(list(map(Path, names)))
    if args.out.suffix == ".npy":
        np.save(args.out, vectors.numpy())
    else:
        save_file({"embeddings": vectors}, args.out, metadata={"names": json.dumps(names)})
    print(f"{len(vectors):,} embeddings of {vectors.shape[1]:,} numbers in {args.out}, in the order given")


# ---- The paper's tables


def table(run: Run, args) -> None:
    """One test of eval.py on the authors' files, the paper's rows below."""
    name, options = args.command, ("split", "captions_per_image", "classes")
    images = getattr(args, "images", None) or (args.file if args.file.is_dir() else args.file.parent)
    items, sizes = read_test(name, args.file, images, **{key: getattr(args, key) for key in options if key in args})
    published = SIZES[name]
    dataset = published.get(sizes, next(iter(published.values())))
    known = f"as many as in {dataset}" if sizes in published else f"NOT as published: {list(published)}"
    print(f"{args.file}: {' + '.join(f'{size:,}' for size in sizes)} items, {known}; the paper's rows: on {dataset}")
    templates = {"templates": args.template} if "template" in args else {}
    rows = show(run, args, lambda: TESTS[name](Embeddings(run, args.cache), items, **templates), paper_rows(dataset))
    if name == "sugarcrepe":
        values = rows["this model"].values()
        means = summary({name: rows["this model"]}) | {"all files": sum(values) / len(values)}
        means["all items"] = sum(value * size for value, size in zip(values, sizes)) / sum(sizes)
        print("means: " + ", ".join(f"{key} {value:.1f}" for key, value in means.items()))


def caption_table(run: Run, args) -> None:
    """eval.captioning on a training file, or on one in retrieval's formats."""
    print(f"{args.file}: the first {args.limit:,} records, where there are as many; --limit N takes more")
    images = args.images or args.file.parent
    show(run, args, lambda: captioning(run, args.file, images, args.question, args.limit, cider_d), {})


def show(run: Run, args, measure: Callable[[], dict], paper: dict) -> dict[str, dict[str, float]]:
    """Measure, with --both the base model as well; print the rows, write them if wanted, and return them."""
    rows = {}
    if args.both:
        if not run.is_adapted:
            raise DataError("--both: needs a run of train.py with its adapters; a plain model has nothing to compare")
        with adapters_disabled(run.model):
            rows["base model"] = measure()
    rows["this model"] = measure()
    if args.both:
        rows["difference"] = {key: value - rows["base model"][key] for key, value in rows["this model"].items()}
    print_table(rows | paper)
    if args.json:
        args.json.write_text(json.dumps({args.command: rows}, indent=2) + "\n")
    return rows


# ---- Arguments


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def temperature(text: str) -> float:
    """An argument that must be a finite number of at least 0."""
    if not 0 <= float(text) < float("inf"):  # where it is no number at all, argparse says so
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return float(text)


OPTIONS = {
    "image": dict(metavar="IMAGE", help="a picture"),
    "captions": dict(nargs="+", metavar="CAPTION", help="what the picture may show"),
    "query": dict(metavar="QUERY", help="words, or the path of a picture"),
    "out": dict(type=Path, metavar="OUT", help="file to write: .npy, or .safetensors with the names of the rows"),
    "inputs": dict(nargs="*", type=Path, metavar="IMAGE", help="pictures, or folders of pictures"),
    "--texts": dict(type=Path, metavar="FILE", help="embed the lines of this file"),
    "--top": dict(type=positive, default=12, metavar="N", help="how many to show (12)"),
    "--out": dict(type=Path, default="search.png", metavar="PNG", help="picture to draw (search.png)"),
    "pictures": dict(nargs="*", type=Path, metavar="IMAGE", help="pictures"),
    "file": dict(type=Path, metavar="FILE", help="the authors' file, or the folder of their files or classes"),
    "--images": dict(type=Path, metavar="DIR", help="folder of the pictures (beside the file)"),
    "--question": dict(help=f"what to ask ({DESCRIBE!r}, or the prompt that a run was trained with)"),
    "--temperature": dict(type=temperature, default=0.0, help="0 is greedy (default), above samples"),
    "--max_new_tokens": dict(type=positive, default=256, metavar="N", help="longest answer (256)"),
    "--batch": dict(type=positive, default=8, metavar="N", help="pictures at a time (8)"),
    "--fill": dict(type=Path, metavar="FILE", help="instead: write training data with its missing long captions"),
    "--split": dict(default="test", help="Karpathy's split (test)"),
    "--captions_per_image": dict(type=positive, metavar="N", help="the first N only; 5 makes COCO's 25,010 25,000"),
    "--classes": dict(type=Path, metavar="FILE", help="names in the order of the folders, one a line, or JSON"),
    "--template": dict(action="append", metavar="TEXT", help='"a photo of a {}.", can be repeated (CLIP\'s 80)'),
    "--limit": dict(type=positive, default=256, metavar="N", help="records, from the first on (256)"),
    "--both": dict(action="store_true", help="a run's base model too, and the difference"),
    "--json": dict(type=Path, metavar="FILE", help="write the numbers here as well"),
    "--model": dict(default=TOY_MODEL, metavar="DIR", help="LLaVA folder or run of train.py (the untrained toy)"),
    "--no-adapters": dict(action="store_true", help="use a run's base model, without its adapters"),
    "--device": dict(help="cpu, cuda, cuda:1, mps (the best one here)"),
    "--image_prompt": dict(metavar="TEXT", default=IMAGE_PROMPT, help="what follows an image (the paper's)"),
    "--text_prompt": dict(metavar="TEXT", default=TEXT_PROMPT, help="what follows a text (the paper's)"),
    "--cache": dict(type=Path, metavar="DIR", help="where embeddings are kept (in the run, or in runs/embeddings)"),
}
ANY, PROMPTS = "--model --no-adapters --device", "--image_prompt --text_prompt --cache"
TEST = f"file --both --json {ANY} {PROMPTS}"
COMMANDS = {  # what does it, what it does, its options
    "caption": (
        caption_command,
        "describe pictures, or answer one question about each",
        f"pictures --question --max_new_tokens --temperature --batch --fill --images {ANY}",
    ),
    "chat": (chat, "talk about a picture", f"image --max_new_tokens {ANY}"),
    "search": (search, "rank a folder's pictures, and draw the best", f"query --images --top --out {ANY} {PROMPTS}"),
    "match": (match, "rank captions of a picture", f"image captions {ANY} --image_prompt --text_prompt"),
    "embed": (embed, "write embeddings of pictures or of lines of text", f"out inputs --texts {ANY} {PROMPTS}"),
    "retrieval": (
        table,
        "Flickr30k, COCO, nocaps (Karpathy's, COCO's or BLIP's JSON): R@1, 5, 10 both ways; a tie counts as lost",
        f"{TEST} --images --split --captions_per_image",
    ),
    "sugarcrepe": (table, "its seven files: the caption must beat its negative, strictly", f"{TEST} --images"),
    "sugarcrepe++": (table, "its five files: ITT and TOT", f"{TEST} --images"),
    "winoground": (table, "its examples.jsonl: text, image and group score", f"{TEST} --images"),
    "imagenet": (table, "zero-shot classes of a folder of folders: top 1 and 5", f"{TEST} --classes --template"),
    "captioning": (
        caption_table,
        "long captions' tokens predicted right (our training format), CIDEr-D (that, or retrieval's formats)",
        f"file --both --json --images --question --limit {ANY}",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=eval.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, help, options) in COMMANDS.items():
        command = subparsers.add_parser(name, help=help, description=help)
        for option in options.split():
            command.add_argument(option, **OPTIONS[option])
    args = parser.parse_args(arguments)
    is_run = (Path(args.model) / "checkpoints").is_dir()
    args.cache = getattr(args, "cache", None) or Path(args.model if is_run else "runs") / "embeddings"
    prompts = getattr(args, "image_prompt", IMAGE_PROMPT), getattr(args, "text_prompt", TEXT_PROMPT)
    try:
        for path in (getattr(args, name, None) for name in ("out", "json")):
            if path and not path.parent.is_dir():
                raise DataError(f"{path}: there is no folder {path.parent}; make it first")
        run = load_run(args.model, args.device, *(() if prompts == (IMAGE_PROMPT, TEXT_PROMPT) else prompts))
        with adapters_disabled(run.model) if args.no_adapters else nullcontext():
            COMMANDS[args.command][0](run, args)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
