"""Fine-tune a LLaVA into an embedding model that still captions: VladVA (CVPR 2025, arXiv 2412.04378).

    python train.py                        the toy job: no network, no GPU, a few minutes on a laptop
    python train.py --model llava-1.5-7b-hf --data captions.jsonl --out runs/mine \\
        --lr 1e-4 --soft_lr 1e-3 --caption_share 1 --batch_size 16
    python train.py --help                 every setting, with its default
    python train.py check                  is everything here that the toy job needs?

Contrastive loss on short captions + autoregressive loss on long ones, the image side of both in one forward pass; soft
prompts + LoRA learn, everything else is frozen. A run folder holds config.json, log.jsonl, results.json, pictures and
checkpoints/; `python eval.py caption photo.jpg --model runs/mine` uses it.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__" and sys.argv[1:] == ["check"]:  # first of all: what is imported below may be missing
    from toy.check import main as check

    sys.exit(check())

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    IMAGE_PROMPT,
    TEXT_PROMPT,
    Batch,
    CaptionDataset,
    Chunk,
    DataError,
    Layout,
    ResumableSampler,
    Sample,
    collate,
    open_image,
    read_karpathy,
)
from eval import (
    USER_ERRORS,
    Embeddings,
    Run,
    caption,
    evaluate,
    gallery,
    inspect_base,
    load_base,
    paper_rows,
    pick_device,
    print_table,
    summary,
)
from lora import LoRAConfig, add_lora, add_soft_prompts, freeze, quantize, save_adapter, trainable_parameters
from losses import (
    backward_cached,
    backward_whole,
    gather_with_gradient,
    linear_cross_entropy,
    tiled_contrastive_loss,
    vladva_loss,
)
from model import Llava, LlavaConfig


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Every setting; the defaults are the toy job. Flags are made from the fields."""

    model: str = setting("toy/tiny-llava", "folder of the LLaVA to fine-tune")
    data: str = setting("", "training data, JSON lines as in data.py (empty: the toy world, made if it is missing)")
    image_root: str = setting("", "where the training pictures are (empty: beside the data)")
    tests: str = setting("", "tables before and after: a tests.json as in eval.evaluate (empty: none, or the toy's)")
    out: str = setting("runs/toy", "run folder; a former run of train.py there is replaced, anything else left alone")
    steps: int = setting(150, "optimiser steps")
    batch_size: int = setting(128, "images in a batch, the negatives of one another")
    micro_batch: int = setting(32, "sequences of like length that go through the model together")
    gradient_cache: bool = setting(False, "hold one micro-batch's activations at a time: exact, 1.4 times the work")
    checkpoint_layers: int = setting(0, "first layers whose activations are computed again instead of held")
    compile: bool = setting(False, "compile the language model's layers: a minute or two at the start, faster steps")
    caption_share: float = setting(0.25, "share of a batch whose long captions are trained on (paper: 1)")
    contrast: str = setting("short", "captions of the contrastive loss: short, or long (which collapses)")
    groups: bool = setting(True, "keep records of one group, such as a scene and its twin, neighbours")
    contrastive_weight: float = setting(1.0, "weight of the contrastive loss (0 switches it off)")
    ar_weight: float = setting(1.0, "weight of the autoregressive loss (0 switches it off)")
    soft_prompts: bool = setting(True, "learn the two prompts")
    lora_rank: int = setting(16, "rank of LoRA (0 switches it off)")
    lora_alpha: float = setting(16.0, "LoRA's output is scaled by alpha / rank")
    lora_dropout: float = setting(0.0, "dropout in front of LoRA")
    int8: bool = setting(False, "hold the language model's frozen layers in int8: about half the memory of weights")
    image_prompt: str = setting(IMAGE_PROMPT, "what follows an image")
    text_prompt: str = setting(TEXT_PROMPT, "what follows a text")
    lr: float = setting(4e-3, "peak learning rate of LoRA (paper, 7B: 1e-4)")
    soft_lr: float = setting(4e-2, "peak learning rate of the soft prompts")
    temperature: float = setting(0.07, "where the learnable temperature of the contrastive loss starts, >= 0.01")
    temperature_lr: float = setting(1e-2, "its peak learning rate")
    weight_decay: float = setting(0.0, "of LoRA")
    warmup: int = setting(20, "steps up to the peak learning rate; a cosine down to 5 % of it follows")
    clip: float = setting(1.0, "largest norm of the gradient")
    seed: int = setting(0, "of LoRA's start and dropout, the order of the data, the choice of captions")
    workers: int = setting(0, "processes that read data (0: the training process itself)")
    save_every: int = setting(0, "steps between checkpoints (0: only the last)")
    device: str = setting("", "cpu, cuda, cuda:1, mps (empty: the best one here)")

    def check(self) -> None:
        """Raise DataError for values that cannot work, all in one message."""
        counts = (self.steps, self.batch_size, self.micro_batch)
        rates = (self.lr, self.soft_lr, self.temperature_lr, self.contrastive_weight, self.ar_weight, self.weight_decay)
        whole = (self.lora_rank, self.workers, self.save_every, self.warmup, self.seed, self.checkpoint_layers)
        rules = {
            "steps, batch_size and micro_batch must be at least 1": min(counts) >= 1,
            "caption_share must lie in [0, 1]": 0 <= self.caption_share <= 1,
            "lora_dropout must lie in [0, 1)": 0 <= self.lora_dropout < 1,
            "contrast must be short or long": self.contrast in ("short", "long"),
            "temperature must be at least 0.01": 0.01 <= self.temperature < math.inf,
            "clip must be positive": self.clip > 0,
            "learning rates, weights and weight_decay must lie in [0, inf)": all(0 <= x < math.inf for x in rates),
            "lora_rank, workers, save_every, warmup, seed and checkpoint_layers must not be negative": min(whole) >= 0,
            "one of the two losses needs a weight": self.contrastive_weight + self.ar_weight > 0,
            "without soft prompts and LoRA there is nothing to train": self.soft_prompts or self.lora_rank > 0,
        }
        if faults := [rule for rule, kept in rules.items() if not kept]:
            raise DataError("settings: " + "; ".join(faults))


