"""What `--int8` saves and costs: memory of the weights, of training 7B in a GPU of 16 GB, the error
of the gradients, the time of a step.

    python -m benchmarks.int8            memory of 7B; gradients and time on the shipped TinyLLaVA
    python -m benchmarks.int8 --size 0.9B --pairs 2 --rounds 1
                                         the same at Qwen2-0.5B + SigLIP-so400m, random weights

The relative error of the gradients is ||g(int8) - g(whole)|| / ||g(whole)|| over all LoRA
parameters, on one batch: it is what rounding the weights changes. Against the dequantised weights
the gradients are exact (tests/test_fast.py).
"""

import argparse
import copy
import json
from pathlib import Path

import torch

from benchmarks.measure import DEVICE, device_name, paired_ratio
from benchmarks.step import (
    MULTIPLE,
    SIZES,
    Layout,
    adapter_parameters,
    build_ours,
    contender,
    make_samples,
)
from data import Batch, CaptionDataset, ResumableSampler, Sample, collate
from eval import TOY_MODEL, load_base
from fast.int8 import quantize
from lora import LoRAConfig, add_lora, add_soft_prompts, freeze
from model import Llava, LlavaConfig
from runtime import memory
from toy import world
from train import TrainConfig, add_adapters

# Settings of the memory table: pairs in a batch, sequences in a micro-batch, checkpointed layers.
RUNS = [(128, 1, 0), (128, 4, 32), (1024, 4, 32)]


# ---- Memory, by shapes alone
def model_without_memory(config: LlavaConfig, dtype: torch.dtype, int8: bool) -> Llava:
    with torch.device("meta"):
        model = Llava(config).to(dtype)
    if int8:
        quantize(model)
    return model


def bytes_of_weights(model: Llava) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def compare_weights(config: LlavaConfig) -> list[int]:
    """Bytes of the weights in bf16 and with int8, printed."""
    whole = bytes_of_weights(model_without_memory(config, torch.bfloat16, int8=False))
    small = bytes_of_weights(model_without_memory(config, torch.bfloat16, int8=True))
    sizes = f"{whole / 1e9:.2f} GB in bf16, {small / 1e9:.2f} with --int8"
    print(f"LLaVA-1.5-7B, weights: {sizes}, {small / whole:.3f} times")
    largest = 2 * config.text.intermediate_size * config.text.hidden_size / 1e9
    print(f"  (and while it is used one layer's whole weight, at most {largest:.2f} GB)")
    return [whole, small]


def training_memory(config: LlavaConfig, dtype, int8: bool, train: TrainConfig) -> dict:
    """GB of a training run by part: what is held, and train.py's estimate of the rest."""
    model = model_without_memory(config, dtype, int8)
    freeze(model)
    add_lora(model, LoRAConfig(train.lora_rank, train.lora_alpha))
    add_soft_prompts(model, *Layout(config).prompts)
    # Pixels cost memory here and are not looked at: pictures of one patch.
    sketch = copy.deepcopy(config)
    sketch.vision.image_size = sketch.vision.patch_size
    samples = make_samples(sketch, train.batch_size)
    batch = collate(samples, Layout(config), train.micro_batch, multiple=32)
    parts = memory.estimate(train, model, batch)
    parts.pop("a sequence")  # no part of the sum
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    learning = adapter_parameters(model).values()
    parts["weights"] = sum(parameter.nbytes for parameter in frozen) / 1e9
    parts["LoRA and soft prompts"] = sum(parameter.nbytes for parameter in learning) / 1e9
    return parts


def compare_training(config: LlavaConfig) -> list[dict]:
    """The memory of training 7B with several settings, printed."""
    print("training it, GB by train.py's estimate")
    print("(a GPU of 16 GiB has 17.2, of which the driver takes about 0.5):")
    rows = []
    for int8 in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            for pairs, micro_batch, checkpointed in RUNS:
                settings = {
                    "batch_size": pairs,
                    "micro_batch": micro_batch,
                    "checkpoint_layers": checkpointed,
                    "int8": int8,
                }
                train = TrainConfig(caption_share=1.0, gradient_cache=True, **settings)
                parts = training_memory(config, dtype, int8, train)
                row = {**settings, "dtype": str(dtype).removeprefix("torch."), **parts}
                row["total"] = sum(parts.values())
                rows.append(row)
                print_training(row, parts)
    return rows


