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

A step is copy, forward, backward, clipping and AdamW. Captions are as the paper's data has them: 18
tokens short, 30 to 500 long (150 on average, the 90th percentile at 250), prompts of 12 tokens.
LoRA has rank 16 on all seven linears.
"""

import argparse
import json
import math
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
    paired_ratio,
    peak_memory,
    roof,
    saved_bytes,
    seconds,
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
# Config, pairs in a batch, sequences in a micro-batch.
SIZES = {"tiny": (TINY, 16, 4), "0.9B": (SMALL, 32, 8), "7B": (LARGE, 8, 4)}


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
    """Random weights, LoRA that has learned something, soft prompts."""
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
    row = {
        "flops": count_flops(contender.gradients),
        "saved_bytes": saved_bytes(contender.gradients, weights),
    }
    if DEVICE.type == "cuda":
        row["peak_gb"] = peak_memory(contender.full_step) / 1e9
    return row


def compare(size: str, dtype: torch.dtype, pairs: int, rungs: list[str], rounds: int) -> dict:
    config, _, micro_batch = SIZES[size]
    samples = make_samples(config, pairs)
    batch = collate(
        samples, Layout(config), micro_batch, multiple=32 if DEVICE.type == "cuda" else 1
    )
    tight = collate(samples, Layout(config), 1)  # nothing is padded: the work that has to be done
    ours = build_ours(config, dtype)
    theirs = build_theirs(ours)
    start = {name: p.detach().clone() for name, p in adapter_parameters(ours).items()}
    mine = contender("ours", ours, theirs, samples, batch, micro_batch)
    losses, gradients = mine.gradients()
    own = figures(mine, [*ours.parameters(), *theirs.parameters()])
    own["floor_flops"] = count_flops(contender("ours", ours, theirs, samples, tight, 1).gradients)
    result = {
        "size": size,
        "dtype": str(dtype),
        "device": device_name(),
        "pairs": pairs,
        "torch": torch.__version__,
    }
    result["rows"] = rows = {"ours": own}
    for name in rungs:
        other = contender(name, ours, theirs, samples, batch, micro_batch)
        with torch.no_grad():
            for key, parameter in other.parameters.items():
                parameter.copy_(start[key])  # whatever the steps of the rung before have made of it
        their_losses, their_gradients = other.gradients()
        rows[name] = figures(other, [*ours.parameters(), *theirs.parameters()]) | {
            "gradient_difference": largest_difference(gradients, their_gradients),
            "loss_difference": max(
                abs(losses[key] / loss.item() - 1)
                for key, loss in zip(("contrastive", "autoregressive"), their_losses)
            ),
        }
        rows[name] |= paired_ratio(mine.full_step, other.full_step, rounds)
    fastest = min(rows[name]["seconds_of_first"] for name in rungs)
    own |= {
        "pairs_per_second": pairs / fastest,
        "useful_mfu": own["floor_flops"] / fastest / roof(dtype),
    }
    return result


def what_fits(size: str, dtype: torch.dtype, batches: list[int]) -> list[dict]:
    """Ours alone: pairs/s and peak memory of growing batches, with all activations held and with
    the gradient cache.
    """
    config, _, micro_batch = SIZES[size]
    model, rows = build_ours(config, dtype), []
    for cache in (False, True):
        for pairs in batches:
            samples = make_samples(config, pairs)
            batch = collate(samples, Layout(config), micro_batch, multiple=32)
            mine = contender("ours", model, None, samples, batch, micro_batch, gradient_cache=cache)
            row = {"size": size, "pairs": pairs, "gradient_cache": cache}
            try:
                row["peak_gb"] = peak_memory(mine.full_step) / 1e9
                row["pairs_per_second"] = pairs / min(seconds(mine.full_step) for _ in range(2))
            except torch.cuda.OutOfMemoryError:
                row["peak_gb"] = None  # out of memory
                torch.cuda.empty_cache()
            mine.optimizer.zero_grad()
            print(json.dumps(row), flush=True)
            rows.append(row)
            if row["peak_gb"] is None:
                break
    return rows


def print_result(result: dict) -> None:
    own = result["rows"]["ours"]
    print(
        f"{result['size']}, {result['device']}, {result['dtype'][6:]}, "
        f"torch {result['torch']}, {result['pairs']} pairs"
    )
    print(
        f"{'':6}{'time / ours':>24}{'saved / ours':>14}{'FLOPs / ours':>14}"
        f"{'peak / ours':>13}{'gradients':>12}"
    )
    for name, row in result["rows"].items():
        if name != "ours":
            peak = f"{row['peak_gb'] / own['peak_gb']:.2f}" if "peak_gb" in row else "-"
            print(
                f"{name:6}{row['ratio']:>10.2f} ({row['low']:.2f} - {row['high']:.2f})"
                f"{row['saved_bytes'] / own['saved_bytes']:>14.2f}"
                f"{row['flops'] / own['flops']:>14.2f}{peak:>13}"
                f"{row['gradient_difference']:>12.1e}"
            )
    print(
        f"ours: {own['saved_bytes'] / result['pairs'] / 1e6:.1f} MB kept "
        f"and {own['pairs_per_second']:.1f} pairs/s,",
        end="",
    )
    print(
        f" {own['flops'] / own['floor_flops']:.3f} of the needed FLOPs, "
        f"{100 * own['useful_mfu']:.0f} % of a matmul"
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
    if args.batches:
        result = what_fits(args.size, dtype, args.batches)
    else:
        result = compare(
            args.size, dtype, args.pairs or SIZES[args.size][1], args.rungs, args.rounds
        )
        print_result(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