# ---- One step


def training_step(model: nn.Module, batch: Batch, log_scale: torch.Tensor, config: TrainConfig) -> dict[str, float]:
    """Forward and backward of one batch, chunk by chunk; gradients are added to the parameters'. Returns the losses.

    Each image runs through the model once: its hidden state at the summary position is the embedding, and those behind
    it predict the long caption, which the summary cannot see, since attention is causal.
    """
    contrastive_weight = config.contrastive_weight if batch.num_pairs else 0.0
    if not (contrastive_weight or (batch.num_tokens and config.ar_weight)):
        advice = "larger batches, or data in which every picture has one"
        raise DataError(f"a batch without a caption for a loss that is switched on: use {advice} {batch.skipped[:1]}")
    chunks = batch.images + (batch.texts if contrastive_weight else [])

    features: dict[int, torch.Tensor] = {}  # of each chunk's images: their layers are frozen, once a step is enough

    def states(chunk: Chunk, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states up to `end`, (b, T, D), and those at the summary positions, (b, D)."""
        if chunk.pixel_values is not None and id(chunk) not in features:
            features[id(chunk)] = model.image_features(chunk.pixel_values.to(model.device))
        hidden = model(chunk.input_ids[:, :end].to(model.device), image_features=features.get(id(chunk)))
        return hidden, hidden[torch.arange(len(hidden), device=model.device), chunk.summary.to(model.device)]

    def embed(chunk: Chunk) -> torch.Tensor:
        # What stands behind the summary does not matter, but dropout masks are drawn for whole sequences.
        end = None if config.lora_rank and config.lora_dropout else int(chunk.summary.max()) + 1
        return states(chunk, end)[1]

    def forward(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, embeddings = states(chunk)
        if chunk.labels is None or not config.ar_weight:
            return embeddings, torch.zeros((), device=model.device)
        labels = chunk.labels.to(model.device)
        return embeddings, linear_cross_entropy(hidden, model.lm_head.weight, labels, batch.num_tokens)

    def contrast(embeddings: list[torch.Tensor]) -> torch.Tensor:
        # Chunks were sorted by length: back into pairs. Images without a text carry pair -1 and come first.
        pair = torch.cat([chunk.pair for chunk in chunks])
        order = pair.argsort(stable=True)[len(pair) - 2 * batch.num_pairs :]  # image 0, text 0, image 1, text 1, ...
        rows = torch.cat(list(embeddings))[order.to(model.device)]
        images, texts = gather_with_gradient(rows[0::2]), gather_with_gradient(rows[1::2])
        return tiled_contrastive_loss(images, texts, log_scale.exp())

    weights = contrastive_weight, config.ar_weight
    backward = backward_cached if config.gradient_cache else backward_whole
    contrastive, autoregressive = (loss.item() for loss in backward(chunks, embed, forward, contrast, weights))
    loss = vladva_loss(contrastive, autoregressive, *weights)
    return {"loss": loss, "contrastive": contrastive, "autoregressive": autoregressive}


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up to 1, then a cosine down to 0.05."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, log_scale: nn.Parameter, config: TrainConfig) -> torch.optim.AdamW:
    named = trainable_parameters(model)
    lora = [parameter for name, parameter in named.items() if ".lora_" in name]
    soft = [parameter for name, parameter in named.items() if ".lora_" not in name]
    groups = [
        {"params": lora, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": soft, "lr": config.soft_lr, "weight_decay": 0.0},
        {"params": [log_scale], "lr": config.temperature_lr, "weight_decay": 0.0},
    ]
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98))


def collate_for(config: TrainConfig, layout: Layout, device: torch.device) -> Callable:
    """`collate` with these settings. GPUs and compiled layers like few and round lengths."""
    share = config.caption_share if config.ar_weight else 0.0
    multiple = 32 if device.type == "cuda" or config.compile else 1
    return partial(collate, layout=layout, micro_batch=config.micro_batch, caption_share=share, multiple=multiple)


def memory_estimate(
    config: TrainConfig, llava: LlavaConfig, dataset: CaptionDataset, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """GB that training will take, by part, for captions as long as those of the first records.

    Kept of each layer and token, in numbers: both norms' inputs (2 D), queries, keys and values, what attention
    returned, gate and up; with dropout, what went into each LoRA, and a mask (of bytes on CUDA). A checkpointed layer
    keeps its input, and is there once while it is computed again.
    """
    t, layout, bytes_per_number = llava.text, dataset.layout, dtype.itemsize
    with torch.device("meta"):  # shapes without memory
        run = Run(Llava(llava), layout, dataset.processor)
        if config.int8:
            quantize(run.model)
    add_adapters(run, config)
    trainable = sum(p.numel() for p in trainable_parameters(run.model).values())
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    heads = (2 * t.num_attention_heads + 2 * t.num_key_value_heads) * t.head_dim
    layer = 2 * t.hidden_size + heads + 2 * t.intermediate_size + 7 * config.lora_rank
    if config.lora_rank and config.lora_dropout:
        inputs = 5 * t.hidden_size + t.num_attention_heads * t.head_dim + t.intermediate_size
        layer += inputs + (inputs if device.type == "cpu" else inputs // bytes_per_number)
    checkpointed = min(config.checkpoint_layers, t.num_hidden_layers)
    token = layer * (t.num_hidden_layers - checkpointed) + t.hidden_size * (checkpointed + 2)
    token += layer if checkpointed else 0

    captions = [dataset.captions(dataset.record(index)) for index in range(min(config.batch_size, len(dataset)))]
    no_picture = torch.zeros(1)
    samples = [Sample(no_picture, next(iter(short), None), next(iter(long), None)) for short, long in captions]
    batch = collate_for(config, layout, device)(samples)
    chunks = [chunk.input_ids for chunk in batch.images + (batch.texts if config.contrastive_weight else [])]
    tokens = max(chunk.numel() for chunk in chunks)
    if not config.gradient_cache:
        tokens = sum(chunk.numel() for chunk in chunks) * config.batch_size / len(samples)
    rows = min(max(256, 2**27 // (4 * t.vocab_size)), batch.num_tokens)
    parts = {
        "weights": sum(p.numel() * (1 if p.dtype == torch.int8 else bytes_per_number) for p in frozen),
        "adapters, their gradients and AdamW": trainable * 16,
        "activations": tokens * token * bytes_per_number,
        "image features": config.batch_size * llava.num_image_tokens * t.hidden_size * bytes_per_number,
        "logits": rows * t.vocab_size * 8,
        "a sequence": max(chunk.shape[1] for chunk in chunks) * token * bytes_per_number,
    }
    return {name: size / 1e9 for name, size in parts.items()}


def free_memory(device: torch.device) -> float:
    """GB that are free on a device, infinite where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    if device.type == "mps":
        return (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) / 1e9
    try:  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def print_memory(parts: dict[str, float], free: float) -> None:
    sequence, total = parts.pop("a sequence"), sum(parts.values())
    listed = ", ".join(f"{name} {size:.2g}" for name, size in parts.items())
    print(f"memory for training: about {total:.2g} GB of {free:.3g} GB free ({listed})")
    if math.isfinite(free):
        fitting = max(0, int((free - total + parts["activations"]) / sequence))
        print(f"  with --gradient_cache a --micro_batch of up to {fitting:,} sequences fits")
    if total > free:
        print("  AS SET, IT IS LIKELY TO RUN OUT OF MEMORY; --checkpoint_layers saves more, at more computation")


def train(run: Run, config: TrainConfig, dataset: CaptionDataset, out: Path) -> None:
    """The loop. Writes log.jsonl and checkpoints into `out`."""
    model, device = run.model.train(), run.model.device
    model.language_model.checkpoint_layers = config.checkpoint_layers
    if config.compile:
        compile_layers(model)
    log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature), device=device))
    optimizer = make_optimizer(model, log_scale, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    units = dataset.units if config.groups else range(len(dataset))
    sampler = ResumableSampler(units, config.batch_size, config.steps, config.seed)
    lay_out = collate_for(config, run.layout, device)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=lay_out, num_workers=config.workers)
    skipped, started = [], time.perf_counter()
    with open(out / "log.jsonl", "w", buffering=1) as log, tqdm(loader, desc="training", unit="step") as progress:
        for step, batch in enumerate(progress):
            skipped += batch.skipped
            if len(skipped) > max(10, 0.01 * (step + 1) * config.batch_size):
                raise DataError(f"{len(skipped)} records could not be used, the last one: {skipped[-1]}")
            factor = learning_rate_factor(step, config)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            losses = training_step(model, batch, log_scale, config)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
            if not math.isfinite(losses["loss"]) or not math.isfinite(norm):
                raise DataError(f"step {step}: loss {losses['loss']}, gradient {norm}; lower the learning rates")
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                log_scale.clamp_(max=math.log(100))  # a temperature of at least 0.01, as in CLIP

            seconds = time.perf_counter() - started
            line = {"step": step, **losses, "chance": math.log(max(batch.num_pairs, 1)), "gradient_norm": norm}
            line |= {"temperature": math.exp(-log_scale.item()), "lr": factor * config.lr, "skipped": batch.skipped}
            line |= {"pairs_per_second": (step + 1) * config.batch_size / seconds, "seconds": seconds}
            log.write(json.dumps(line) + "\n")
            shown = f"{line['contrastive']:.3f} (chance {line['chance']:.2f}) + {line['autoregressive']:.3f}"
            shown += f", temperature {line['temperature']:.3f}, {line['pairs_per_second']:.0f} pairs/s"
            progress.set_postfix_str("loss " + shown, refresh=False)
            if step + 1 == config.steps or (config.save_every and (step + 1) % config.save_every == 0):
                save_checkpoint(out, step + 1, run)
    model.eval()
    if config.compile:  # generation has shapes of its own
        for layer in model.language_model.layers:
            del layer.forward
    for reason in skipped:
        print(f"left out: {reason}")


