"""Embeddings of pictures and captions per second, beside transformers on the same weights in memory.

    python -m benchmarks.encoding                          a tiny model, on the CPU or whatever is there
    python -m benchmarks.encoding --size 7B                LLaVA-1.5-7B, random weights, CUDA

Two ways to write it with transformers: plain (the whole model, output_hidden_states, padded on the left in the order
given, as E5-V does) and tuned (no head, no stack of hidden states, sorted by length). Both sides get token ids and
pixels; reading files and tokenizing are not in it. Captions have 18 tokens on average, pictures 576 image tokens.
"""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measure import DEVICE, device_name, paired_ratio
from benchmarks.step import SIZES, Layout, transformers_twin
from eval import Run, encode
from model import Llava


@torch.no_grad()
def theirs_plain(model, rows, pixels, batch):
    parts = []
    for start in range(0, len(rows), batch):
        ids = [torch.tensor(row) for row in rows[start : start + batch]]
        given = {"input_ids": pad_sequence(ids, batch_first=True, padding_side="left").to(DEVICE)}
        ones = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
        given["attention_mask"] = ones.to(DEVICE)
        if pixels:
            given["pixel_values"] = torch.stack(pixels[start : start + batch]).to(DEVICE, model.dtype)
        hidden = model(**given, output_hidden_states=True).hidden_states[-1]
        parts.append(F.normalize(hidden[:, -1].float(), dim=-1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def theirs_tuned(model, rows, pixels, batch):
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    result = torch.empty(len(rows), model.config.text_config.hidden_size)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        given = {"input_ids": pad_sequence([torch.tensor(rows[i]) for i in chosen], batch_first=True).to(DEVICE)}
        lengths = torch.tensor([len(rows[i]) for i in chosen])
        given["attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long().to(DEVICE)
        if pixels:
            given["pixel_values"] = torch.stack([pixels[i] for i in chosen]).to(DEVICE, model.dtype)
        hidden = model.model(**given, use_cache=False).last_hidden_state
        result[chosen] = F.normalize(hidden[torch.arange(len(chosen)), lengths - 1].float(), dim=-1).cpu()
    return result


def padding(rows: list[list[int]], batch: int) -> float:
    """Percent of the computed positions that are padding."""
    padded = sum(max(map(len, rows[s : s + batch])) * len(rows[s : s + batch]) for s in range(0, len(rows), batch))
    return 100 * (1 - sum(map(len, rows)) / padded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="pictures; captions go four times as many at a time")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config, dtype = SIZES[args.size][0], torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = Llava(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    twin, layout, random = transformers_twin(model).eval(), Layout(config), np.random.default_rng(0)
    layout.soft = layout.prompts  # nothing is trained here
    run = Run(model, SimpleNamespace(tokenizer=None), lambda pixels: pixels)
    side = config.vision.image_size
    pixels = list(torch.from_numpy(random.standard_normal((args.pictures, 3, side, side), np.float32)))
    lengths = random.poisson(18, args.captions).clip(4, 29)
    captions = [layout.text_side(random.integers(50, 900, length).tolist()) for length in lengths]
    pictures = [layout.image_side()] * args.pictures
    for name, rows, images, batch in (
        ("pictures", pictures, pixels, args.batch),
        ("captions", captions, None, 4 * args.batch),
    ):
        ours = lambda: encode(run, rows, images, batch)  # noqa: B023, E731
        for way, theirs in (("plain", theirs_plain), ("tuned", theirs_tuned)):
            other = lambda: theirs(twin, rows, images, batch)  # noqa: B023, E731
            result = {"what": name, "against": way, "device": device_name(), "size": args.size}
            result["differ_by"] = (ours() - other()).norm(dim=-1).max().item()
            result |= paired_ratio(ours, other, args.rounds)
            result["per_second"] = len(rows) / result.pop("seconds_of_first")
            result["padding_percent"] = padding(sorted(rows, key=len), batch)
            result["their_padding_percent"] = padding(rows if way == "plain" else sorted(rows, key=len), batch)
            print(json.dumps({key: round(v, 7) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
