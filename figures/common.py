"""What the analyses share: pictures with their captions, the states that are analysed, and the
comparison of runs with the base model that they began with.

Compared numbers are {"before": [numbers], NAME: [numbers of each seed], ...}: the base model is
measured once, and each run once. Runs of one NAME are seeds of one recipe.

Axes: B batch, T tokens, N image tokens, D hidden, V vocabulary.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import LONG, CaptionDataset, open_image
from eval import Embedder, load_embedder
from formats.files import InputError, inside, read_json
from formats.testsets import read_retrieval
from lora import adapters_disabled

BEFORE = "before"  # the base model's name among the compared ones
Compared = dict[str, list[dict]]


# ---- Pictures with captions


@dataclass
class Item:
    """A picture with its captions, short and long ones apart."""

    image: Path
    short: list[str]
    long: list[str]
    part: tuple[int, int] | None = None  # of a larger file: offset, bytes

    def open(self) -> Image.Image:
        return open_image(self.image, self.part)


def read_items(
    file: Path,
    embedder: Embedder,
    images: Path | None = None,
    split: str = "test",
    limit: int = 500,
) -> list[Item]:
    """The first `limit` records of a file in data.py's format (.jsonl), or of a retrieval test.

    `images` is where the pictures are, if not beside the file; `split` is for retrieval tests."""
    if file.suffix == ".json":
        found = read_retrieval(file, images or file.parent, split)
        return [Item(image, captions, []) for image, captions in found if captions][:limit]
    dataset = CaptionDataset(file, embedder.layout, embedder.processor, images)
    number = min(limit, len(dataset))
    return [read_item(dataset, index, embedder) for index in range(number)]


def read_item(dataset: CaptionDataset, index: int, embedder: Embedder) -> Item:
    """One record of a training file. As in training, a caption's length decides what it is."""
    record = dataset.record(index)
    item = Item(inside(dataset.root, record["image"]), [], [], record.get("part"))
    for text in record["short"] + record["long"] + record["captions"]:
        text = text.strip()
        if len(embedder.tokenizer.encode(text)) >= LONG:
            item.long.append(text)
        else:
            item.short.append(text)
    return item


def with_short(items: list[Item]) -> list[Item]:
    """Those that have a short caption. Raises InputError where none has."""
    found = [item for item in items if item.short]
    if not found:
        raise InputError(f"none of {len(items)} records has a caption of fewer than {LONG} tokens")
    return found


def as_seen(embedder: Embedder, item: Item, most: int = 96) -> str:
    """The part of a picture that the model sees, cropped and resized as for the model, and made
    smaller than `most` pixels: a PNG in base64, so that JSON can hold it."""
    pixels = embedder.processor(item.open()).numpy()  # (3, height, width)
    # The processor's table holds the pixel values of all 256 shades: the way back to 0 ... 1.
    lowest = embedder.processor.table[:, :1, None]  # (3, 1, 1)
    highest = embedder.processor.table[:, -1:, None]
    pixels = (pixels - lowest) / (highest - lowest)
    shades = (255 * pixels.transpose(1, 2, 0)).round().clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(shades)
    picture.thumbnail((most, most))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decode_picture(text: str) -> np.ndarray:
    """What `as_seen` wrote -> (height, width, 3) uint8."""
    file = io.BytesIO(base64.b64decode(text))
    return np.asarray(Image.open(file, formats=["PNG"]))


# ---- States at the summary position


@torch.no_grad()
def image_features(embedder: Embedder, items: list[Item], batch_size: int = 64) -> torch.Tensor:
    """What takes the place of the image tokens, (B, N, D): frozen, so that it is the same before
    and after training."""
    parts = []
    for start in range(0, len(items), batch_size):
        images = [item.open() for item in items[start : start + batch_size]]
        parts.append(embedder.model.image_features(embedder.pixel_values(images)))
    return torch.cat(parts)