def compile_layers(model: Llava) -> None:
    """One compiled layer serves all of them, and every batch size and length; `del layer.forward` undoes it."""
    for layer in model.language_model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def save_checkpoint(out: Path, step: int, run: Run) -> None:
    """Write checkpoints/step-N under a temporary name, rename it, then let `latest` name it."""
    folder, temporary = out / "checkpoints" / f"step-{step}", out / "checkpoints" / f"step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_adapter(run.model, temporary, run.notes)
    os.replace(temporary, folder)
    latest = out / "checkpoints" / "latest"
    latest.with_suffix(".tmp").write_text(folder.name + "\n")
    os.replace(latest.with_suffix(".tmp"), latest)


def add_adapters(run: Run, config: TrainConfig) -> None:
    """Freeze the base model, and add what learns."""
    torch.manual_seed(config.seed)
    freeze(run.model)
    if config.lora_rank:
        add_lora(run.model, LoRAConfig(config.lora_rank, config.lora_alpha, config.lora_dropout))
    if config.soft_prompts:
        add_soft_prompts(run.model, run.layout.image_prompt, run.layout.text_prompt)
        run.layout = run.layout.with_soft_prompts(run.model.config.text.vocab_size)


# ---- The job: table, training, table

RUN_FILES = ("config.json", "log.jsonl", "results.json", "retrieval.png", "checkpoints")


