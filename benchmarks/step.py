"""One training step, ours against what one would write with transformers + peft.

    python -m benchmarks.step                         a tiny model, on the CPU or what is there
    python -m benchmarks.step --size 0.9B             Qwen2-0.5B + SigLIP-so400m, on CUDA
    python -m benchmarks.step --size 7B --pairs 8     LLaVA-1.5-7B, on CUDA
    python -m benchmarks.step --size 7B --batches 16 64 256 1024
                                                      ours alone: what fits, with and without cache

The same weights (random ones), inputs and numbers, in one process, alternating. Three rungs:

    P0  what people write: three forwards (image, text, image + long caption), padded to the longest
        with masks, output_hidden_states, logits everywhere, peft's adapters as they come (fp32)
    P1  tuned: two forwards, padded on the right without masks, the head on caption rows only,
        adapters in bf16
    P2  P1 on our micro-batches, sorted by length: what is left is the difference between the layers

With --size 0.9B and 7B a micro-batch is the whole batch, so that P2 differs from P1 in nothing but
lengths that are rounded.

A step is copy, forward, backward, clipping and AdamW. Captions are as the paper's data has them: 18
tokens short, 30 to 500 long (150 on average, the 90th percentile at 250), prompts of 12 tokens.
LoRA has rank 16 on all seven linears.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fast
from benchmarks.measure import (
    DEVICE,
    count_flops,
    device_name,
    free_memory,
    paired_ratio,
    peak_memory,
    roof,
    saved_bytes,
    seconds,
    write_json,
)
from data import Batch, Sample, collate
from formats.hf import canonical_name
from lora import (
    LoRAConfig,
    add_lora,
    add_soft_prompts,
    add_temperature,
    freeze,
    trainable_parameters,
)
from losses import IGNORE, contrastive_loss
from model import Llava, LlavaConfig, TextConfig, VisionConfig
from train import TrainConfig, training_step

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TINY = LlavaConfig(  # LLaVA-1.5's image tokens and layout, narrow
    VisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    ),
    # The head costs beside the layers what it costs in 7B.
    TextConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
    ),
    image_token_id=1000,
)
SMALL = LlavaConfig(  # Qwen2-0.5B and SigLIP-so400m
    VisionConfig("siglip_vision_model", 1152, 4304, 27, 16, 3, 384, 14, "gelu_pytorch_tanh", 1e-6),
    TextConfig(
        "qwen2",
        152000,
        896,
        4864,
        24,
        14,
        2,
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    image_token_id=151646,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
)
LARGE = LlavaConfig(text=TextConfig(vocab_size=32064))
# For checks, not for times: few image tokens, grouped queries, a tied head.
SMALLEST = LlavaConfig(
    VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ),
    TextConfig(
        "qwen2",
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    image_token_id=1000,
)
# Config, pairs in a batch, sequences in a micro-batch. What is for a GPU goes through it in one
# piece: with micro-batches of 8 and 4 an H200 took 1.65 and 1.3 times as long.
SIZES = {
    "smallest": (SMALLEST, 4, 2),
    "tiny": (TINY, 16, 4),
    "0.9B": (SMALL, 32, 32),
    "7B": (LARGE, 8, 8),
}
MULTIPLE = 32 if DEVICE.type == "cuda" else 1  # to which lengths are rounded, as train.py does


class Layout:
    """Stands in for data.Layout: sequences of the right lengths, made of random tokens."""

    def __init__(self, config: LlavaConfig):
        self.prompts = [
            list(range(10, 22)),
            list(range(30, 42)),
        ]  # hand-written tokens; soft ids are behind the words
        self.soft = [
            [config.text.vocab_size + 12 * side + i for i in range(12)] for side in range(2)
        ]
        self.prefix = [1, 2, 3, 4] + [config.image_token_id] * config.num_image_tokens
        self.image_summary = len(self.prefix) + 11

    def image_side(self, caption=None, image=None) -> list[int]:
        return self.prefix + self.soft[0] + (caption + [2] if caption else [])

    def text_side(self, caption: list[int]) -> list[int]:
        return [1, 2, 3, 4] + caption + self.soft[1]


def make_samples(config: LlavaConfig, pairs: int, seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    short = random.poisson(18, pairs).clip(4, 29)
    long = (
        random.lognormal(math.log(133), 0.49, pairs).clip(30, 500).astype(int)
    )  # mean 150, 90th percentile 250
    words = lambda n: random.integers(50, 900, n).tolist()  # noqa: E731
    shape = (pairs, 3, config.vision.image_size, config.vision.image_size)
    pixels = torch.from_numpy(random.standard_normal(shape, np.float32))
    return [Sample(pixels[i], words(short[i]), words(long[i])) for i in range(pairs)]


def build_ours(config: LlavaConfig, dtype: torch.dtype) -> Llava:
    """`build_plain` with the lean layers."""
    model = build_plain(config, dtype)
    fast.install(model)
    return model


def build_plain(config: LlavaConfig, dtype: torch.dtype) -> Llava:
    """Random weights, drawn on the device itself; LoRA that has learned something, soft prompts."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = Llava(config)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    freeze(model)
    add_lora(model, LoRAConfig(rank=16, alpha=16))
    layout = Layout(config)
    add_soft_prompts(model, *layout.prompts)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    add_temperature(model, 0.07)
    return model.train()