@torch.no_grad()
def summaries(
    embedder: Embedder,
    rows: list[list[int]],
    features: torch.Tensor | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """The last hidden states at the summary position, (B, D).

    They do not have unit length, for the next token's logits are made from them; normalised, they
    are the embeddings of eval.py.

    Args:
        rows: token ids that end at the summary position, of any lengths.
        features: `image_features` of each row's picture, (B, N, D), or none for texts."""
    model = embedder.model
    device = model.device
    states = torch.empty(len(rows), model.config.text.hidden_size, dtype=model.dtype, device=device)
    # Rows of like length go together, so that little padding is computed.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        ids = [torch.tensor(rows[index], device=device) for index in chosen]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (b, T)
        last = torch.tensor([len(row) - 1 for row in ids], device=device)
        part = None if features is None else features[chosen]
        hidden = model(input_ids, image_features=part)  # (b, T, D)
        states[chosen] = hidden[torch.arange(len(chosen), device=device), last]
    return states


@torch.no_grad()
def next_token(embedder: Embedder, states: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, D) -> log-probabilities of the next token, (B, V) in fp32 on the CPU."""
    parts = []
    for part in states.split(64):
        logits = embedder.model.logits(part).float()
        parts.append(logits.log_softmax(dim=-1).cpu())
    return torch.cat(parts)


def entropy(log_probabilities: torch.Tensor) -> torch.Tensor:
    """(..., V) -> (...), in nats. Its exp is how many equally likely tokens are as uncertain."""
    return torch.special.entr(log_probabilities.exp()).sum(dim=-1)


def word(embedder: Embedder, token: int) -> str:
    """A token as it is shown: a line break as \\n, a lone space as _, else no sign for spaces."""
    text = embedder.tokenizer.tokenizer.id_to_token(token) or "?"
    if text in ("<0x0A>", "\n"):  # LLaMA's byte, and a line break as it is
        text = "\\n"
    text = text.replace("Ċ", "\\n")  # GPT-2's sign for a line break
    text = text.replace("▁", "").replace("Ġ", "")  # LLaMA's and GPT-2's for a space
    return text or "_"


# ---- Before and after


def compare(
    recipes: dict[str, list[Path]],
    measure: Callable[[Embedder], dict],
    device: str | None = None,
) -> Compared:
    """`measure` of the base model, then of every run with its adapters.

    Raises InputError where two runs began with different models."""
    found: Compared = {}
    bases: set[str] = set()
    embedder = None
    for name, folders in recipes.items():
        for folder in folders:
            embedder = None  # free it first: one model at a time is held in memory
            embedder = load_embedder(folder, device)
            bases.add(base_of(folder, embedder))
            if len(bases) > 1:
                known = sorted(bases)
                raise InputError(f"{folder}: another base model than the runs before: {known}")
            if not found:
                with adapters_disabled(embedder.model):
                    found[BEFORE] = [measure(embedder)]
            if embedder.is_adapted:
                found.setdefault(name, []).append(measure(embedder))
    return found


def base_of(folder: Path, embedder: Embedder) -> str:
    """The folder of the model that a run began with; of a LLaVA folder, itself."""
    if not embedder.is_adapted:
        return str(folder)
    settings = read_json(Path(folder) / "config.json")
    return str(settings.get("model", folder))


def trained(found: Compared) -> list[str]:
    """The names of all recipes, without the base model's."""
    return [name for name in found if name != BEFORE]


def nothing_trained(found: Compared) -> str:
    """What is said where there is nothing to compare with."""
    return "" if trained(found) else "Only a base model was given: nothing to compare with."


def trend(old: float, new: list[float], digits: str = ".2f") -> tuple[str, str]:
    """How a recipe's seeds changed a number: ("up", "1.20 -> 1.90 (1.85 to 1.95, 2 seeds)").

    "up" or "down" where every seed moves it so, and by more than a hundredth; else "mixed"."""
    has_moved = all(abs(each - old) > 0.01 * abs(old) for each in new)
    if has_moved and all(each > old for each in new):
        direction = "up"
    elif has_moved and all(each < old for each in new):
        direction = "down"
    else:
        direction = "mixed"
    told = f"{old:{digits}} -> {sum(new) / len(new):{digits}}"
    if len(new) > 1:
        told += f" ({min(new):{digits}} to {max(new):{digits}}, {len(new)} seeds)"
    return direction, told


def verdict(holds: list[bool]) -> str:
    """Does a trend appear whose parts hold or do not?"""
    if all(holds):
        return "appears"
    if any(holds):
        return "appears in part"
    return "does not appear"