def check_run_folder(out: Path) -> None:
    """Before anything is computed: may --out be written, without touching what is not a run's?"""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"--out {out}: is not a folder")
    foreign = sorted(path.name for path in out.glob("*") if path.name not in RUN_FILES)
    if foreign or (out / "checkpoints").is_symlink():
        raise DataError(f"--out {out}: holds {foreign[:3]}, which is not a run of train.py; choose another folder")
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)


def start_run_folder(out: Path, config: TrainConfig) -> None:
    """Remove a former run's files and write config.json."""
    for name in RUN_FILES[:-1]:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
    model = config.model if config.model == TrainConfig.model else str(Path(config.model).resolve())
    settings = dataclasses.asdict(config) | {"model": model}
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def toy_world(config: TrainConfig):
    """Use the toy world's files, made where they are missing; returns the measure of its captions."""
    from toy import world  # only this job needs it

    try:
        folder = world.build(Path(__file__).parent / "toy" / "data")
    except ValueError as error:
        raise DataError(str(error)) from None
    config.data, config.tests = str(folder / "train.jsonl"), config.tests or str(folder / "test" / "tests.json")
    return world.score_captions


def measure(run: Run, config: TrainConfig, score) -> tuple[dict, list[tuple[str, list[tuple[Path, bool]]]]]:
    """The tables of --tests; for four captions of its retrieval test the five nearest pictures, and which are right."""
    if not config.tests:
        return {}, []
    embeddings, tests, found = Embeddings(run), Path(config.tests), []
    tables = evaluate(embeddings, tests, score)
    if "retrieval" in tables:
        test = {"images": ".", "split": "test"} | json.loads(tests.read_text())["retrieval"]
        items = read_karpathy(tests.parent / test["file"], tests.parent / test["images"], test["split"])
        paths = [path for path, _ in items]
        images = embeddings.images(paths)
        for path, captions in [item for item in items if item[1]][:4]:
            nearest = (images @ embeddings.texts(captions[:1])[0]).topk(min(5, len(paths))).indices.tolist()
            found.append((captions[0], [(paths[index], paths[index] == path) for index in nearest]))
    return tables, found