def print_training(row: dict, parts: dict[str, float]) -> None:
    flags = "--int8" if row["int8"] else ""
    settings = f"{flags:6} {row['dtype']:8} --gradient_cache --batch_size {row['batch_size']:4}"
    settings += f" --micro_batch {row['micro_batch']}"
    settings += f" --checkpoint_layers {row['checkpoint_layers']:2}"
    listed = ", ".join(f"{name} {size:.2g}" for name, size in parts.items())
    print(f"  {settings}: {row['total']:5.1f} ({listed})")


# ---- Gradients and time
def on_toy(pairs: int) -> tuple[Llava, list[Sample], Batch, int]:
    """The shipped checkpoint with LoRA that has learned something, and a batch of its data."""
    folder = world.build(Path(__file__).parent.parent / "toy" / "data")
    config = TrainConfig()
    embedder = load_base(TOY_MODEL, DEVICE, dtype=torch.float32)
    model = embedder.model
    add_adapters(embedder, config)  # with the fast layers
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    dataset = CaptionDataset(folder / "train.jsonl", embedder.layout, embedder.processor)
    keys = next(iter(ResumableSampler(dataset.units, pairs, steps=1)))
    samples = [dataset[key] for key in keys]
    batch = collate(samples, embedder.layout, config.micro_batch)
    return model.train(), samples, batch, config.micro_batch


def at_size(size: str, pairs: int) -> tuple[Llava, list[Sample], Batch, int]:
    """A model of a real one's size with random weights, and a batch of random tokens: in bf16 on
    CUDA, where it has to fit twice."""
    config, _, micro_batch = SIZES[size]
    samples = make_samples(config, pairs)
    batch = collate(samples, Layout(config), micro_batch, multiple=MULTIPLE)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return build_ours(config, dtype), samples, batch, micro_batch


def relative_error(found: dict, exact: dict, kind: str) -> float:
    """||found - exact|| / ||exact|| over all gradients whose name contains `kind`."""
    difference = 0.0
    norm = 0.0
    for name, gradient in exact.items():
        if kind in name:
            difference += (found[name] - gradient).square().sum().item()
            norm += gradient.square().sum().item()
    return (difference / norm) ** 0.5


def compare_steps(size: str, pairs: int, rounds: int) -> dict:
    """Gradients and time of a step with int8 weights against whole ones, with the same LoRA and
    soft prompts on both."""
    if size == "toy":
        whole, samples, batch, micro_batch = on_toy(pairs)
    else:
        whole, samples, batch, micro_batch = at_size(size, pairs)
    small = copy.deepcopy(whole)
    quantize(small)
    first = contender("ours", whole, None, samples, batch, micro_batch)
    second = contender("ours", small, None, samples, batch, micro_batch)
    losses, exact = first.gradients()
    rounded_losses, rounded = second.gradients()
    weights = []
    for model in (whole, small):
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        weights.append(sum(parameter.nbytes for parameter in frozen))
    result = {
        "size": size,
        "pairs": pairs,
        "device": device_name(),
        "dtype": str(whole.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "weights": weights,
        "gradient_error": {
            ".lora_": relative_error(rounded, exact, ".lora_"),
            "embed_tokens": relative_error(rounded, exact, "embed_tokens"),
        },
        "losses": [losses, rounded_losses],
    }
    if rounds:
        result["time"] = paired_ratio(first.full_step, second.full_step, rounds)
    return result


def print_steps(result: dict) -> None:
    losses, rounded = result["losses"]
    shown = []
    for name in ("contrastive", "autoregressive"):
        shown.append(f"{name} {losses[name]:.4f} -> {rounded[name]:.4f}")
    error = result["gradient_error"]
    whole, small = result["weights"]
    print(f"{result['size']}, {result['pairs']} pairs, {result['device']},", end=" ")
    print(result["dtype"], end=", ")
    print(f"torch {result['torch']}")
    print(f"  relative error of the gradients: LoRA {error['.lora_']:.4f},", end=" ")
    print(f"soft prompts {error['embed_tokens']:.4f}; losses: {', '.join(shown)}")
    print(f"  weights {whole / 1e6:.1f} -> {small / 1e6:.1f} MB (here in {result['dtype']})")
    if "time" in result:
        time = result["time"]
        spread = f"{time['low']:.2f} - {time['high']:.2f}"
        print(f"  a step takes {time['ratio']:.2f} times as long ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["toy", *SIZES], default="toy")
    parser.add_argument("--pairs", type=int, default=32, help="pairs in a batch (32)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each, 0: none (9)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    config, _, _ = SIZES["7B"]
    memory_of_7b = {"weights": compare_weights(config), "training": compare_training(config)}
    result = compare_steps(args.size, args.pairs, args.rounds)
    print_steps(result)
    if args.json:
        figures = {"7B": memory_of_7b, args.size: result}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
