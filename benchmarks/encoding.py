"""Embeddings of pictures and captions per second, beside transformers on the same weights.

    python -m benchmarks.encoding                   a tiny model, on the CPU or whatever is there
    python -m benchmarks.encoding --size 7B         LLaVA-1.5-7B, random weights, CUDA

Two ways to write it with transformers: plain (the whole model, output_hidden_states, padded on the
left in the order given, as E5-V does) and tuned (no head, no stack of hidden states, sorted by
length). Both sides get token ids and pixels; reading files and tokenizing are not in it. Captions
have 18 tokens on average, pictures 576 image tokens. Axes: b rows of a batch, T tokens, D hidden.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measure import DEVICE, device_name, paired_ratio, write_json
from benchmarks.step import SIZES, Layout, transformers_twin
from eval import Embedder, encode
from model import Llava, LlavaConfig

Rows = list[list[int]]  # token ids
Pixels = list[torch.Tensor] | None


@torch.no_grad()
def theirs_plain(model, rows: Rows, pixels: Pixels, batch_size: int) -> torch.Tensor:
    """As one writes it: left padding, so that [:, -1] is the summary; all hidden states."""
    parts = []
    for start in range(0, len(rows), batch_size):
        ids = [torch.tensor(row) for row in rows[start : start + batch_size]]
        ones = [torch.ones_like(row) for row in ids]
        mask = pad_sequence(ones, batch_first=True, padding_side="left")  # (b, T)
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_side="left").to(DEVICE),
            "attention_mask": mask.to(DEVICE),
        }
        if pixels:
            stacked = torch.stack(pixels[start : start + batch_size])
            inputs["pixel_values"] = stacked.to(DEVICE, model.dtype)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]  # (b, T, D)
        parts.append(F.normalize(hidden[:, -1].float(), dim=-1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def theirs_tuned(model, rows: Rows, pixels: Pixels, batch_size: int) -> torch.Tensor:
    """As well as one can: sorted by length, right padding, no logits, one hidden state."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    result = torch.empty(len(rows), model.config.text_config.hidden_size)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        ids = [torch.tensor(rows[index]) for index in chosen]
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(lengths.max()) < lengths[:, None]  # (b, T)
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True).to(DEVICE),
            "attention_mask": mask.long().to(DEVICE),
        }
        if pixels:
            stacked = torch.stack([pixels[index] for index in chosen])
            inputs["pixel_values"] = stacked.to(DEVICE, model.dtype)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state  # (b, T, D)
        summary = hidden[torch.arange(len(chosen)), lengths - 1]  # (b, D)
        result[chosen] = F.normalize(summary.float(), dim=-1).cpu()
    return result


WAYS = {"plain": theirs_plain, "tuned": theirs_tuned}


def padding(rows: Rows, batch_size: int) -> float:
    """Percent of the computed positions that are padding."""
    computed = 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        computed += len(part) * max(len(row) for row in part)
    needed = sum(len(row) for row in rows)
    return 100 * (1 - needed / computed)


def random_model(config: LlavaConfig) -> Llava:
    """In the dtype that one would encode in, drawn on the device itself."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    with torch.device(DEVICE):
        model = Llava(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    return model


def make_tasks(config: LlavaConfig, num_pictures: int, num_captions: int) -> dict:
    """Token ids and pixels, at random: {"pictures": (rows, pixels), "captions": (rows, None)}."""
    random = np.random.default_rng(0)
    layout = Layout(config)
    layout.soft = layout.prompts  # nothing is trained here
    side = config.vision.image_size
    pixels = random.standard_normal((num_pictures, 3, side, side), np.float32)
    lengths = random.poisson(18, num_captions).clip(4, 29)
    words = [random.integers(50, 900, length).tolist() for length in lengths]
    pictures = [layout.image_side()] * num_pictures
    captions = [layout.text_side(ids) for ids in words]
    return {
        "pictures": (pictures, list(torch.from_numpy(pixels))),
        "captions": (captions, None),
    }


def compare(ours: Callable, theirs: Callable, rounds: int) -> dict[str, float]:
    """How far the embeddings differ, and both times, measured in turns."""
    result = {"differ_by": (ours() - theirs()).norm(dim=-1).max().item()}
    result.update(paired_ratio(ours, theirs, rounds))
    return result


def run(size: str, pictures: int, captions: int, batch: int, rounds: int, report) -> None:
    """Both kinds of input, beside both ways. report: is given each row."""
    config = SIZES[size][0]
    model = random_model(config)
    twin = transformers_twin(model).eval()
    # Ids and pixels are made here: nothing is left for a tokenizer or a processor to do.
    embedder = Embedder(model, layout=None, processor=None)
    tasks = make_tasks(config, pictures, captions)
    for name, (rows, images) in tasks.items():
        batch_size = batch if images else 4 * batch
        by_length = sorted(rows, key=len)
        ours = partial(encode, embedder, rows, images, batch_size)
        for way, function in WAYS.items():
            theirs = partial(function, twin, rows, images, batch_size)
            theirs_order = rows if way == "plain" else by_length
            result = {"what": name, "against": way, "device": device_name(), "size": size}
            result.update(compare(ours, theirs, rounds))
            result["per_second"] = len(rows) / result.pop("seconds_of_first")
            result["padding_percent"] = padding(by_length, batch_size)
            result["their_padding_percent"] = padding(theirs_order, batch_size)
            for key, value in result.items():
                if isinstance(value, float):
                    result[key] = round(value, 7)
            report(result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    batch = "pictures at a time; captions go four times as many"
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help=batch)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    rows = []

    def report(row: dict) -> None:
        print(json.dumps(row), flush=True)
        rows.append(row)
        write_json(args.json, rows)

    run(args.size, args.pictures, args.captions, args.batch, args.rounds, report)


if __name__ == "__main__":
    main()
