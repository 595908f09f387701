"""Fine-tune a LLaVA into an embedding model that still captions: VladVA (CVPR 2025, arXiv 2412.04378).

    python train.py                                the toy job: no network, no GPU, a few minutes on a laptop
    python train.py --model llava-1.5-7b-hf --data captions.jsonl --out runs/mine \\
        --lr 1e-4 --soft_lr 1e-3 --caption_share 1 --batch_size 16
    torchrun --nproc_per_node=8 train.py ...       the same batches on eight GPUs
    python train.py --resume --out runs/mine       go on from the newest checkpoint, as if nothing had happened
    python train.py --help                         every setting, with its default
    python train.py check                          is everything here that the toy job needs?

Contrastive loss on short captions + autoregressive loss on long ones, the image side of both in one forward pass; soft
prompts + LoRA learn, everything else is frozen. A run folder holds config.json, log.jsonl, results.json, pictures and
checkpoints/; `python eval.py caption photo.jpg --model runs/mine` uses it. Ctrl-C saves before it stops.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial, partialmethod
from pathlib import Path

if __name__ == "__main__" and sys.argv[1:] == ["check"]:  # first of all: what is imported below may be missing
    from toy.check import main as check

    sys.exit(check())

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval
import lora
import losses
from data import IMAGE_PROMPT, TEXT_PROMPT, DataError
from lora import trainable_parameters
from losses import process
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
    keep: int = setting(0, "newest checkpoints to keep (0: all)")
    resume: bool = setting(False, "go on with the run in --out, with its settings; start it if there is none")
    shard: bool = setting(False, "spread the frozen layers over the processes, for a base that does not fit one GPU")
    device: str = setting("", "cpu, cuda, cuda:1, mps (empty: the best one here)")

    def check(self, device: torch.device) -> None:
        """Raise DataError for values that cannot work, all in one message."""
        world = process()[1]
        enough = min(self.steps, self.micro_batch) >= 1 and self.batch_size >= world
        rates = (self.lr, self.soft_lr, self.temperature_lr, self.contrastive_weight, self.ar_weight, self.weight_decay)
        dropped = self.lora_dropout and self.checkpoint_layers  # the same masks would have to be drawn again
        whole = (self.warmup, self.checkpoint_layers, self.save_every, self.keep, self.seed)
        rules = {
            f"steps and micro_batch must be at least 1, batch_size {world} (processes)": enough,
            "caption_share must lie in [0, 1]": 0 <= self.caption_share <= 1,
            "lora_dropout must lie in [0, 1)": 0 <= self.lora_dropout < 1,
            "contrast must be short or long": self.contrast in ("short", "long"),
            "temperature must be at least 0.01": 0.01 <= self.temperature < math.inf,
            "clip must be positive": self.clip > 0,
            "learning rates, weights and weight_decay must lie in [0, inf)": all(0 <= x < math.inf for x in rates),
            "warmup, checkpoint_layers, save_every, keep, seed: from 0 to 2^32": all(0 <= x < 2**32 for x in whole),
            "lora_rank and workers must lie in [0, 4096]": all(0 <= x <= 4096 for x in (self.lora_rank, self.workers)),
            "one of the two losses needs a weight": self.contrastive_weight + self.ar_weight > 0,
            "without soft prompts and LoRA there is nothing to train": self.soft_prompts or self.lora_rank > 0,
            "int8 and shard exclude each other": not (self.int8 and self.shard),
            "lora_dropout and checkpoint_layers exclude each other on MPS": not (dropped and device.type == "mps"),
        }
        if faults := [rule for rule, kept in rules.items() if not kept]:
            raise DataError("settings: " + "; ".join(faults))


# ---- Processes: torchrun starts one for each GPU, of one batch each trains its share; without it there is one.
def start_processes(device: str) -> tuple[torch.device, torch.dtype]:
    """Meet the other processes that torchrun started, if it did. Returns what `eval.pick_device` finds for this one."""
    found = eval.pick_device(device or None)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        on_gpu = found[0].type == "cuda"
        found = eval.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
        torch.cuda.set_device(found[0] if on_gpu else -1)  # -1 does nothing
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))  # evaluations take long
        if dist.get_rank() > 0:  # one report is enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for good
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return found


def everyone(message) -> list:
    """What every process says, in order; none goes on before all have. As JSON, for reading it runs nothing."""
    if not dist.is_initialized():
        return [message]
    text = torch.tensor(list(json.dumps(message).encode() + b"\n"), dtype=torch.uint8)[:, None]
    texts = losses.gather_with_gradient(text.to("cuda" if dist.get_backend() == "nccl" else "cpu"))
    return [json.loads(line) for line in bytes(texts.flatten().tolist()).splitlines()]


def shard(model: Llava, device: torch.device, dtype: torch.dtype) -> None:
    """Spread the frozen layers over the processes (FSDP2): a layer is whole only while it is computed. What learns is
    whole everywhere, and its gradients are summed as ever. The model comes on the CPU, as its file is, of which pages
    are read when they are needed."""
    from torch.distributed import device_mesh, fsdp, tensor  # take a second to import

    mesh = device_mesh.init_device_mesh(device.type, (process()[1],))
    learning = set(trainable_parameters(model).values())
    layers = [*model.vision_tower.encoder.layers, *model.language_model.layers]
    for module in (*layers, model.vision_tower, model.language_model, model):
        held = {parameter for parameter in module.parameters() if not isinstance(parameter, tensor.DTensor)}
        for frozen in held - learning:
            frozen.data = frozen.data.to(device, dtype)
        module.to(device)
        if module is not model:  # the two towers hold nothing themselves
            fsdp.fully_shard(module, mesh=mesh, ignored_params=learning if module in layers else held)


# ---- One step
def training_step(model: nn.Module, batch: data.Batch, log_scale: torch.Tensor, config: TrainConfig) -> dict:
    """Forward and backward of one batch, chunk by chunk; gradients are added to the parameters'. Returns the losses.

    Each image runs through the model once: its hidden state at the summary position is the embedding, and those behind
    it predict the long caption, which the summary cannot see, since attention is causal."""
    columns = list(zip(*everyone([batch.num_pairs, batch.num_tokens, len(batch.images), len(batch.texts)])))
    (num_pairs, num_tokens), (most_images, most_texts) = map(sum, columns[:2]), map(max, columns[2:])
    contrastive_weight = config.contrastive_weight if num_pairs else 0.0
    if not (contrastive_weight or (num_tokens and config.ar_weight)):
        raise DataError(f"a batch has no captions for its losses; larger ones? the --image_root? {batch.skipped[:1]}")
    images = batch.images + [stand_in(model.config, True) for _ in range(most_images - len(batch.images))]
    texts = batch.texts + [stand_in(model.config, False) for _ in range(most_texts - len(batch.texts))]
    chunks = images + (texts if contrastive_weight else [])
    features: dict[int, torch.Tensor] = {}  # of each chunk's images: their layers are frozen, once a step is enough

    def states(chunk: data.Chunk, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states up to `end`, (b, T, D), and those at the summary positions, (b, D)."""
        if chunk.pixel_values is not None and id(chunk) not in features:
            features[id(chunk)] = model.image_features(chunk.pixel_values.to(model.device))
        hidden = model(chunk.input_ids[:, :end].to(model.device), image_features=features.get(id(chunk)))
        return hidden, hidden[torch.arange(len(hidden), device=model.device), chunk.summary.to(model.device)]

    def embed(chunk: data.Chunk) -> torch.Tensor:
        # What stands behind the summary does not matter, but dropout masks are drawn for whole sequences.
        end = None if config.lora_rank and config.lora_dropout else int(chunk.summary.max()) + 1
        return states(chunk, end)[1]

    def forward(chunk: data.Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, embeddings = states(chunk)
        if chunk.labels is None or not config.ar_weight:
            return embeddings, torch.zeros((), device=model.device)
        loss = losses.linear_cross_entropy(hidden, model.lm_head.weight, chunk.labels.to(model.device), num_tokens)
        return embeddings, loss

    def contrast(embeddings: list[torch.Tensor]) -> torch.Tensor:
        # Chunks were sorted by length: back into pairs. Images without a text carry pair -1 and come first.
        pair = torch.cat([chunk.pair for chunk in chunks])
        order = pair.argsort(stable=True)[len(pair) - 2 * batch.num_pairs :]  # image 0, text 0, image 1, text 1, ...
        rows = torch.cat(list(embeddings))[order.to(model.device)]
        images, texts = losses.gather_with_gradient(rows[0::2]), losses.gather_with_gradient(rows[1::2])
        return losses.tiled_contrastive_loss(images, texts, log_scale.exp())

    weights = contrastive_weight, config.ar_weight
    backward = losses.backward_cached if config.gradient_cache else losses.backward_whole
    contrastive, autoregressive = backward(chunks, embed, forward, contrast, weights)
    if dist.is_initialized():  # all gradients in one message; the temperature's is complete in every process
        tensors = [autoregressive] + ([log_scale.grad.div_(process()[1])] if contrastive_weight else [])
        for parameter in trainable_parameters(model).values():  # this process may have had nothing for one of them
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            tensors.append(parameter.grad)
        dist.all_reduce(flat := torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))
    result = {"contrastive": contrastive.item(), "autoregressive": autoregressive.item(), "pairs": num_pairs}
    return {"loss": losses.vladva_loss(result["contrastive"], result["autoregressive"], *weights)} | result