def transformers_twin(ours: Llava) -> nn.Module:
    """transformers' LLaVA on the same weights in memory."""
    import transformers

    raw = ours.config.to_dict()
    config = transformers.LlavaConfig(
        **{k: v for k, v in raw.items() if k not in ("architectures", "model_type")}
    )
    torch.set_default_dtype(ours.dtype)
    with torch.device(ours.device):
        theirs = transformers.LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    weights = {}
    for name, parameter in ours.named_parameters(remove_duplicate=False):
        weights[name.replace(".base_layer", "")] = parameter.detach()
    shared = {
        name: weights[canonical_name(name)]
        for name in theirs.state_dict()
        if canonical_name(name) in weights
    }
    theirs.load_state_dict(shared, strict=False, assign=True)
    return theirs


def build_theirs(ours: Llava) -> nn.Module:
    """transformers' LLaVA with peft's LoRA, on the same weights in memory and the same values of
    what trains.
    """
    import peft

    theirs = transformers_twin(ours)
    add_soft_prompts(theirs.model, *Layout(ours.config).prompts)
    soft = theirs.model.language_model.embed_tokens
    model = peft.get_peft_model(
        theirs, peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
    )
    for parameter in (soft.image, soft.text):
        parameter.requires_grad_(True)
    named = their_parameters(model)
    with torch.no_grad():
        for name, parameter in adapter_parameters(ours).items():
            named[name].copy_(parameter)
    return model.train()


def adapter_parameters(model: Llava) -> dict[str, nn.Parameter]:
    """What trains, but for the temperature, which the rungs have outside of the model."""
    named = trainable_parameters(model)
    return {name: parameter for name, parameter in named.items() if name != "log_scale"}


