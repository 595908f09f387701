"""The paper's figures, on the toy run or on any other: numbers as JSON, a picture, one sentence.

    python -m figures prompts            figures 2, 3, 5: which prompt makes a good embedding?
    python -m figures tokens             figure 4: the next tokens where the summary is read
    python -m figures attention          figure 6: where the summary token looks
    python -m figures captions           figure 7: what is said about pictures
    python -m figures soft               what the soft prompts became
    python -m figures gallery            what captions find
    python -m figures curves runs/toy    losses of the training, tables before and after

`--runs [NAME=]DIR ...` are runs of train.py or LLaVA folders; runs of one NAME are seeds of one
recipe, as in `--runs contrastive=runs/contrastive-0 both=runs/toy` (default: runs/toy). `--data` is
a file of captioned images, as in data.py, or of a retrieval test (default: the toy's test set).
"""

import argparse
import json
import sys
from pathlib import Path

from eval import ROOT, Embedder, load_embedder
from figures import attention, captions, curves, gallery, prompts, soft, tokens
from figures.common import BEFORE, Item, compare, read_items
from formats.files import InputError, read_json
from toy import world

MODULES = {
    "prompts": prompts,
    "tokens": tokens,
    "attention": attention,
    "captions": captions,
    "soft": soft,
    "gallery": gallery,
    "curves": curves,
}
OUT = Path("runs/figures")  # for NAME.json, NAME.png

# ---- From arguments to numbers


def recipes_of(arguments: list[str], default: str = "trained") -> dict[str, list[Path]]:
    """["both=runs/toy", "both=runs/seed-1", "runs/x"] -> {"both": [...], "trained": [runs/x]}.

    With an empty `default`, a run without a name has that of its folder. Raises InputError."""
    recipes: dict[str, list[Path]] = {}
    for argument in arguments:
        name, _, folder = argument.rpartition("=")
        if not Path(folder).is_dir():
            advice = "give a run or a LLaVA folder"
            if folder == "runs/toy":
                advice = "train it first: python train.py"
            raise InputError(f"{folder}: no such folder; {advice}")
        if name == BEFORE:
            raise InputError(
                f"{BEFORE!r} is the name of the base model; call the run something else"
            )
        name = name or default or Path(folder).name
        recipes.setdefault(name, []).append(Path(folder))
    return recipes


def items_of(args, embedder: Embedder) -> list[Item]:
    """The pictures of --data, or those of the toy's test set."""
    if args.data:
        file = Path(args.data)
    else:
        # Draws the toy world, if it is not there.
        file = world.build(ROOT / "toy" / "data") / "test.jsonl"
    return read_items(file, embedder, args.images, args.split, args.limit)


def read_pairs(file: str | Path) -> list[list[str]]:
    """Pairs [image prompt, text prompt] of a JSON file. Raises InputError."""
    pairs = read_json(file, list)
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise InputError(f"{file}: not a list of pairs [image prompt, text prompt]")
    return pairs


def measure(args) -> dict:
    """The numbers of one command."""
    if args.command == "curves":
        return curves.measure(recipes_of(args.runs, default=""))
    recipes = recipes_of(args.runs)
    if args.command == "soft":
        found = compare(recipes, soft.measure, args.device)
        found.pop(BEFORE)  # prompts are compared with the tokens that they began as
        return found

    # Any of the runs: they have one base, so captions are of the same length to all of them.
    first = next(iter(recipes.values()))[0]
    embedder = load_embedder(first, args.device)
    items = items_of(args, embedder)
    if args.command == "prompts":
        return prompts.measure(embedder, items, read_pairs(args.prompts))
    del embedder  # `compare` holds one model at a time

    chosen = args.heads if args.command == "attention" else None

    def look(embedder: Embedder) -> dict:
        nonlocal chosen
        if args.command == "tokens":
            return tokens.measure(embedder, items, args.k)
        if args.command == "captions":
            score = None if args.data else world.score_captions  # exact, in the toy world
            return captions.measure(embedder, items, score)
        if args.command == "gallery":
            return gallery.measure(embedder, items)
        # Where no heads are given, the base model's choice is that of all that follow.
        numbers = attention.measure(embedder, items, chosen)
        chosen = numbers["chosen"]
        return numbers

    return compare(recipes, look, args.device)


# ---- The command line


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def head(text: str) -> list[int]:
    """An argument LAYER.HEAD."""
    layer, number = text.split(".")
    return [int(layer), int(number)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"({OUT})")
        command.add_argument("--name", default=name, help=f"of both files in it ({name})")
        return command

    command = add("prompts", "figures 2, 3, 5: entropy, rank and retrieval of many prompts")
    add_runs(command)
    add_data(command, limit=500)
    add_prompts(command)

    command = add("tokens", "figure 4: next tokens at the summary position")
    add_runs(command)
    add_data(command, limit=500)
    add_length(command)

    command = add("attention", "figure 6: attention from the summary token to the image")
    add_runs(command)
    add_data(command, limit=200)
    add_heads(command)

    command = add("captions", "figure 7: captions, recipe by recipe")
    add_runs(command)
    add_data(command, limit=100)

    command = add("gallery", "queries with the five nearest pictures")
    add_runs(command)
    add_data(command, limit=1000)

    command = add("soft", "what the soft prompts became")
    add_runs(command)

    command = add("curves", "losses and metrics of several runs")
    command.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="one NAME, one colour")
    return parser.parse_args(arguments)


def add_runs(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--runs", nargs="+", default=["runs/toy"], metavar="[NAME=]DIR", help="(runs/toy)"
    )
    group.add_argument(
        "--model", dest="runs", nargs=1, metavar="DIR", help="one run, or LLaVA folder"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps (the best one here)")


def add_data(command: argparse.ArgumentParser, limit: int) -> None:
    command.add_argument(
        "--data",
        metavar="FILE",
        help="captioned images (.jsonl) or a retrieval test (.json) (the toy's test set)",
    )
    command.add_argument(
        "--images", type=Path, metavar="DIR", help="where its pictures are (beside the file)"
    )
    command.add_argument("--split", default="test", help="of a retrieval test by Karpathy (test)")
    command.add_argument(
        "--limit",
        type=positive,
        default=limit,
        metavar="N",
        help=f"records, from the first on ({limit})",
    )


def add_prompts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prompts",
        default=prompts.PROMPTS,
        metavar="FILE",
        help="JSON list of [image prompt, text prompt]",
    )


def add_length(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-k", type=positive, default=10, help="length of the lists of top tokens (10)"
    )


def add_heads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--heads",
        nargs="+",
        type=head,
        metavar="LAYER.HEAD",
        help="to draw (the 4 that see the image most)",
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    module = MODULES[args.command]
    try:
        numbers = measure(args)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.name}.json").write_text(json.dumps(numbers) + "\n")
        picture = args.out / f"{args.name}.png"
        module.draw(numbers).savefig(picture, dpi=90, pil_kwargs={"optimize": True})
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(module.say(numbers))
    print(f"in {args.out}: {args.name}.json, {args.name}.png")


if __name__ == "__main__":
    main()