def stand_in(llava: LlavaConfig, is_image: bool) -> data.Chunk:
    """A sequence that teaches nothing, for a process with fewer chunks than others: sharded layers meet for each."""
    length, side = llava.num_image_tokens if is_image else 1, llava.vision.image_size
    ids, last = torch.full((1, length), llava.image_token_id if is_image else 0), torch.tensor([length - 1])
    rest = (torch.full_like(ids, data.IGNORE), torch.zeros(1, 3, side, side)) if is_image else ()
    return data.Chunk(ids, last, torch.tensor([-1]), *rest)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up to 1, then a cosine down to 0.05."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, log_scale: nn.Parameter, config: TrainConfig) -> torch.optim.AdamW:
    named, decay = trainable_parameters(model), config.weight_decay
    groups = [
        {"params": [p for n, p in named.items() if ".lora_" in n], "peak_lr": config.lr, "weight_decay": decay},
        {"params": [p for n, p in named.items() if ".lora_" not in n], "peak_lr": config.soft_lr},
        {"params": [log_scale], "peak_lr": config.temperature_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), weight_decay=0.0)


def memory_estimate(config: TrainConfig, model: Llava, batch: data.Batch) -> dict[str, float]:
    """GB that steps with such batches take beyond the model, by part. Kept of each layer and token, in numbers: both
    norms' inputs (2 D), queries, keys and values, what attention returned, gate and up; with dropout, what went into
    each LoRA, and a mask (of bytes on CUDA). A checkpointed layer keeps its input, and once all, computed again."""
    t, size, checkpointed = model.config.text, model.dtype.itemsize, config.checkpoint_layers
    D, heads, hidden = t.hidden_size, t.num_attention_heads * t.head_dim, t.intermediate_size
    layer = 2 * D + 2 * heads + 2 * t.num_key_value_heads * t.head_dim + 2 * hidden + 7 * config.lora_rank
    if config.lora_rank and config.lora_dropout:
        layer += (5 * D + heads + hidden) * (2 if model.device.type == "cpu" else 1 + 1 / size)
    token = layer * max(t.num_hidden_layers - checkpointed, 0) + D * (min(checkpointed, t.num_hidden_layers) + 2)
    token += layer if checkpointed else 0
    chunks = [chunk.input_ids for chunk in batch.images + (batch.texts if config.contrastive_weight else [])]
    parts = {
        "gradients and AdamW": 12 * sum(p.numel() for p in trainable_parameters(model).values()),
        "activations": (max if config.gradient_cache else sum)(chunk.numel() for chunk in chunks) * token * size,
        "image features": sum(len(chunk.pair) for chunk in batch.images) * model.config.num_image_tokens * D * size,
        "logits": min(max(256, 2**27 // (4 * t.vocab_size)), batch.num_tokens) * t.vocab_size * 8,
        "a sequence": max(chunk.shape[1] for chunk in chunks) * token * size,
    }
    return {name: number / 1e9 for name, number in parts.items()}


def memory(device: torch.device) -> tuple[float, float]:
    """GB that this process holds on a device, and that are free there; 0 and infinite where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9, torch.cuda.mem_get_info(device)[0] / 1e9
    if device.type == "mps":
        return 0.0, (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) / 1e9
    try:  # Linux
        free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9, free / 1e9
    except (OSError, TypeError):
        return 0.0, math.inf


def print_memory(parts: dict[str, float], free: float) -> None:
    sequence, total = parts.pop("a sequence"), sum(parts.values())
    listed = ", ".join(f"{name} {size:.2g}" for name, size in parts.items())
    tqdm.write(f"memory for training: about {total:.2g} GB of {free:.3g} GB free ({listed})")
    if math.isfinite(free):
        fitting = max(0, int((free - total + parts["activations"]) / sequence))
        tqdm.write(f"  with --gradient_cache a --micro_batch of up to {fitting:,} sequences fits")
    if total > free:
        tqdm.write("  AS SET, IT IS LIKELY TO RUN OUT OF MEMORY; --checkpoint_layers saves more, at more computation")


def train(run: eval.Run, config: TrainConfig, dataset: data.CaptionDataset, out: Path, start: Path = None) -> None:
    """The loop, from a checkpoint if one is given. Writes log.jsonl and checkpoints into `out`."""
    model, device, (rank, world) = run.model.train(), run.model.device, process()
    model.language_model.checkpoint_layers = config.checkpoint_layers
    if config.compile:
        compile_layers(model)
    log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature), device=device))
    optimizer = make_optimizer(model, log_scale, config)
    torch.manual_seed(config.seed + rank)  # of dropout
    first, past = load_training_state(start, model, log_scale, optimizer) if start else (0, [])
    skipped, now = [reason for line in past for reason in line["skipped"]], time.perf_counter()
    began = now - (past[-1]["seconds"] if past else 0.0)
    units, places = dataset.units if config.groups else range(len(dataset)), range(rank, config.batch_size, world)
    batches = partial(data.ResumableSampler, units, config.batch_size, config.steps, config.seed)
    lay_out = {"layout": run.layout, "micro_batch": config.micro_batch, "places": places}
    lay_out["caption_share"] = config.caption_share if config.ar_weight else 0.0
    lay_out["multiple"] = 32 if device.type == "cuda" or config.compile else 1  # GPUs and compilers like round lengths
    reading = {"batch_sampler": batches(first, places), "collate_fn": partial(data.collate, **lay_out)}
    reading |= {"num_workers": config.workers, "worker_init_fn": partial(on_stop, signal.SIG_IGN)}
    reading["generator"] = torch.Generator()  # its own, as the global random numbers are dropout's
    bar = tqdm(DataLoader(dataset, **reading), "training", config.steps, initial=first, unit="step")
    if rank == 0:  # what was written behind the checkpoint is taken off
        data.write_whole(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in past))
    stops = []
    on_stop(lambda number, _: stops.append(number))
    with bar, open(os.devnull if rank else out / "log.jsonl", "a", buffering=1) as log:
        for step, batch in enumerate(bar, first):
            if step == first and batch.images:
                print_memory(memory_estimate(config, model, batch), memory(device)[1])
            factor = learning_rate_factor(step, config)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            line = {"step": step} | training_step(model, batch, log_scale, config)
            norm = nn.utils.clip_grad_norm_(sum((g["params"] for g in optimizer.param_groups), []), config.clip).item()
            if not math.isfinite(line["loss"] + norm):
                records = sorted(record for record, _ in next(iter(batches(step))))
                found = f"loss {line['loss']}, gradient {norm} in step {step}, of the records {records}"
                raise DataError(f"{found}; last good checkpoint: {newest(out)}; perhaps lower the learning rates")
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                log_scale.clamp_(max=math.log(100))  # a temperature of at least 0.01, as in CLIP
            tokens = sum(chunk.input_ids.numel() for chunk in batch.images + batch.texts)
            unusable, tokens, stop = zip(*everyone([batch.skipped, tokens, max(stops, default=0)]))
            seconds, now, stop = time.perf_counter() - now, time.perf_counter(), max(stop)
            line |= {"chance": math.log(max(line["pairs"], 1)), "gradient_norm": norm, "lr": factor * config.lr}
            line |= {"temperature": math.exp(-log_scale.item()), "skipped": sum(unusable, [])}
            line |= {"pairs_per_second": line["pairs"] / seconds, "tokens_per_second": sum(tokens) / seconds}
            log.write(json.dumps(line | {"memory": memory(device)[0], "seconds": now - began}) + "\n")
            shown = f"loss {line['contrastive']:.3f} (chance {line['chance']:.2f}) + {line['autoregressive']:.3f}, "
            shown += f"temperature {line['temperature']:.3f}, {line['pairs_per_second']:.0f} pairs/s"
            bar.set_postfix_str(shown, refresh=False)
            skipped += line["skipped"]
            if len(skipped) > max(10, 0.01 * (step + 1) * config.batch_size):
                raise DataError(f"{len(skipped)} records could not be used, the last one: {skipped[-1]}")
            if stop or step + 1 == config.steps or (config.save_every and not (step + 1) % config.save_every):
                save_checkpoint(out, step + 1, run, log_scale, optimizer, config)
            if stop:
                command = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if world > 1 else "python"
                tqdm.write(f"{signal.Signals(stop).name}: stopped behind step {step + 1}, and saved. This goes on:")
                tqdm.write(f"  {command} train.py --resume --out {shlex.quote(str(out))}")
                sys.exit(128 + stop)
    on_stop(signal.default_int_handler)
    model.eval()
    for layer in model.language_model.layers if config.compile else []:
        del layer.forward  # generation has shapes of its own
    print(*(f"left out: {reason}\n" for reason in skipped), sep="", end="")


def on_stop(handler, worker: int = 0) -> None:
    """What SIGINT and SIGTERM do. Processes that read data ignore them: the step that they serve is to be finished."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def compile_layers(model: Llava) -> None:
    """One compiled layer serves all of them, and every batch size and length; `del layer.forward` undoes it."""
    for layer in model.language_model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


# ---- Checkpoints: at every moment the folder that `latest` names is complete
def save_checkpoint(out: Path, step: int, run: eval.Run, log_scale, optimizer, config: TrainConfig) -> None:
    """checkpoints/step-N with the adapters and all that it takes to go on exactly: first under a temporary name, then
    on the disk, renamed, and named by `latest`; only then are older ones deleted. Raises DataError on a full disk."""
    model, tensors = run.model, {"rng": torch.tensor(everyone(torch.get_rng_state().tolist())).byte()}  # seeds GPUs'
    if process()[0] > 0:
        return
    tensors["log_scale"] = log_scale.detach()
    for name, parameter in (trainable_parameters(model) | {"log_scale": log_scale}).items():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    folder, temporary = (out / "checkpoints" / f"step-{step}{end}" for end in ("", ".tmp"))
    free, needed = shutil.disk_usage(out).free / 1e6, 1 + 2e-6 * sum(tensor.nbytes for tensor in tensors.values())
    if free < needed:
        raise DataError(f"{folder}: {free:.1f} MB are free, {needed:.1f} needed; last good checkpoint: {newest(out)}")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before `latest` named it
    lora.save_adapter(model, temporary, run.notes)
    save_file(tensors, temporary / "training_state.safetensors")
    state = {"step": step, "seed": config.seed, "processes": process()[1], "torch": torch.__version__}
    (temporary / "training_state.json").write_text(json.dumps(state) + "\n")
    for path in (*temporary.iterdir(), temporary, out / "log.jsonl"):
        data.sync(path)
    os.replace(temporary, folder)
    data.write_whole(folder.parent / "latest", folder.name + "\n")
    saved = [int(path.name[5:]) for path in folder.parent.glob("step-*") if path.name[5:].isdecimal()]
    for old in sorted(saved, key=lambda n: (n <= step, n))[: -config.keep] if config.keep else []:
        shutil.rmtree(folder.with_name(f"step-{old}"))  # first those behind this step: `latest` never named them


def newest(out: Path) -> Path | None:
    """The checkpoint that `latest` names, None before the first. Raises DataError."""
    latest = out / "checkpoints" / "latest"
    name = latest.read_bytes().decode("ascii", "replace").strip() if latest.exists() else ""
    if name and not (re.fullmatch(r"step-\d+", name) and (latest.parent / name).is_dir()):
        raise DataError(f"{latest}: names {name[:50]!r}, which is not a checkpoint beside it")
    return latest.parent / name if name else None


def load_training_state(folder: Path, model: Llava, log_scale, optimizer) -> tuple[int, list[dict]]:
    """Set optimizer, temperature and random numbers as they were -> step, and the log up to it. Raises DataError."""
    try:
        step, tensors = int(folder.name[5:]), load_file(folder / "training_state.safetensors")
        for name, p in (trainable_parameters(model) | {"log_scale": log_scale}).items():
            if f"{name}.step" in tensors:  # else it never had a gradient
                state = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                if [value.shape for value in state.values()] != [torch.Size(), p.shape, p.shape]:
                    raise ValueError(f"{name} has another shape")
                optimizer.state[p] = {k: value if k == "step" else value.to(p.device) for k, value in state.items()}
        log_scale.data.fill_(tensors["log_scale"].item())
        if len(states := tensors["rng"]) == process()[1]:  # another number of processes draws anew
            torch.set_rng_state(states[process()[0]].clone())  # for a view would be read from its storage's start
        past = map(json.loads, (folder.parents[1] / "log.jsonl").read_text().splitlines()[:step])
        return step, [line | {"skipped": [*line["skipped"]], "seconds": float(line["seconds"])} for line in past]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{folder}: cannot go on from it ({type(error).__name__}: {error})") from None


def add_adapters(run: eval.Run, config: TrainConfig, checkpoint: Path | None = None) -> None:
    """Freeze the base model, and add what learns, as new or as a checkpoint has it."""
    torch.manual_seed(config.seed)
    lora.freeze(run.model)
    prompts = run.layout.image_prompt, run.layout.text_prompt
    if checkpoint:
        lora.load_adapter(run.model, checkpoint, *prompts, run.notes)
    elif config.lora_rank:
        lora.add_lora(run.model, lora.LoRAConfig(config.lora_rank, config.lora_alpha, config.lora_dropout))
    if config.soft_prompts:
        if not checkpoint:
            lora.add_soft_prompts(run.model, *prompts)
        run.layout = run.layout.with_soft_prompts(run.model.config.text.vocab_size)
    if len({type(added) for added in lora.adapters(run.model).values()}) < bool(config.lora_rank) + config.soft_prompts:
        raise DataError(f"{checkpoint}: LoRA or soft prompts, which this run trains, are missing in it")


# ---- The job: table, training, table
TOY = Path(__file__).parent / "toy" / "data"
RUN_FILES = ("config.json", "log.jsonl", "results.json", "retrieval.png", "checkpoints", "embeddings")
MAY_CHANGE = {"out", "resume", "steps", "device", "workers", "save_every", "keep", "shard"}  # when a run goes on
MAY_CHANGE |= {"micro_batch", "gradient_cache", "checkpoint_layers"}  # exact but for rounding and dropout masks


def settings(given: dict) -> TrainConfig:
    """The flags that were given; with --resume, on top of the run's own. Raises DataError where they contradict."""
    paths = {name: given.get(name) for name in ("model", "data", "image_root", "tests")}
    given |= {k: str(Path(path).resolve()) for k, path in paths.items() if path and path != TrainConfig.model}
    path, faults = Path(given.get("out", TrainConfig.out)) / "config.json", []
    saved = data.read_json(path) if given.get("resume") and (path.exists() or newest(path.parent)) else {}
    kinds = {f.name: (f.type, int) if f.type is float else (f.type,) for f in dataclasses.fields(TrainConfig)}
    for name, value in saved.items():
        if type(value) not in kinds.get(name, ()):
            faults.append(f"{path} has {name} = {value!r}, which is not a setting")
        elif name in given.keys() - MAY_CHANGE and given[name] != value:
            faults.append(f"--{name} is {given[name]!r}, the run in {path.parent} has {value!r}")
    if faults:
        raise DataError(f"--resume: {'; '.join(faults)}; leave these flags out, or choose another --out")
    return TrainConfig(**saved | given)


def check_run_folder(out: Path) -> None:
    """Before anything is computed: may --out be written, without touching what is not a run's?"""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"--out {out}: is not a folder")
    foreign = sorted(p.name for p in out.glob("[!.]*") if re.sub(r"(\.\d+)?\.tmp$", "", p.name) not in RUN_FILES)
    if foreign or (out / "checkpoints").is_symlink():
        raise DataError(f"--out {out}: holds {foreign[:3] or 'a link'}, not a run of train.py; choose another folder")
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)


