"""Does a GPU compute what the CPU computes? The losses, LoRA, int8, a training step, a run that
goes on, generation: in fp32 beside fp64 on the CPU, with an error that rounding alone explains.

    python -m benchmarks.correctness       on the GPU, or on the CPU where there is none

The products of matrices are whole fp32 here: TF32, which convolutions use on a GPU unless they are
told not to, has three digits. Errors are ||found - expected|| / ||expected||, the largest of all
values and gradients.
"""

import argparse
import contextlib
import copy
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import train
from benchmarks.measure import DEVICE, device_name
from benchmarks.step import (
    SMALLEST,
    Comparison,
    Layout,
    build_ours,
    build_plain,
    make_samples,
)
from data import collate, open_image
from eval import TOY_MODEL, caption, encode_image, load_base
from fast.chunked import linear_cross_entropy, tiled_contrastive_loss
from fast.int8 import Int8Linear
from fast.lean import keep_x, project
from lora import LoRAConfig, LoRALinear, trainable_parameters
from losses import IGNORE, contrastive_loss, cross_entropy
from toy import world
from train import TrainConfig, training_step

Tensors = list[torch.Tensor]


def largest_error(found: Tensors, expected: Tensors) -> float:
    """The largest relative error of several tensors. NaN where one is NaN."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        a = a.detach().double().cpu()
        b = b.detach().double().cpu()
        errors.append((a - b).norm() / b.norm())
    return torch.stack(errors).max().item()


def moved(tensors: Tensors, device, dtype: torch.dtype) -> Tensors:
    """Copies with gradients of their own; whole numbers stay what they are."""
    copies = []
    for tensor in tensors:
        if tensor.is_floating_point():
            copies.append(tensor.to(device, dtype, copy=True).requires_grad_())
        else:
            copies.append(tensor.to(device))
    return copies


def value_and_gradients(function: Callable, inputs: Tensors) -> Tensors:
    value = function(*inputs)
    value.backward()
    return [value] + [tensor.grad for tensor in inputs if tensor.is_floating_point()]


def error_of_loss(found: Callable, expected: Callable, inputs: Tensors) -> float:
    """`found` in fp32 on the device beside `expected` in fp64 on the CPU."""
    exact = value_and_gradients(expected, moved(inputs, "cpu", torch.float64))
    rounded = value_and_gradients(found, moved(inputs, DEVICE, torch.float32))
    return largest_error(rounded, exact)


# ---- The checks. Each returns an error.
def contrastive(loss: Callable) -> float:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 64, generator=generator)
    texts = images + torch.randn(300, 64, generator=generator)
    return error_of_loss(loss, contrastive_loss, [images, texts, torch.tensor(14.0)])


def language(loss: Callable) -> float:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 32, generator=generator)
    weight = torch.randn(500, 32, generator=generator)
    labels = torch.randint(500, (700,), generator=generator)
    labels[::3] = IGNORE
    number = int((labels != IGNORE).sum())
    return error_of_loss(
        lambda h, w, y: loss(h, w, y, number),
        lambda h, w, y: cross_entropy(h, w, y, number),
        [hidden, weight, labels],
    )


def tiled(images, texts, scale):
    return tiled_contrastive_loss(images, texts, scale, tile=64)


def chunked(hidden, weight, labels, number):
    return linear_cross_entropy(hidden, weight, labels, number, chunk_bytes=1)  # 256 rows


def adapter(lean: bool, int8: bool) -> float:
    """A frozen layer with LoRA; `project` is what the lean decoder layer computes it by."""
    torch.manual_seed(0)
    frozen = nn.Linear(48, 80).requires_grad_(False)
    layer = LoRALinear(Int8Linear(frozen) if int8 else frozen, LoRAConfig(rank=4, alpha=8))
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 17, 48)
    upstream = torch.randn(3, 17, 80)

    def run(device, dtype: torch.dtype, lean: bool) -> Tensors:
        copied = copy.deepcopy(layer)
        for parameter in copied.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        copied.to(device)
        inputs = x.to(device, dtype, copy=True).requires_grad_()
        y = project([copied], keep_x, inputs)[0] if lean else copied(inputs)
        y.backward(upstream.to(device, dtype))
        return [y, inputs.grad, copied.lora_A.weight.grad, copied.lora_B.weight.grad]

    return largest_error(run(DEVICE, torch.float32, lean), run("cpu", torch.float64, False))


def int8_steps() -> float:
    """The share of weights that a GPU rounds to another step than the CPU."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 200)
    on_cpu = Int8Linear(layer).weight
    on_device = Int8Linear(copy.deepcopy(layer).to(DEVICE)).weight.cpu()
    return (on_cpu != on_device).double().mean().item()


