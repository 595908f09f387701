"""How the engine grows: time with the tokens, memory with the vocabulary, the tokens and the batch.

    python -m benchmarks.growth

What should come out: twice the tokens take 1.8 to 2.15 times as long; the cross-entropy's peak is
the same for a vocabulary four times as large and for four times the tokens (but for the gradient of
their hidden states); the contrastive loss needs at most four times as much for four times the
batch, not sixteen.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.losses import DTYPE, with_backward
from benchmarks.measure import DEVICE, device_name, paired_ratio, peak_memory
from benchmarks.step import SIZES, Layout, build_ours, contender, make_samples
from data import collate
from fast.chunked import linear_cross_entropy, tiled_contrastive_loss


def step_time(rounds: int) -> dict:
    """Twice the pairs of the tiny size: twice the tokens."""
    config, pairs, micro_batch = SIZES["tiny"]
    model, steps = build_ours(config, DTYPE), []
    for count in (pairs, 2 * pairs):
        samples = make_samples(config, pairs) * (count // pairs)
        batch = collate(samples, Layout(config), micro_batch)
        steps.append(contender("ours", model, None, samples, batch, micro_batch).full_step)
    return {"what": "time of a step, twice the tokens"} | paired_ratio(*steps, rounds)


def cross_entropy_peak(N: int, D: int, V: int) -> float:
    hidden = torch.randn(N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(V, D, device=DEVICE, dtype=DTYPE)
    labels = torch.randint(0, V, (N,), device=DEVICE)
    return (
        peak_memory(with_backward(lambda h: linear_cross_entropy(h, weight, labels, N), hidden))
        / 1e6
    )


def contrastive_peak(B: int, D: int) -> float:
    inputs = [torch.randn(B, D, device=DEVICE, requires_grad=True) for _ in range(2)]
    return (
        peak_memory(with_backward(lambda i, t: tiled_contrastive_loss(i, t, 14.0), *inputs)) / 1e6
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timed steps (9)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    N, D, B = (8192, 1024, 8192) if DEVICE.type == "cuda" else (2048, 128, 4096)
    cross_entropy_peak(256, D, 1000)  # what is set up once does not count
    peaks = {
        "cross-entropy, V 32,000 to 128,000": [
            cross_entropy_peak(N, D, V) for V in (32000, 128000)
        ],
        "cross-entropy, N to 4 N": [cross_entropy_peak(n, D, 32000) for n in (N, 4 * N)],
        "contrastive loss, B to 4 B": [contrastive_peak(b, 512) for b in (B, 4 * B)],
    }
    rows = [
        {"what": f"peak of the {name}", "mb": mb, "ratio": mb[1] / mb[0]}
        for name, mb in peaks.items()
    ]
    rows.append(step_time(args.rounds))
    print(f"{device_name()}, {str(DTYPE)[6:]}, torch {torch.__version__}")
    for row in rows:
        spread = (
            f" ({row['low']:.2f} - {row['high']:.2f})"
            if "low" in row
            else " ({:.0f} to {:.0f} MB)".format(*row["mb"])
        )
        print(f"{row['ratio']:.2f}{spread}  {row['what']}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {"device": device_name(), "torch": torch.__version__, "rows": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
