"""What `--int8` saves and costs: memory of the weights, of training 7B in a GPU of 16 GB, gradients, time of a step.

    python -m benchmarks.int8                    memory of 7B; gradients and time on the shipped TinyLLaVA
    python -m benchmarks.int8 --size 0.9B --pairs 2 --rounds 1    the same at Qwen2-0.5B + SigLIP-so400m, random weights

The relative error of the gradients is ||g(int8) - g(whole)|| / ||g(whole)|| over all LoRA parameters, on one batch: it
is what rounding the weights changes. Against the dequantised weights the gradients are exact (tests/test_lora.py).
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch

from benchmarks.measure import device_name, paired_ratio
from benchmarks.step import SIZES, Layout, build_ours, contender, make_samples
from data import CaptionDataset, ResumableSampler, collate
from eval import TOY_MODEL, load_base
from lora import (
    Int8Linear,
    LoRAConfig,
    LoRALinear,
    add_lora,
    add_soft_prompts,
    freeze,
    quantize,
    trainable_parameters,
)
from model import Llava, LlavaConfig
from toy import world
from train import TrainConfig, add_adapters, memory_estimate


def bytes_of_weights(config: LlavaConfig, int8: bool, size: int = 2) -> int:
    with torch.device("meta"):
        model = Llava(config)
    if int8:
        quantize(model)
    return sum(p.numel() * (1 if p.dtype == torch.int8 else size) for p in model.parameters())


def shapes_of(config: LlavaConfig, dtype: torch.dtype, int8: bool, train: TrainConfig) -> Llava:
    """The model that trains, without memory."""
    with torch.device("meta"):
        model = Llava(config).to(dtype)
    if int8:
        quantize(model)
    layout = Layout(config)
    freeze(model)
    add_lora(model, LoRAConfig(train.lora_rank, train.lora_alpha))
    add_soft_prompts(model, *layout.prompts)
    return model


def print_memory() -> dict:
    config, _, _ = SIZES["7B"]
    sketch = copy.deepcopy(config)
    sketch.vision.image_size = 14  # the pictures are not looked at
    whole, small = bytes_of_weights(config, False), bytes_of_weights(config, True)
    print(
        f"LLaVA-1.5-7B, weights: {whole / 1e9:.2f} GB in bf16, {small / 1e9:.2f} with --int8, {small / whole:.3f} times"
    )
    largest = 2 * config.text.intermediate_size * config.text.hidden_size / 1e9
    print(f"  (and while it is used one layer's whole weight, at most {largest:.2f} GB)")
    result, rows = {"weights": [whole, small]}, []
    print("training it, GB by train.py's estimate (a GPU of 16 GiB has 17.2, of which the driver takes about 0.5):")
    for int8 in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            for pairs, micro_batch, checkpointed in ((128, 1, 0), (128, 4, 32), (1024, 4, 32)):
                settings = {"batch_size": pairs, "micro_batch": micro_batch, "checkpoint_layers": checkpointed}
                train = TrainConfig(int8=int8, caption_share=1.0, gradient_cache=True, **settings)
                model = shapes_of(config, dtype, int8, train)
                samples = make_samples(sketch, pairs)
                parts = memory_estimate(train, model, collate(samples, Layout(config), micro_batch, multiple=32))
                frozen = [p for p in model.parameters() if not p.requires_grad]
                parts["weights"] = sum(p.nbytes for p in frozen) / 1e9
                parts["LoRA and soft prompts"] = sum(4 * p.numel() for p in trainable_parameters(model).values()) / 1e9
                parts.pop("a sequence")
                total = sum(parts.values())
                rows.append(settings | {"int8": int8, "dtype": str(dtype)[6:], "total": total} | parts)
                flags = f"{'--int8' if int8 else '      '} {str(dtype)[6:]:8} --gradient_cache --batch_size {pairs:4}"
                flags += f" --micro_batch {micro_batch} --checkpoint_layers {checkpointed:2}"
                print(f"  {flags}: {total:5.1f} ({', '.join(f'{name} {size:.2g}' for name, size in parts.items())})")
    return result | {"training": rows}


def on_toy(pairs: int) -> tuple:
    """The shipped checkpoint with LoRA that has learned something, and a batch of its training data."""
    folder = world.build(Path(__file__).parent.parent / "toy" / "data")
    run, config = load_base(TOY_MODEL, "cpu"), TrainConfig()
    add_adapters(run, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(run.model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    dataset = CaptionDataset(folder / "train.jsonl", run.layout, run.processor)
    samples = [dataset[key] for key in next(iter(ResumableSampler(dataset.units, pairs, 1)))]
    return run.model.train(), samples, collate(samples, run.layout, config.micro_batch), config.micro_batch


def at_size(size: str, pairs: int) -> tuple:
    config, _, micro_batch = SIZES[size]
    samples = make_samples(config, pairs)
    return build_ours(config, torch.float32), samples, collate(samples, Layout(config), micro_batch), micro_batch


def compare(size: str, pairs: int, rounds: int) -> dict:
    """Gradients and time of a step with int8 weights against whole ones, the same LoRA and soft prompts on both."""
    whole, samples, batch, micro_batch = on_toy(pairs) if size == "toy" else at_size(size, pairs)
    small = copy.deepcopy(whole)
    for layer in small.modules():
        if isinstance(layer, LoRALinear):
            rounded = Int8Linear(layer)
            layer.weight, layer.absmax = rounded.weight, rounded.absmax
    rows = [contender("ours", model, None, samples, batch, micro_batch) for model in (whole, small)]
    (losses, exact), (rounded_losses, rounded) = (row.gradients() for row in rows)
    error = {
        kind: math.sqrt(
            sum((rounded[name] - exact[name]).square().sum().item() for name in exact if kind in name)
            / sum(exact[name].square().sum().item() for name in exact if kind in name)
        )
        for kind in (".lora_", "embed_tokens")
    }
    weights = [sum(p.nbytes for p in row.model.parameters() if not p.requires_grad) for row in rows]
    result = {"size": size, "pairs": pairs, "device": device_name(), "torch": torch.__version__, "weights": weights}
    result |= {"gradient_error": error, "losses": [losses, rounded_losses]}
    if rounds:
        result["time"] = paired_ratio(rows[0].full_step, rows[1].full_step, rounds)
    return result


def print_comparison(result: dict) -> None:
    losses, rounded = result["losses"]
    shown = ", ".join(f"{name} {losses[name]:.4f} -> {rounded[name]:.4f}" for name in ("contrastive", "autoregressive"))
    print(f"{result['size']}, {result['pairs']} pairs, {result['device']}, fp32, torch {result['torch']}")
    print(f"  relative error of the gradients: LoRA {result['gradient_error']['.lora_']:.4f}, ", end="")
    print(f"soft prompts {result['gradient_error']['embed_tokens']:.4f}; losses: {shown}")
    print(f"  weights {result['weights'][0] / 1e6:.1f} -> {result['weights'][1] / 1e6:.1f} MB (here in fp32)")
    if time := result.get("time"):
        print(f"  a step takes {time['ratio']:.2f} times as long ({time['low']:.2f} - {time['high']:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["toy", *SIZES], default="toy")
    parser.add_argument("--pairs", type=int, default=32, help="pairs in a batch (32)")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timed steps, 0 for none (9)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    result = {"7B": print_memory(), args.size: compare(args.size, args.pairs, args.rounds)}
    print_comparison(result[args.size])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