def step_and_gradients(model, batch, config: TrainConfig) -> Tensors:
    losses = training_step(model, batch, config)
    gradients = [parameter.grad for parameter in trainable_parameters(model).values()]
    values = [torch.tensor(losses[name]) for name in ("contrastive", "autoregressive")]
    return values + gradients


def training(**settings) -> float:
    """A training step of a small model: the losses, and the gradients of all that trains."""
    settings = {"micro_batch": 2, "batch_size": 6, "caption_share": 1.0} | settings
    config = TrainConfig(**settings)
    batch = collate(make_samples(SMALLEST, 6), Layout(SMALLEST), 2)
    build = build_ours if config.fast else build_plain
    model = build(SMALLEST, torch.float32)
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    plain = TrainConfig(**settings | {"fast": False, "gradient_cache": False})
    expected = step_and_gradients(exact, batch, plain)
    return largest_error(step_and_gradients(model, batch, config), expected)


def rungs() -> float:
    """The peers of benchmarks/step.py compute the same step as ours, on the device."""
    comparison = Comparison("smallest", torch.float32, 6)
    mine = comparison.contender("ours", comparison.samples, 2, 1)
    _, expected = mine.gradients()
    errors = []
    for name in ("P0", "P1", "P2"):
        _, found = comparison.contender(name, comparison.samples, 2, 1).gradients()
        errors.append(largest_error([found[key] for key in expected], list(expected.values())))
    return max(errors)


def pictures(folder: Path) -> list:
    return [open_image(path) for path in sorted((folder / "images" / "test").iterdir())[:4]]


def embeddings(folder: Path) -> float:
    found = encode_image(load_base(TOY_MODEL, DEVICE, dtype=torch.float32), pictures(folder))
    expected = encode_image(load_base(TOY_MODEL, "cpu", dtype=torch.float32), pictures(folder))
    return largest_error([found], [expected])


def generation(folder: Path) -> float:
    """The share of pictures of which greedy captions differ."""
    found = caption(load_base(TOY_MODEL, DEVICE, dtype=torch.float32), pictures(folder))
    expected = caption(load_base(TOY_MODEL, "cpu", dtype=torch.float32), pictures(folder))
    print(expected, found)
    differing = [a != b for a, b in zip(found, expected, strict=True)]
    return sum(differing) / len(differing)


def run_of_the_toy(folder: Path, out: Path) -> None:
    command = ["--data", str(folder / "train.jsonl"), "--tests", "none", "--out", str(out)]
    command += ["--steps", "6", "--save_every", "3", "--batch_size", "8", "--lora_dropout", "0.1"]
    train.main(command)


def distance_of_runs(a: Path, b: Path) -> float:
    """Of all that the last checkpoints of two runs hold."""
    errors = []
    for name in ("adapter_model", "soft_prompts", "training_state"):
        first = load_file(a / "checkpoints" / "step-6" / f"{name}.safetensors")
        second = load_file(b / "checkpoints" / "step-6" / f"{name}.safetensors")
        for key in first:
            if not torch.equal(first[key], second[key]):
                errors.append(largest_error([second[key]], [first[key]]))
    return max(errors, default=0.0)