def start_run_folder(out: Path, config: TrainConfig, checkpoint: Path | None) -> None:
    """Remove what was not finished, a former run too unless it goes on, and write config.json."""
    former = [] if checkpoint else [out / name for name in ("config.json", "checkpoints/latest", *RUN_FILES)]
    for path in (*former, *out.glob("*.tmp"), *out.glob("checkpoints/*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (out / "checkpoints").mkdir(exist_ok=True)
    data.write_whole(out / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def measure(run: eval.Run, tests: str, score, picture: str = "") -> dict:
    """The tables of --tests; for four captions of its retrieval test the five nearest pictures, and which are right;
    what the model says about `picture`, the first of these where none is given."""
    embeddings, file, nearest = eval.Embeddings(run), Path(tests), []
    tables = eval.evaluate(embeddings, file, score) if tests else {}
    if "retrieval" in tables:
        test = {"images": ".", "split": "test"} | data.read_json(file)["retrieval"]
        items = data.read_retrieval(file.parent / test["file"], file.parent / test["images"], test["split"])
        images = embeddings.images([image for image, _ in items])
        for image, captions in [item for item in items if item[1]][:4]:
            best = (images @ embeddings.texts(captions[:1])[0]).topk(min(5, len(items)))
            found = [(items[i][0], score) for i, score in zip(best.indices.tolist(), best.values.tolist())]
            nearest.append([captions[0], [[str(path), path == image, f"{score:.2f}"] for path, score in found]])
        picture = picture or nearest[0][1][0][0]
    caption = eval.caption(run, [data.open_image(picture)])[0] if picture else ""
    return {"tables": tables, "nearest": nearest, "picture": picture, "caption": caption}


def job(config: TrainConfig) -> None:
    began, out, (device, dtype) = time.perf_counter(), Path(config.out), start_processes(config.device)
    (rank, world), sharded = process(), config.shard and process()[1] > 1
    dtype = torch.float32 if dtype == torch.float16 else dtype  # fp16 would need losses scaled up
    chosen = "as asked for" if config.device else "the best device here"
    print(f"training on {device} ({chosen}) in {str(dtype)[6:]}, {world} process(es)")
    config.check(device)
    check_run_folder(out)
    checkpoint = newest(out) if config.resume else None
    if len({*everyone(checkpoint and checkpoint.name)}) > 1:
        raise DataError(f"--resume: not every process finds the same checkpoint in {out}; it must be a shared folder")
    path, tests, score = config.data, config.tests, None
    if not path:
        from toy import world as toy  # only this job needs it

        if rank == 0:  # draws it, where it is missing, for all
            toy.build(TOY)
        everyone("drawn")
        path, tests, score = str(TOY / "train.jsonl"), tests or str(TOY / "test" / "tests.json"), toy.score_captions
    _, _, layout, processor = eval.inspect_base(config.model, config.image_prompt, config.text_prompt)
    dataset = data.CaptionDataset(path, layout, processor, config.image_root or None, config.contrast)
    run = eval.load_base(config.model, device, *layout.prompt_texts, int8=config.int8, dtype=dtype, mapped=sharded)
    model, count = run.model, sum(p.numel() for p in run.model.parameters())
    add_adapters(run, config, checkpoint)
    trainable = sum(p.numel() for p in trainable_parameters(model).values())
    if sharded:
        shard(model, device, dtype)
    results = data.read_json(out / "results.json") if checkpoint and (out / "results.json").exists() else {}
    if not isinstance(before := results.get("untrained"), dict):
        with lora.adapters_disabled(model):  # bitwise the base model
            before = measure(run, tests, score)
    if before["tables"]:
        eval.print_table({"untrained": eval.summary(before["tables"])})
    print(f"{config.model}: {count / 1e6:.1f} M frozen parameters, {trainable:,} new ({100 * trainable / count:.1f} %)")
    print(f"{len(dataset):,} images in {path}")
    print(*(f"  {number} lines left out: {why}\n" for why, number in dataset.faults.items()), sep="", end="")
    results = {"before": before["tables"], "seed": config.seed, "untrained": before}
    everyone(len(data.ResumableSampler(dataset.units, config.batch_size, 1)))  # only now may the folder change
    if rank == 0:
        start_run_folder(out, config, checkpoint)
        data.write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    train(run, config, dataset, out, checkpoint)
    after = measure(run, tests, score, before["picture"])
    if rank == 0:
        results |= {"after": after["tables"], "seconds": time.perf_counter() - began}
        data.write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    if after["tables"]:
        rows = {"untrained": eval.summary(before["tables"]), "trained": eval.summary(after["tables"])}
        rows["difference"] = {name: value - rows["untrained"][name] for name, value in rows["trained"].items()}
        eval.print_table(rows | eval.paper_rows())
    if before["picture"] and rank == 0:
        both = [zip(("before", "after"), pair) for pair in zip(before["nearest"], after["nearest"])]
        rows = [(f"{when}: {query}", found) for pair in both for when, (query, found) in pair]
        eval.gallery(out / "retrieval.png", rows)
        print(f"{before['picture']}\n  before: {before['caption']}\n  after:  {after['caption']}")
    print(f"{time.perf_counter() - began:.0f} s. The run is in {out}. Next, for example:")
    print(f"  python eval.py caption {before['picture'] or 'IMAGE'} --model {out}\n  python train.py --help")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(TrainConfig):
        text = f"{f.metadata['help']} [{f.default!r}]".replace("%", "%%")
        kind = {"action": BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument(f"--{f.name}", default=SUPPRESS, help=text, **kind)
    try:
        job(settings(vars(parser.parse_args(arguments))))
    except (*eval.USER_ERRORS, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        on_stop(signal.default_int_handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
