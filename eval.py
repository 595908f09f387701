"""Use a model: captions, conversations.

    python eval.py caption photo.jpg                          what the picture shows, in the model's words
    python eval.py caption *.jpg --question "What colour is the car?" --model llava-1.5-7b-hf
    python eval.py chat photo.jpg                             a conversation about one picture

`--model` is a Hugging Face LLaVA folder. In Python:

    run = load_run("llava-1.5-7b-hf")
    caption(run, [open_image("photo.jpg")])                   # ["The image shows ..."]

Axes: B batch, T tokens, D hidden.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data import DataError, ImageProcessor, Layout, TextTokenizer, open_image
from model import CheckpointError, Llava

TOY_MODEL = Path(__file__).parent / "toy" / "tiny-llava"
DESCRIBE = "Describe the image in detail."


@dataclass
class Run:
    """A model with what it takes to use it on pictures and text."""

    model: Llava
    layout: Layout
    processor: ImageProcessor

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.layout.tokenizer

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        """RGB images -> (B, 3, height, width) on the model's device."""
        return torch.stack([self.processor(image) for image in images]).to(self.model.device, self.model.dtype)


def pick_device(name: str | None = None) -> tuple[torch.device, torch.dtype]:
    """The best device here, or the one asked for, with the fastest dtype that it computes well in.

    CUDA: bf16 where the GPU has it, else fp16. MPS and CPU: fp32.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device, torch.float32
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_run(folder: str | Path, device: str | None = None) -> Run:
    """Read a Hugging Face LLaVA folder. Raises CheckpointError or DataError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a Hugging Face LLaVA checkpoint")
    where, dtype = pick_device(device)
    model = Llava.from_pretrained(folder, dtype, where)
    tokenizer, processor = TextTokenizer(folder), ImageProcessor.from_pretrained(folder)
    layout = Layout(tokenizer, model.config.num_image_tokens)
    if layout.image_id != model.config.image_token_id:
        raise DataError(
            f"{folder}: <image> is {layout.image_id} in tokenizer.json and {model.config.image_token_id} in config.json; "
            "the two files belong to different models"
        )
    if processor.size != (model.config.vision.image_size,) * 2:
        raise DataError(
            f"{folder}: preprocessor_config.json makes images of {processor.size}, config.json wants "
            f"{model.config.vision.image_size} pixels square"
        )
    return Run(model, layout, processor)


def caption(
    run: Run, images: list[Image.Image], question: str = DESCRIBE, max_new_tokens: int = 256, temperature: float = 0.0
) -> list[str]:
    """Answer one question about each image, greedily unless a temperature is given."""
    prompts = [run.layout.question(question)] * len(images)
    answers = run.model.generate(prompts, run.pixel_values(images), max_new_tokens, temperature)
    return [run.tokenizer.decode(answer) for answer in answers]


class Conversation:
    """Questions and answers about one image. What was said stays in the key-value cache and is not computed again."""

    def __init__(self, run: Run, image: Image.Image, max_new_tokens: int = 256):
        self.run, self.image, self.max_new_tokens = run, image, max_new_tokens
        self.ids: list[int] = []
        self.cache = run.model.new_cache(1)

    def ask(self, question: str) -> str:
        first = not self.ids
        self.ids += self.run.layout.question(question) if first else self.run.layout.next_question(question)
        pixels = self.run.pixel_values([self.image]) if first else None
        answer = self.run.model.generate([self.ids], pixels, self.max_new_tokens, cache=self.cache)[0]
        self.ids += answer
        return self.run.tokenizer.decode(answer)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def caption_command(args) -> None:
    images = [(path, open_image(path)) for path in args.images]  # all of them first: a wrong path costs no time
    run = load_run(args.model, args.device)
    batches = [images[i : i + args.batch] for i in range(0, len(images), args.batch)]
    for batch in tqdm(batches, desc="captions", disable=len(batches) < 2):
        answers = caption(run, [image for _, image in batch], args.question, args.max_new_tokens, args.temperature)
        for (path, _), answer in zip(batch, answers):
            tqdm.write(f"{path}: {answer}")


def chat_command(args) -> None:
    conversation = Conversation(load_run(args.model, args.device), open_image(args.image), args.max_new_tokens)
    print(f"Ask about {args.image}; an empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        print(conversation.ask(question))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\nAxes")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        command.add_argument("--model", default=TOY_MODEL, metavar="DIR", help="LLaVA folder (default: toy/tiny-llava)")
        command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best one here)")
        command.add_argument("--max_new_tokens", type=positive, default=256, metavar="N", help="longest answer (256)")
        return command

    command = add("caption", caption_command, "describe pictures, or answer one question about each")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("--question", default=DESCRIBE, help=f"what to ask (default: {DESCRIBE!r})")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default), above samples")
    command.add_argument("--batch", type=positive, default=8, metavar="N", help="pictures at a time (8)")
    add("chat", chat_command, "talk about a picture").add_argument("image", metavar="IMAGE")

    args = parser.parse_args(arguments)
    try:
        args.function(args)
    except (CheckpointError, DataError) as error:
        sys.exit(f"error: {error}")


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
