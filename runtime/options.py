"""Options that several commands have, and what their values must be.

    parser = argparse.ArgumentParser()
    add_model_options(parser, TOY_MODEL)       # --model, --no-adapters, --device, --max_pixels
    add_prompt_options(parser)                 # --image_prompt, --text_prompt
    add_cache_option(parser)                   # --cache
    parser.add_argument("--top", type=positive)

    add_settings(parser, TrainConfig, ...)     # a flag for each field of a dataclass

eval.open_embedder and eval.open_embeddings open what they name.
"""

import argparse
import dataclasses
import math
from pathlib import Path

from formats.files import InputError


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def not_negative(text: str) -> float:
    """An argument that must be a finite number of at least 0."""
    if not 0 <= float(text) < math.inf:  # where it is no number at all, argparse says so
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return float(text)


def add_model_options(parser: argparse.ArgumentParser, default: Path) -> None:
    model = "LLaVA folder or run of train.py (the untrained toy)"
    adapters = "use a run's base model, without its adapters"
    parser.add_argument("--model", default=default, metavar="DIR", help=model)
    parser.add_argument("--no-adapters", action="store_true", help=adapters)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (the best one here)")
    pixels = "largest picture, where a model's differ in size (as its files say)"
    parser.add_argument("--max_pixels", type=positive, metavar="N", help=pixels)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    # No default here: a run refuses prompts that are given, for it keeps its own.
    image = "what follows an image (the paper's)"
    text = "what follows a text (the paper's)"
    parser.add_argument("--image_prompt", metavar="TEXT", help=image)
    parser.add_argument("--text_prompt", metavar="TEXT", help=text)


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    cache = "where embeddings are kept (in the run, or in runs/embeddings)"
    parser.add_argument("--cache", type=Path, metavar="DIR", help=cache)


def add_answer_options(parser: argparse.ArgumentParser, default: str) -> None:
    question = f"what to ask ({default!r}, or the prompt that a run was trained with)"
    temperature = "0 is greedy (default), above samples"
    parser.add_argument("--question", help=question)
    parser.add_argument("--temperature", type=not_negative, default=0.0, help=temperature)
    parser.add_argument(
        "--max_new_tokens", type=positive, default=256, metavar="N", help="longest answer (256)"
    )
    parser.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="pictures at a time (8)"
    )


def add_file_options(parser: argparse.ArgumentParser) -> None:
    file = "the authors' file, or the folder of their files or classes"
    parser.add_argument("file", type=Path, metavar="FILE", help=file)
    both = "a run's base model too, and the difference"
    parser.add_argument("--both", action="store_true", help=both)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")


def add_images_option(parser: argparse.ArgumentParser) -> None:
    images = "folder of the pictures (beside the file)"
    parser.add_argument("--images", type=Path, metavar="DIR", help=images)


def check_parent(path: Path | None) -> None:
    """Before anything is computed: is the folder there, in which the result will be written?"""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")


def add_settings(
    parser: argparse.ArgumentParser, config: type, parts: dict[str, str], elsewhere: dict
) -> None:
    """A flag for each field of a dataclass, whose metadata have its "help".

    Only flags that were given are in what the parser returns.

    Args:
        parts: titles of the help's parts, by the first field of each.
        elsewhere: defaults of models other than the toy's."""
    part = parser
    for field in dataclasses.fields(config):
        if field.name in parts:
            part = parser.add_argument_group(parts[field.name])
        text = field.metadata["help"]
        if field.default != "":  # else the text says what an empty one means
            default = repr(field.default)
            if field.name in elsewhere:
                default += f", for other models {elsewhere[field.name]!r}"
            text = f"{text} [{default}]"
        options = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if field.type is bool:
            part.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            kind = {str: "TEXT", int: "N", float: "X"}[field.type]
            part.add_argument(f"--{field.name}", type=field.type, metavar=kind, **options)