def resumed(folder: Path) -> float:
    """A run that goes on from its third step beside one that was not stopped: nothing differs, as
    deterministic kernels are asked for. In the device's own precision, with dropout."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as place:
            whole = Path(place) / "whole"
            run_of_the_toy(folder, whole)
            again = Path(place) / "again"
            run_of_the_toy(folder, again)
            stopped = shutil.copytree(whole, Path(place) / "stopped")
            shutil.rmtree(stopped / "checkpoints" / "step-6")
            (stopped / "checkpoints" / "latest").write_text("step-3\n")
            train.main(["--resume", "--out", str(stopped)])
            print(f"two undisturbed runs differ by {distance_of_runs(whole, again):.1e}")
            return distance_of_runs(whole, stopped)
    finally:
        torch.use_deterministic_algorithms(False)


def checks(folder: Path) -> dict[str, tuple[Callable[[], float], float]]:
    """Name: (check, largest error that passes). folder: a toy world, however small."""
    # Sums of some hundred fp32 numbers; a step has several of them behind one another.
    sums = 3e-5
    step = 3e-4
    return {
        "contrastive loss": (lambda: contrastive(contrastive_loss), sums),
        "contrastive loss, tiled": (lambda: contrastive(tiled), sums),
        "cross-entropy": (lambda: language(cross_entropy), sums),
        "cross-entropy, chunked": (lambda: language(chunked), sums),
        "LoRA": (lambda: adapter(lean=False, int8=False), sums),
        "LoRA, lean": (lambda: adapter(lean=True, int8=False), sums),
        "LoRA on int8": (lambda: adapter(lean=False, int8=True), sums),
        "LoRA on int8, lean": (lambda: adapter(lean=True, int8=True), sums),
        "int8, other steps": (int8_steps, 1e-3),
        "training step, plain": (lambda: training(fast=False), step),
        "training step, fast": (training, step),
        "training step, gradient cache": (lambda: training(gradient_cache=True), step),
        "training step, checkpointed": (checkpointed, step),
        "P0, P1, P2 beside ours": (rungs, step),
        "toy: embeddings": (lambda: embeddings(folder), sums),
        "toy: greedy captions, other ones": (lambda: generation(folder), 0.0),
        "toy: resumed beside undisturbed": (lambda: resumed(folder), 0.0),
    }


def checkpointed() -> float:
    """Layers computed a second time keep the gradients, beside the same layers that are held."""
    batch = collate(make_samples(SMALLEST, 6), Layout(SMALLEST), 2)
    config = TrainConfig(micro_batch=2, batch_size=6, caption_share=1.0)
    model = build_ours(SMALLEST, torch.float32)
    expected = [tensor.clone() for tensor in step_and_gradients(model, batch, config)]
    model.zero_grad()
    model.language_model.checkpoint_layers = 1
    return largest_error(step_and_gradients(model, batch, config), expected)


def run(folder: Path, report: Callable[[str, str, dict], None]) -> None:
    """All checks. report: is given the name, the finding in words, and in numbers."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; read at the start
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for name, (check, most) in checks(folder).items():
        error = None
        try:
            error = check()
            verdict = "ok" if error <= most else "TOO MUCH"  # NaN is too much
            text = f"{verdict}, {error:.1e} of {most:.0e}"
        except (Exception, SystemExit) as problem:  # the next ones may tell why
            lines = str(problem).strip().splitlines() or [""]
            text = f"FAILED, {type(problem).__name__}: {lines[0][:150]}"
        report(name, text, {"error": error, "most": most})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(f"{device_name()}, torch {torch.__version__}")
    found = {}

    def report(name: str, text: str, figures: dict) -> None:
        found[name] = figures
        print(f"{name}: {text}", file=sys.__stdout__, flush=True)

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = world.build(Path(place) / "world", train_scenes=48, test_scenes=12)
        run(folder, report)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