def job(config: TrainConfig) -> None:
    started = time.perf_counter()
    out = Path(config.out)
    check_run_folder(out)
    device, fastest = pick_device(config.device or None)
    dtype = torch.float32 if fastest == torch.float16 else fastest
    why = {torch.bfloat16: "the GPU has it", torch.float16: "the GPU has no bf16, and fp16 would need scaled losses"}
    chosen = f"{device} ({'as asked for' if config.device else 'the best device here'})"
    print(f"training on {chosen} in {str(dtype)[6:]} ({why.get(fastest, 'what CPUs and MPS compute well')})")
    score = None if config.data else toy_world(config)
    prompts = config.image_prompt, config.text_prompt
    _, llava, layout, processor = inspect_base(config.model, *prompts)
    dataset = CaptionDataset(config.data, layout, processor, config.image_root or None, config.contrast)
    print_memory(memory_estimate(config, llava, dataset, device, dtype), free_memory(device))
    run = load_base(config.model, config.device or None, *prompts, int8=config.int8, dtype=dtype)
    if device.type == "mps" and config.checkpoint_layers and config.lora_dropout:
        raise DataError(
            "on MPS dropout masks cannot be drawn again: use --checkpoint_layers or --lora_dropout, not both"
        )
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{config.model}: {count / 1e6:.1f} M parameters on {run.model.device} in {str(run.model.dtype)[6:]}")
    before, found_before = measure(run, config, score)
    if before:
        print_table({"untrained": summary(before)})
    picture = found_before[0][1][0][0] if found_before else None
    caption_before = caption(run, [open_image(picture)])[0] if picture else ""

    add_adapters(run, config)
    trainable = sum(p.numel() for p in trainable_parameters(run.model).values())
    share = 100 * trainable / count
    print(f"{trainable:,} new parameters to train ({share:.1f} %), {len(dataset):,} images in {config.data}")
    for reason, number in dataset.faults.items():
        print(f"  {number} lines left out: {reason}")
    start_run_folder(out, config)
    train(run, config, dataset, out)

    after, found_after = measure(run, config, score)
    results = {"before": before, "after": after, "seconds": time.perf_counter() - started, "seed": config.seed}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if after:
        rows = {"untrained": summary(before), "trained": summary(after)}
        rows["difference"] = {name: value - rows["untrained"][name] for name, value in rows["trained"].items()}
        print_table(rows | paper_rows())
    if picture:
        rows = []
        for (query, old), (_, new) in zip(found_before, found_after):
            rows += [(f"before: {query}", old), (f"after: {query}", new)]
        gallery(out / "retrieval.png", rows)
        print(f"{picture}\n  before: {caption_before}\n  after:  {caption(run, [open_image(picture)])[0]}")
    print(f"{time.perf_counter() - started:.0f} s. The run is in {out}. Next, for example:")
    print(f"  python eval.py caption {picture or 'IMAGE'} --model {out}\n  python train.py --help")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(TrainConfig):
        text = f"{f.metadata['help']} [{f.default!r}]".replace("%", "%%")
        kind = {"action": BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    config = TrainConfig(**vars(parser.parse_args(arguments)))
    try:
        config.check()
        job(config)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
