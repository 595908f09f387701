"""The parts of the engine, each beside what it replaces: time, memory, gradients.

    python -m benchmarks.losses                 all three tables
    python -m benchmarks.losses --only ce       ce, infonce or lora

    ce       linear_cross_entropy against logits held as a whole, and against torch's own (2.13)
    infonce  tiled_contrastive_loss against a loss written as open_clip's: two similarity matrices,
             two cross-entropies
    lora     lean LoRA's overhead over the frozen linear layer, as a share of peft's

Forward and backward; time as the median of paired ratios (peer / ours, so more than 1 is faster)
with its quartiles.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import DEVICE, device_name, paired_ratio, peak_memory, quartiles, times
from fast.chunked import linear_cross_entropy, tiled_contrastive_loss
from fast.lean import keep_x, project
from lora import LoRAConfig, LoRALinear
from losses import (
    contrastive_loss,
    cross_entropy,
)

DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def with_backward(loss, *inputs: torch.Tensor):
    """A function that runs the loss forward and backward, and leaves the gradients of the
    inputs.
    """

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss(*inputs).backward()

    return run


def gradients_of(run, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    run()
    return [tensor.grad.float().clone() for tensor in inputs]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs))


def side_by_side(ours, theirs, inputs: list[torch.Tensor], rounds: int) -> dict:
    row = {"gradients": difference(gradients_of(ours, inputs), gradients_of(theirs, inputs))}
    for name, run in (("our_peak_mb", ours), ("their_peak_mb", theirs)):
        for tensor in inputs:
            tensor.grad = None  # else what the run before left would not count
        row[name] = peak_memory(run) / 1e6
    return row | paired_ratio(ours, theirs, rounds)


# Rows, width and vocabulary; on the CPU the captions of 32 pairs.
CROSS_ENTROPY_SIZES = [(4800, 256, 32064), (4800, 256, 128256)]
# Pairs and width.
CONTRASTIVE_SIZES = [(1024, 512), (4096, 512), (4096, 4096)]
# Rows, width inside and outside.
LORA_SIZES = [(2048, 256, 688), (2048, 512, 512), (1024, 1024, 2816)]
if DEVICE.type != "cpu":
    CROSS_ENTROPY_SIZES = [(8192, 4096, 32064), (8192, 4096, 128256), (32768, 4096, 32064)]
    CONTRASTIVE_SIZES = [(4096, 4096), (32768, 4096)]
    LORA_SIZES = [(4096, 4096, 4096), (4096, 4096, 11008), (4096, 11008, 4096)]


def cross_entropy_rows(rounds: int, sizes=CROSS_ENTROPY_SIZES) -> list[dict]:
    """The head is frozen."""
    rows = []
    for N, D, V in sizes:
        hidden = torch.randn(N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        weight = torch.randn(V, D, device=DEVICE, dtype=DTYPE) * D**-0.5
        labels = torch.randint(0, V, (N,), device=DEVICE)
        ours = with_backward(
            lambda h, w=weight, y=labels, n=N: linear_cross_entropy(h, w, y, n), hidden
        )
        peers = {
            "logits held": with_backward(
                lambda h, w=weight, y=labels, n=N: cross_entropy(h, w, y, n), hidden
            )
        }
        if hasattr(F, "linear_cross_entropy"):
            peers["torch"] = with_backward(
                lambda h, w=weight, y=labels: F.linear_cross_entropy(h, w, y), hidden
            )
        for name, theirs in peers.items():
            rows.append(
                {"N": N, "D": D, "V": V, "peer": name}
                | side_by_side(ours, theirs, [hidden], rounds)
            )
    return rows


def open_clip_loss(images, texts, scale):
    """As open_clip's ClipLoss computes it in one process."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    logits_per_image, logits_per_text = scale * images @ texts.T, scale * texts @ images.T
    labels = torch.arange(len(images), device=images.device)
    return (
        F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)
    ) / 2


def contrastive_rows(rounds: int, sizes=CONTRASTIVE_SIZES) -> list[dict]:
    rows = []
    for B, D in sizes:
        inputs = [torch.randn(B, D, device=DEVICE, requires_grad=True) for _ in range(2)]
        inputs.append(torch.tensor(1 / 0.07, device=DEVICE, requires_grad=True))
        ours, peers = (
            with_backward(tiled_contrastive_loss, *inputs),
            {"open_clip": open_clip_loss, "reference": contrastive_loss},
        )
        for name, loss in peers.items():
            rows.append(
                {"B": B, "D": D, "peer": name}
                | side_by_side(ours, with_backward(loss, *inputs), inputs, rounds)
            )
    return rows


def lora_rows(rounds: int, sizes=LORA_SIZES) -> list[dict]:
    import peft

    rows = []
    for N, inside, outside in sizes:
        x = torch.randn(N, inside, device=DEVICE, dtype=DTYPE, requires_grad=True)
        frozen = nn.Linear(inside, outside, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(
            False
        )
        ours_plain = LoRALinear(frozen, LoRAConfig(rank=16, alpha=16))

        def lean(x, layer=ours_plain):
            return project([layer], keep_x, x)[0]

        holder = nn.ModuleDict(
            {"linear": nn.Linear(inside, outside, bias=False, device=DEVICE, dtype=DTYPE)}
        )
        holder["linear"].weight = frozen.weight
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["linear"])
        theirs = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[
            "linear"
        ]
        upstream = torch.randn(N, outside, device=DEVICE, dtype=DTYPE)
        runs = [
            lambda layer=layer, x=x, g=upstream: layer(x).backward(g)
            for layer in (frozen, lean, theirs)
        ]
        plain, ours, peers = times(runs, 5 * rounds)
        share = [(b - a) / (c - a) for a, b, c in zip(plain, ours, peers)]
        row = {
            "N": N,
            "in": inside,
            "out": outside,
            "peer": "peft",
            "share": quartiles(share)["ratio"],
        }
        row["share_of_medians"] = (statistics.median(ours) - statistics.median(plain)) / (
            statistics.median(peers) - statistics.median(plain))  # fmt: skip
        rows.append(row | quartiles([c / b for b, c in zip(ours, peers)]))
    return rows


TABLES = {"ce": cross_entropy_rows, "infonce": contrastive_rows, "lora": lora_rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=TABLES)
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timed runs (9)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    print(f"{device_name()}, {str(DTYPE)[6:]}, torch {torch.__version__}")
    results = {}
    for name in [args.only] if args.only else TABLES:
        results[name] = TABLES[name](args.rounds)
        for row in results[name]:
            sizes = ", ".join(
                f"{key} {value}" for key, value in row.items() if isinstance(value, int)
            )
            text = f"{name}  {sizes}  {row['peer']}: time {row['ratio']:.2f}"
            text += f" ({row['low']:.2f} - {row['high']:.2f})"
            if "their_peak_mb" in row:
                text += f", peak {row['our_peak_mb']:.0f} MB instead of {row['their_peak_mb']:.0f}"
                text += f", gradients differ by {row['gradients']:.1e}"
            if "share" in row:
                text += f", overhead {row['share_of_medians']:.2f} of peft's"
                text += f" (by medians; by pairs {row['share']:.2f})"
            print(text, flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"device": device_name(), "torch": torch.__version__} | results, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