def their_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, under our names."""
    rename = lambda name: name.replace("base_model.model.model.", "").replace(".default", "")  # noqa: E731
    return {rename(name): p for name, p in model.named_parameters() if p.requires_grad}


# ---- The rungs. Each adds gradients to the parameters and returns both losses.


class P0:
    """What people write."""

    adapter_dtype = torch.float32

    def __init__(self, config: LlavaConfig, samples: list[Sample], batch: Batch):
        layout = Layout(config)

        def pad(rows):
            rows = [torch.tensor(row) for row in rows]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True)

        def mask(rows):
            return pad([[1] * len(row) for row in rows])

        images, texts = (
            [layout.image_side()] * len(samples),
            [layout.text_side(s.short) for s in samples],
        )
        captioned = [layout.image_side(s.long) for s in samples]
        labels = pad(captioned)
        labels[:, : layout.image_summary + 1] = IGNORE
        labels[mask(captioned) == 0] = IGNORE
        self.rows = [(pad(rows), mask(rows)) for rows in (images, texts, captioned)]
        self.labels, self.pixels = labels, torch.stack([s.pixel_values for s in samples])

    def __call__(self, model, scale):
        device = model.device
        (images, image_mask), (texts, text_mask), (captioned, caption_mask) = (
            (ids.to(device), mask.to(device)) for ids, mask in self.rows
        )
        pixels = self.pixels.to(device, model.dtype)
        output = model(
            input_ids=images,
            attention_mask=image_mask,
            pixel_values=pixels,
            output_hidden_states=True,
        )
        image_embeddings = output.hidden_states[-1][:, -1]
        output = model(input_ids=texts, attention_mask=text_mask, output_hidden_states=True)
        last = text_mask.sum(1) - 1
        text_embeddings = output.hidden_states[-1][torch.arange(len(last), device=device), last]
        autoregressive = model(
            input_ids=captioned,
            attention_mask=caption_mask,
            pixel_values=pixels,
            labels=self.labels.to(device),
        ).loss
        contrastive = contrastive_loss(image_embeddings, text_embeddings, scale)
        (contrastive + autoregressive).backward()
        return contrastive, autoregressive


class P2:
    """Tuned, on the chunks of a Batch: sorted by length, or one for each side (P1)."""

    adapter_dtype = None  # the base's

    def __init__(self, config: LlavaConfig, samples: list[Sample], batch: Batch):
        self.batch = batch

    def __call__(self, model, scale):
        llava, head = model.base_model.model.model, model.base_model.model.lm_head
        embeddings, autoregressive = {}, 0.0
        for side, chunks in (("image", self.batch.images), ("text", self.batch.texts)):
            rows, pairs = [], []
            for chunk in chunks:
                chunk = chunk.to(model.device)
                pixels = None if chunk.pixel_values is None else chunk.pixel_values.to(model.dtype)
                hidden = llava(
                    input_ids=chunk.input_ids, pixel_values=pixels, use_cache=False
                ).last_hidden_state
                rows.append(hidden[torch.arange(len(hidden), device=hidden.device), chunk.summary])
                pairs.append(chunk.pair)
                if chunk.labels is not None:
                    known = chunk.labels != IGNORE
                    logits = head(hidden[known]).float()
                    autoregressive += F.cross_entropy(logits, chunk.labels[known], reduction="sum")
            embeddings[side] = torch.cat(rows)[torch.cat(pairs).argsort()]
        autoregressive = autoregressive / self.batch.num_tokens
        contrastive = contrastive_loss(embeddings["image"], embeddings["text"], scale)
        (contrastive + autoregressive).backward()
        return contrastive, autoregressive


class P1(P2):
    """Tuned, each side in one piece."""

    def __init__(self, config: LlavaConfig, samples: list[Sample], batch: Batch):
        self.batch = collate(samples, Layout(config), len(samples))


class Contender:
    """A model, its step and its optimizer."""

    def __init__(self, model, parameters: dict[str, nn.Parameter], step, log_scale):
        self.model, self.parameters, self.step = model, parameters, step
        self.log_scale = log_scale
        self.optimizer = torch.optim.AdamW([*parameters.values(), self.log_scale], lr=1e-5)

    def gradients(self) -> tuple:
        self.optimizer.zero_grad()
        losses = self.step(self.model, self.log_scale)
        return losses, {name: p.grad.float().clone() for name, p in self.parameters.items()}

    def full_step(self) -> None:
        self.step(self.model, self.log_scale)
        nn.utils.clip_grad_norm_([*self.parameters.values(), self.log_scale], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def contender(
    name: str,
    ours: Llava,
    theirs,
    samples: list[Sample],
    batch: Batch,
    micro_batch: int,
    **settings,
):
    if name == "ours":
        config = TrainConfig(
            micro_batch=micro_batch, batch_size=len(samples), caption_share=1.0, **settings
        )

        def step(model, log_scale):  # it is the model's own
            return training_step(model, batch, config)

        return Contender(ours, adapter_parameters(ours), step, ours.log_scale)
    rung = {"P0": P0, "P1": P1, "P2": P2}[name](ours.config, samples, batch)
    for key, parameter in their_parameters(theirs).items():
        if ".lora_" in key:
            parameter.data = parameter.data.to(rung.adapter_dtype or ours.dtype)
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=theirs.device))

    def their_step(model, log_scale):
        return rung(model, log_scale.exp())

    return Contender(theirs, their_parameters(theirs), their_step, log_scale)


# ---- Tables


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(((theirs[name] - ours[name]).norm() / ours[name].norm()).item() for name in ours)


def figures(contender: Contender, weights: list[torch.Tensor]) -> dict:
    """FLOPs and memory of a step: on CUDA what the allocator held at most beyond what was there
    before, on the CPU what autograd keeps."""
    if DEVICE.type == "cuda":
        contender.optimizer.zero_grad()
        row = {"peak_gb": peak_memory(contender.full_step) / 1e9}
    else:
        row = {"saved_bytes": saved_bytes(contender.gradients, weights)}
    row["flops"] = count_flops(contender.gradients)
    return row


def no_report(result) -> None:
    """For callers who wait for the whole result."""


class Comparison:
    """Ours and the rungs on the same weights; batches of as many pairs as a rung can hold."""

    def __init__(self, size: str, dtype: torch.dtype, pairs: int):
        self.config, _, self.micro_batch = SIZES[size]
        self.samples = make_samples(self.config, pairs)
        self.ours = build_ours(self.config, dtype)
        self.theirs = build_theirs(self.ours)
        free_memory()  # the weights that transformers drew, before it got ours
        named = adapter_parameters(self.ours)
        self.start = {name: parameter.detach().clone() for name, parameter in named.items()}
        self.weights = [*self.ours.parameters(), *self.theirs.parameters()]
        self.our_sides: dict[int, tuple] = {}  # by the number of pairs

    def contender(
        self, name: str, samples: list[Sample], micro_batch: int, multiple: int
    ) -> Contender:
        """A contender on these samples, its parameters at their start."""
        batch = collate(samples, Layout(self.config), micro_batch, multiple=multiple)
        made = contender(name, self.ours, self.theirs, samples, batch, micro_batch)
        with torch.no_grad():
            for key, parameter in made.parameters.items():
                parameter.copy_(self.start[key])  # whatever the steps before have made of it
            made.log_scale.fill_(math.log(1 / 0.07))
        return made

    def our_side(self, pairs: int) -> tuple:
        """-> our contender, losses, gradients and figures with so many pairs."""
        if pairs not in self.our_sides:
            samples = self.samples[:pairs]
            mine = self.contender("ours", samples, self.micro_batch, MULTIPLE)
            losses, gradients = mine.gradients()
            own = figures(mine, self.weights)
            own["floor_flops"] = self.needed_flops(samples)
            self.our_sides[pairs] = (mine, losses, gradients, own)
        return self.our_sides[pairs]

    def needed_flops(self, samples: list[Sample]) -> int:
        """The work that has to be done: one sequence at a time, so that nothing is padded.

        A sequence's FLOPs are a polynomial of second degree in its length. Three lengths of each
        side tell it; counting every sequence would take longer than all that is timed."""
        short = (4, 16, 28)
        long = (40, 200, 360)

        def count(short: int, long: int) -> int:
            words = [50]
            pair = Sample(samples[0].pixel_values, short * words, long * words)
            return count_flops(self.contender("ours", [pair], 1, 1).gradients)

        least = count(short[0], long[0])
        of_short = [least, count(short[1], long[0]), count(short[2], long[0])]
        of_long = [least, count(short[0], long[1]), count(short[0], long[2])]
        by_short = np.polyfit(short, of_short, 2)
        by_long = np.polyfit(long, of_long, 2)
        total = 0
        for sample in samples:
            total += np.polyval(by_short, len(sample.short))
            total += np.polyval(by_long, len(sample.long)) - least
        return round(total)

    def rung(self, name: str, pairs: int, rounds: int) -> dict:
        """One row of the table."""
        mine, losses, gradients, own = self.our_side(pairs)
        other = self.contender(name, self.samples[:pairs], self.micro_batch, MULTIPLE)
        their_losses, their_gradients = other.gradients()
        row = {"pairs": pairs}
        row["gradient_difference"] = largest_difference(gradients, their_gradients)
        ratios = [
            losses[key] / loss.item()
            for key, loss in zip(("contrastive", "autoregressive"), their_losses)
        ]
        row["loss_difference"] = max(abs(ratio - 1) for ratio in ratios)
        del their_gradients
        mine.optimizer.zero_grad()
        other.optimizer.zero_grad()
        free_memory()
        row |= paired_ratio(mine.full_step, other.full_step, rounds)
        row |= figures(other, self.weights)
        other.optimizer.zero_grad()
        for key in ("flops", "saved_bytes", "peak_gb"):
            if key in row:
                row[f"{key} / ours"] = row[key] / own[key]
        return row


def largest_that_fits(comparison: Comparison, name: str, pairs: int, rounds: int) -> dict:
    """The row of a rung with `pairs` pairs, or with a half, a quarter, ... of them where the GPU is
    too small for it."""
    while pairs >= 2:
        row = None
        try:
            row = comparison.rung(name, pairs, rounds)
        except torch.cuda.OutOfMemoryError:
            print(f"{name} with {pairs} pairs: out of memory", flush=True)
        free_memory()  # here, for inside of `except` the failed frames are still alive
        if row is not None:
            return row
        pairs //= 2
    return {"pairs": 0}


def compare(
    size: str,
    dtype: torch.dtype,
    pairs: int,
    rungs: list[str],
    rounds: int,
    report: Callable = no_report,
    fewer: dict[str, int] | None = None,
) -> dict:
    """All rungs beside ours.

    report: is given the result so far, whenever there is a new row.
    fewer: the pairs to begin with of a rung that is known not to hold `pairs`."""
    result = {
        "size": size,
        "dtype": str(dtype),
        "device": device_name(),
        "torch": torch.__version__,
        "roof_tflops": roof(dtype) / 1e12,
        "ours": {},
        "rows": {},
    }
    comparison = Comparison(size, dtype, pairs)
    for name in rungs:
        begin = (fewer or {}).get(name, pairs)
        row = largest_that_fits(comparison, name, begin, rounds)
        result["rows"][name] = row
        number = row["pairs"]
        if number:
            _, _, _, own = comparison.our_sides[number]
            fastest = min(row["seconds_of_first"], own.get("seconds", math.inf))
            own["seconds"] = fastest
            own["pairs_per_second"] = number / fastest
            needed = own["floor_flops"] / fastest
            own["useful_mfu"] = needed / (1e12 * result["roof_tflops"])
            result["ours"][str(number)] = own
        report(result)
    return result


def what_fits(
    size: str,
    dtype: torch.dtype,
    batches: list[int],
    caches: tuple[bool, ...] = (False, True),
    time_limit: float = math.inf,
    report: Callable = no_report,
) -> list[dict]:
    """Ours alone: pairs/s and peak memory of growing batches, with all activations held and with
    the gradient cache.

    time_limit: seconds; a batch that would not end within them is left out.
    report: is given the rows so far, whenever there is a new one."""
    began = time.perf_counter()
    config, _, micro_batch = SIZES[size]
    model = build_ours(config, dtype)
    rows = []
    for cache in caches:
        pace = 0.0  # seconds a pair of the batch before, its making and both of its steps
        for pairs in batches:
            if time.perf_counter() - began + pace * pairs > time_limit:
                break
            started = time.perf_counter()
            row = one_batch(model, config, micro_batch, pairs, cache)
            pace = (time.perf_counter() - started) / pairs
            row = {"size": size} | row
            print(json.dumps(row), flush=True)
            rows.append(row)
            report(rows)
            if row["peak_gb"] is None:
                break
    return rows


def one_batch(model: Llava, config: LlavaConfig, micro_batch: int, pairs: int, cache: bool) -> dict:
    """A row of `what_fits`. Its peak is None where the memory is too small."""
    row = {"pairs": pairs, "gradient_cache": cache, "peak_gb": None}
    samples = make_samples(config, pairs)
    batch = collate(samples, Layout(config), micro_batch, multiple=MULTIPLE)
    mine = contender("ours", model, None, samples, batch, micro_batch, gradient_cache=cache)
    try:
        started = time.perf_counter()
        peak = peak_memory(mine.full_step)
        taken = time.perf_counter() - started
        if taken < 10:  # then the first step was a warm-up; of longer ones, that is a small part
            taken = seconds(mine.full_step)
        row["peak_gb"] = peak / 1e9
        row["seconds_a_pair"] = taken / pairs
        row["pairs_per_second"] = pairs / taken
    except torch.cuda.OutOfMemoryError:
        pass
    mine.optimizer.zero_grad()
    free_memory()
    return row


def print_result(result: dict) -> None:
    print(
        f"{result['size']}, {result['device']}, {result['dtype'][6:]}, torch {result['torch']}, "
        f"a matrix product reaches {result['roof_tflops']:.1f} TFLOP/s"
    )
    kept = "peak_gb" if DEVICE.type == "cuda" else "saved_bytes"
    print(
        f"{'':6}{'pairs':>6}{'time / ours':>24}{kept + ' / ours':>20}{'FLOPs / ours':>14}"
        f"{'gradients':>12}"
    )
    for name, row in result["rows"].items():
        if not row["pairs"]:
            print(f"{name:6}{'out of memory':>16}")
            continue
        spread = f"{row['ratio']:.2f} ({row['low']:.2f} - {row['high']:.2f})"
        print(
            f"{name:6}{row['pairs']:>6}{spread:>24}{row[kept + ' / ours']:>20.2f}"
            f"{row['flops / ours']:>14.2f}{row['gradient_difference']:>12.1e}"
        )
    for pairs, own in result["ours"].items():
        size = 1e9 * own[kept] if kept == "peak_gb" else own[kept]
        print(
            f"ours, {pairs} pairs: {size / int(pairs) / 1e6:.1f} MB a pair, "
            f"{own['pairs_per_second']:.1f} pairs/s, "
            f"{own['flops'] / own['floor_flops']:.3f} of the needed FLOPs, "
            f"{100 * own['useful_mfu']:.0f} % of a matrix product"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pairs", type=int, help="pairs in a batch (16, 32, 8)")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timed steps (9)")
    parser.add_argument(
        "--rungs", nargs="+", choices=["P0", "P1", "P2"], default=["P0", "P1", "P2"]
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, help="ours alone at these batch sizes (CUDA)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    write = partial(write_json, args.json)
    if args.batches:
        what_fits(args.size, dtype, args.batches, report=write)
        return
    pairs = args.pairs or SIZES[args.size][1]
    print_result(compare(args.size, dtype, pairs, args.rungs, args.rounds, report=write))


if __name__ == "__main__":
    main()
