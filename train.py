"""Fine-tune a LLaVA into an embedding model that still captions: VladVA (arXiv 2412.04378).

    python train.py                                the toy job: no network, no GPU, a few minutes
    python train.py --model llava-1.5-7b-hf --data captions.jsonl --out runs/mine --batch_size 16
    torchrun --nproc_per_node=8 train.py ...       the same batches on eight GPUs
    python train.py --resume --out runs/mine       go on, as if nothing had happened
    python train.py --help                         every setting, with its default

Contrastive loss on short captions + autoregressive loss on long ones, the image side of both in
one forward pass. Soft prompts and LoRA learn, everything else is frozen. A run folder holds
config.json, log.jsonl, results.json, a picture and checkpoints/. Ctrl-C saves before it stops.

To read: `backward_whole` is the method, `training_step` and `update` the step around it, `train`
the loop, `job` what the command does.
Axes: B pairs of the global batch, b sequences of a chunk, T tokens, D hidden.
"""

import os

# A thread that waits for others spins for a moment only, then it sleeps: beside other programs,
# spinning threads take the cores from those that they wait for. (Sleeping at once costs an idle
# machine half of its speed.) GNU's OpenMP reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import dataclasses
import json
import math
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval
import fast
import lora
from data import IMAGE_PROMPT, NO_PAIR, TEXT_PROMPT, Batch, Chunk, ResumableSampler
from formats.files import ROOT, InputError, write_whole
from lora import trainable_parameters
from losses import contrastive_loss, cross_entropy
from runtime import checkpoints, memory, processes, resuming, signals
from runtime.gallery import gallery
from runtime.log import RunLog
from runtime.options import add_settings
from runtime.processes import everyone, gather_rows, rank, world_size
from runtime.terminal import print_any_text


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Every setting; the defaults are the toy job. The flags are made from the fields."""

    # What is trained on what, and where it goes.
    model: str = setting("toy/tiny-llava", "folder of the LLaVA to fine-tune")
    data: str = setting("", "training data, JSON lines as in data.py (empty: the toy world)")
    image_root: str = setting("", "where the training pictures are (empty: beside the data)")
    tests: str = setting(
        "", "a tests.json, see eval.evaluate (none: no tables; the toy has its own)"
    )
    max_pixels: int = setting(0, "largest picture, where sizes differ (0: as the files say)")
    out: str = setting("runs/toy", "run folder; a former run in it is replaced, nothing else")

    # The batch.
    steps: int = setting(150, "optimiser steps")
    batch_size: int = setting(128, "images in a batch, the negatives of one another")
    micro_batch: int = setting(
        32, "sequences of like length that go through the model together (more: faster on a GPU)"
    )
    caption_share: float = setting(0.5, "share of a batch whose long captions are used (paper: 1)")
    contrast: str = setting("short", "captions that are contrasted: short, or long (collapses)")
    groups: bool = setting(False, "keep records of one group, such as twins, in one batch")

    # The losses.
    contrastive_weight: float = setting(1.0, "weight of the contrastive loss (0: off)")
    autoregressive_weight: float = setting(1.0, "weight of the autoregressive loss (0: off)")
    temperature: float = setting(0.07, "where the learnable temperature starts, at least 0.01")

    # What learns.
    soft_prompts: bool = setting(True, "learn the two prompts")
    image_prompt: str = setting(IMAGE_PROMPT, "what follows an image")
    text_prompt: str = setting(TEXT_PROMPT, "what follows a text")
    lora_rank: int = setting(16, "rank of LoRA (0: off)")
    lora_alpha: float = setting(16.0, "LoRA's output is scaled by alpha / rank")
    lora_dropout: float = setting(0.0, "dropout in front of LoRA")

    # The optimiser.
    lr: float = setting(1.5e-3, "peak learning rate of LoRA (paper, 7B: 1e-4)")
    soft_lr: float = setting(1e-2, "peak learning rate of the soft prompts")
    temperature_lr: float = setting(
        1e-2, "peak learning rate of the temperature (of all that losses learn)"
    )
    weight_decay: float = setting(0.0, "of LoRA")
    warmup: int = setting(15, "steps up to the peak; a cosine down to 5 % of it follows")
    clip: float = setting(1.0, "largest norm of the gradient")
    seed: int = setting(0, "of LoRA's start and dropout, the order of data, the captions chosen")

    # Memory and speed: the same numbers.
    fast: bool = setting(
        True, "lean layers and losses, the same but for rounding (--no-fast: plain)"
    )
    gradient_cache: bool = setting(False, "hold one micro-batch's activations at a time")
    checkpoint_layers: int = setting(0, "first layers that are computed again instead of held")
    int8: bool = setting(False, "hold the language model's frozen layers in int8")
    shard: bool = setting(False, "spread the frozen layers over the processes")
    workers: int = setting(0, "processes that read data (0: the training process itself)")
    device: str = setting("", "cpu, cuda, cuda:1, mps (empty: the best one here)")

    # Stopping and going on.
    save_every: int = setting(0, "steps between checkpoints (0: only the last)")
    keep: int = setting(0, "newest checkpoints to keep (0: all)")
    resume: bool = setting(False, "go on with the run in --out; start it if there is none")
    changed_data: bool = setting(False, "with --resume: go on though the data has changed")

    def check(self, device: torch.device) -> None:
        """Raise InputError for values that cannot work, all in one message."""
        faults = []
        for name in ("steps", "micro_batch"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1")
        if self.batch_size < world_size():
            faults.append(f"batch_size must be at least {world_size()}, one for each process")
        if self.batch_size == 1 and self.contrastive_weight > 0:
            advice = "at least 2, or --contrastive_weight 0"
            faults.append(f"a batch_size of 1 has no negatives to contrast with: {advice}")
        if not 0 <= self.caption_share <= 1:
            faults.append("caption_share must lie in [0, 1]")
        if not 0 <= self.lora_dropout < 1:
            faults.append("lora_dropout must lie in [0, 1)")
        if self.contrast not in ("short", "long"):
            faults.append("contrast must be short or long")
        if not 0.01 <= self.temperature < math.inf:
            faults.append("temperature must be at least 0.01")
        if not self.clip > 0:
            faults.append("clip must be positive")
        weights = [f"{name}_weight" for name in (*EMBEDDING_LOSSES, *CAPTION_LOSSES)]
        for name in ("lr", "soft_lr", "temperature_lr", "weight_decay", *weights):
            if not 0 <= getattr(self, name) < math.inf:
                faults.append(f"{name} must lie in [0, inf)")
        for name in ("warmup", "checkpoint_layers", "save_every", "keep", "seed", "max_pixels"):
            if not 0 <= getattr(self, name) < 2**32:
                faults.append(f"{name} must lie in [0, 2^32)")
        for name in ("lora_rank", "workers"):
            if not 0 <= getattr(self, name) <= 4096:
                faults.append(f"{name} must lie in [0, 4096]")
        if not any(getattr(self, name) for name in weights):
            faults.append("one of the losses needs a weight")
        if not self.soft_prompts and self.lora_rank == 0:
            faults.append("without soft prompts and LoRA there is nothing to train")
        if self.int8 and self.shard:
            faults.append("int8 and shard exclude each other")
        # The same dropout masks would have to be drawn again, which MPS cannot.
        if self.lora_dropout and self.checkpoint_layers and device.type == "mps":
            faults.append("lora_dropout and checkpoint_layers exclude each other on MPS")
        if faults:
            raise InputError("settings: " + "; ".join(faults))


# What any other model than the toy starts with where no flag says otherwise: the paper's (of the
# soft prompts' rate it says nothing). A model of billions of parameters would diverge, or forget,
# at the toy's rates.
PAPER = {"lr": 1e-4, "soft_lr": 1e-3, "caption_share": 1.0}


def is_toy(model: str) -> bool:
    """Whether a model is the one that is shipped, or was made beside it."""
    folder = (ROOT / model).resolve()
    return folder.is_relative_to(ROOT / "toy")


def defaults(model: str) -> dict:
    """The settings of a new run in which a model differs from the toy job."""
    return {} if is_toy(model) else dict(PAPER)


# ---- The losses, by name
#
# A loss called NAME is weighed by the setting NAME_weight; 0 leaves it out. For one more, add a
# function to one of the two tables below, and its weight to TrainConfig.
#
# A loss of embeddings sees all pairs of the global batch, in every process, and returns the whole
# loss. A loss of captions sees one chunk, and returns its share: a sum divided by num_tokens, the
# supervised tokens of all chunks in all processes.


def chosen(loss, config):
    """The loss; if --fast, its twin of the same numbers in less memory (the loss itself, where the
    two differ)."""
    return fast.twin(loss) if config.fast else loss


def contrastive(model, images, texts, config):
    """Short captions. images, texts: (B, D), row i of both a pair, of any length (norm)."""
    loss = chosen(contrastive_loss, config)
    return loss(images, texts, model.log_scale.exp())


def autoregressive(model, hidden, labels, num_tokens, config):
    """Long captions. hidden: (b, T, D) of one chunk's images; labels: (b, T), the next tokens."""
    loss = chosen(cross_entropy, config)
    return loss(hidden, model.lm_head.weight, labels, num_tokens)


EMBEDDING_LOSSES = {"contrastive": contrastive}
CAPTION_LOSSES = {"autoregressive": autoregressive}


def active_weights(losses: dict, config: TrainConfig) -> dict[str, float]:
    """The weights of those losses that are not left out, by name. Raises InputError."""
    weights = {}
    for name in losses:
        weight = getattr(config, f"{name}_weight", None)
        if weight is None:
            raise InputError(f"the loss {name} has no weight: add {name}_weight to TrainConfig")
        if weight > 0:
            weights[name] = weight
    return weights


# ---- One step: figure 1 of the paper


def training_step(model: nn.Module, batch: Batch, config: TrainConfig) -> dict[str, float]:
    """Forward and backward of one batch; gradients are added to the parameters'.

    One forward pass of an image serves both losses. Its hidden state at the summary position, the
    last token of the prompt, is its embedding. That state also predicts the first token of the long
    caption, and those after it the rest; the summary cannot see the caption, since attention is
    causal. So both losses train LoRA and the image prompt; the text prompt and the temperature
    learn from the contrastive loss alone.

    Args:
        model: a backbone with adapters and a temperature, as `add_adapters` leaves it.
        batch: this process's share of the global batch.
    Returns: the losses of the global batch by name, their weighted sum "loss", and "pairs".
    Raises: InputError where the batch has no captions for any of the losses."""
    # Of all processes; batch.num_pairs and batch.num_tokens are this one's.
    counts = everyone((batch.num_pairs, batch.num_tokens))
    all_pairs = sum(pairs for pairs, _ in counts)
    all_tokens = sum(tokens for _, tokens in counts)
    weights = choose_weights(all_pairs, all_tokens, batch, config)
    batch = without_unread_texts(batch, weights)
    batch = even_out(batch, model)  # as many forward passes in every process

    backward = backward_cached if config.gradient_cache else backward_whole
    losses = backward(model, batch, all_tokens, weights, config)
    add_up_processes(model, losses)

    result = {}
    for name in (*EMBEDDING_LOSSES, *CAPTION_LOSSES):
        result[name] = losses[name].item() if name in losses else 0.0
    result["loss"] = sum(weights[name] * result[name] for name in weights)
    result["pairs"] = all_pairs
    return result


def choose_weights(all_pairs, all_tokens, batch, config) -> dict[str, float]:
    """The weights, by name, of the losses that this batch has something for. Raises InputError."""
    weights = {}
    if all_pairs:
        weights.update(active_weights(EMBEDDING_LOSSES, config))
    if all_tokens:
        weights.update(active_weights(CAPTION_LOSSES, config))
    if not weights and batch.skipped:
        advice = "is --image_root the folder that the data's paths begin in?"
        raise InputError(f"no record of a batch could be used; {advice} {batch.skipped[0]}")
    if not weights:
        raise InputError("a batch has no captions for its losses; larger batches?")
    return weights


def without_unread_texts(batch: Batch, weights: dict[str, float]) -> Batch:
    """The batch; without its short captions where no loss of embeddings reads them."""
    if any(name in weights for name in EMBEDDING_LOSSES):
        return batch
    return dataclasses.replace(batch, texts=[])


def backward_whole(model, batch, all_tokens, weights, config) -> dict[str, torch.Tensor]:
    """One forward and one backward pass: the activations of all chunks are held at once.

    all_tokens: supervised tokens of long captions in the global batch.
    weights: of the losses that are computed, by name. Returns these losses, of this process."""
    losses = {}

    # Embed: every image and every short caption goes through the model once.
    embeddings = []
    for prepared in prepare_chunks(model, batch):
        hidden, summaries = encode(model, prepared)
        embeddings.append(summaries)
        # Caption: an image's states from the summary on predict its long caption.
        captions = caption_losses(model, prepared, hidden, all_tokens, weights, config)
        for name, loss in captions.items():
            losses[name] = losses.get(name, 0.0) + loss

    # Contrast: every image with every short caption of the batch.
    losses |= embedding_losses(model, batch, embeddings, weights, config)

    total = sum(weights[name] * losses[name] for name in weights)
    total.backward()
    return {name: loss.detach() for name, loss in losses.items()}


@dataclass
class PreparedChunk:
    """A chunk, and what it takes to send it through the model twice in the same way."""

    chunk: Chunk
    image_features: torch.Tensor | list | None  # what stands at the image tokens
    seed: int  # of the dropout masks


def prepare_chunks(model: nn.Module, batch: Batch) -> list[PreparedChunk]:
    """The chunks of a batch, images first."""
    chunks = batch.images + batch.texts
    # The gradient cache sends a chunk through the model twice, with the same dropout masks. (The
    # generator that `encode` seeds is the one of this line: a step's seeds follow from the last
    # step's. A checkpoint keeps its state, so a run goes on exactly.)
    seeds = torch.randint(2**62, (len(chunks),)).tolist()
    prepared = []
    for chunk, seed in zip(chunks, seeds):
        features = None
        if chunk.pixel_values is not None:
            # The vision tower and the projector are frozen: once a step is enough.
            with torch.no_grad():
                pixel_values = data.move_images(chunk.pixel_values, model.device)
                features = model.image_features(pixel_values)
        prepared.append(PreparedChunk(chunk, features, seed))
    return prepared


def encode(model: nn.Module, prepared: PreparedChunk) -> tuple[torch.Tensor, torch.Tensor]:
    """-> hidden states (b, T, D), and the embeddings (b, D): those at the summary positions."""
    torch.manual_seed(prepared.seed)  # so that the gradient cache draws the same masks twice
    input_ids = prepared.chunk.input_ids.to(model.device)
    summary = prepared.chunk.summary.to(model.device)  # (b,), the position in each sequence
    hidden = model(input_ids, image_features=prepared.image_features)
    rows = torch.arange(len(hidden), device=model.device)
    return hidden, hidden[rows, summary]


def caption_losses(model, prepared, hidden, all_tokens, weights, config) -> dict[str, torch.Tensor]:
    """A chunk's share of the losses of long captions, by name; none where the chunk is texts."""
    if prepared.chunk.labels is None:
        return {}
    labels = prepared.chunk.labels.to(model.device)
    found = {}
    for name, loss in CAPTION_LOSSES.items():
        if name in weights:
            found[name] = loss(model, hidden, labels, all_tokens, config)
    return found


def embedding_losses(model, batch, embeddings, weights, config) -> dict[str, torch.Tensor]:
    """The losses of all embeddings, by name. embeddings: (b, D) of each chunk, images first."""
    if not any(name in weights for name in EMBEDDING_LOSSES):
        return {}
    num_image_chunks = len(batch.images)
    images = in_order_of_pairs(batch.images, embeddings[:num_image_chunks], batch.num_pairs)
    texts = in_order_of_pairs(batch.texts, embeddings[num_image_chunks:], batch.num_pairs)
    # The negatives come from the global batch: (num_pairs, D) of each process -> (B, D).
    images = gather_rows(images)
    texts = gather_rows(texts)
    found = {}
    for name, loss in EMBEDDING_LOSSES.items():
        if name in weights:
            found[name] = loss(model, images, texts, config)
    return found


def in_order_of_pairs(chunks: list[Chunk], embeddings: list, num_pairs: int) -> torch.Tensor:
    """Embeddings (b, D) of each chunk -> (num_pairs, D): row i is that of pair i.

    (Chunks are sorted by length, separately for images and for texts.)"""
    rows = torch.cat(embeddings)
    pair = torch.cat([chunk.pair for chunk in chunks]).to(rows.device)
    has_partner = pair != NO_PAIR  # an image without a short caption has none
    ordered = rows.new_zeros(num_pairs, rows.shape[1])
    return ordered.index_copy(0, pair[has_partner], rows[has_partner])


# ---- The same step, the activations of one chunk at a time


def backward_cached(model, batch, all_tokens, weights, config) -> dict[str, torch.Tensor]:
    """`backward_whole` that holds the activations of ONE chunk at a time, whatever the batch.

    The gradient cache, arXiv 2101.06983: the same losses and gradients, for a second forward pass.
    """
    chunks = prepare_chunks(model, batch)

    # Phase 1: the embeddings of the whole batch. Nothing is kept for a backward pass.
    with torch.no_grad():
        embeddings = [embeddings_only(model, prepared, config) for prepared in chunks]

    # Phase 2: the gradient of the contrastive loss with respect to each embedding.
    for each in embeddings:
        each.requires_grad_()
    losses = embedding_losses(model, batch, embeddings, weights, config)
    if losses:
        total = sum(weights[name] * loss for name, loss in losses.items())
        total.backward()

    # Phase 3: chunk by chunk once more, now with a backward pass. By the chain rule the gradient of
    # a parameter w is the sum of <gradient, d embedding / d w> over the embeddings. That is the
    # gradient of this surrogate, whose value means nothing.
    for prepared, embedding in zip(chunks, embeddings):
        hidden, summaries = encode(model, prepared)
        gradient = embedding.grad
        if gradient is None:  # contrast is off: nothing has read the embeddings
            gradient = torch.zeros_like(embedding)
        surrogate = (summaries * gradient).sum()
        captions = caption_losses(model, prepared, hidden, all_tokens, weights, config)
        for name, loss in captions.items():
            losses[name] = losses.get(name, 0.0) + loss.detach()
            surrogate = surrogate + weights[name] * loss
        surrogate.backward()
    return {name: loss.detach() for name, loss in losses.items()}


def embeddings_only(model: nn.Module, prepared: PreparedChunk, config: TrainConfig) -> torch.Tensor:
    """The embeddings (b, D) by the shortest way: nothing after the summary matters to them."""
    if config.lora_rank and config.lora_dropout:
        # Dropout masks are drawn for whole sequences; phase 3 must draw the same ones.
        _, embeddings = encode(model, prepared)
        return embeddings
    chunk = prepared.chunk
    end = int(chunk.summary.max()) + 1
    prefix = dataclasses.replace(chunk, input_ids=chunk.input_ids[:, :end])
    _, embeddings = encode(model, dataclasses.replace(prepared, chunk=prefix))
    return embeddings


# ---- One step of several processes


def even_out(batch: Batch, model: nn.Module) -> Batch:
    """Give all processes equally many chunks; the added ones teach nothing.

    Sharded layers (--shard) meet in every forward pass, so all processes must do as many. And one
    whose pictures could all not be read would have no embeddings at all."""
    if world_size() == 1:
        return batch
    counts = everyone((len(batch.images), len(batch.texts)))
    most_images = max(images for images, _ in counts)
    most_texts = max(texts for _, texts in counts)
    images = [*batch.images]
    texts = [*batch.texts]
    while len(images) < most_images:
        images.append(data.empty_image_chunk(model.config))
    while len(texts) < most_texts:
        texts.append(data.empty_text_chunk())
    return dataclasses.replace(batch, images=images, texts=texts)


def add_up_processes(model: nn.Module, losses: dict[str, torch.Tensor]) -> None:
    """Add up over the processes, in place and in one message, what each has computed of its own
    rows: gradients, and the losses of captions.

    The contrastive loss is complete in each process, but its gradient goes back through its own
    rows only: so gradients are summed, not averaged."""
    if world_size() == 1:
        return
    tensors = [losses[name] for name in CAPTION_LOSSES if name in losses]
    of_losses = lora.loss_parameters(model)
    for name, parameter in trainable_parameters(model).items():
        if name in of_losses:
            if parameter.grad is None:
                continue  # its loss is off, in every process
            # The temperature's is complete in each as well. It is summed with the rest, so that the
            # processes cannot drift apart by rounding.
            parameter.grad /= world_size()
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # this process had nothing for it
        tensors.append(parameter.grad)
    processes.sum_over_processes(tensors)


# ---- The loop


def add_adapters(
    embedder: eval.Embedder, config: TrainConfig, checkpoint: Path | None = None
) -> None:
    """Make a base model ready to train: freeze it; add LoRA, soft prompts and the temperature, as
    new or as a checkpoint has them; put the lean layers in. Changes the embedder's layout, too."""
    model = embedder.model
    image_prompt = embedder.layout.image_prompt
    text_prompt = embedder.layout.text_prompt
    torch.manual_seed(config.seed)  # LoRA starts the same in every process
    lora.freeze(model)
    if checkpoint:
        lora.load_adapter(model, checkpoint, image_prompt, text_prompt, embedder.notes)
    else:
        if config.lora_rank:
            lora_config = lora.LoRAConfig(config.lora_rank, config.lora_alpha, config.lora_dropout)
            lora.add_lora(model, lora_config)
        if config.soft_prompts:
            lora.add_soft_prompts(model, image_prompt, text_prompt)
    lora.add_temperature(model, config.temperature)
    if config.fast:
        fast.install(model)  # the same numbers in less memory
    if config.soft_prompts:
        # From here on sequences hold ids from V on in the prompts' places: SoftPrompt knows them.
        embedder.layout = embedder.layout.with_soft_prompts(model.config.text.vocab_size)

    found = {type(module) for module in lora.adapters(model).values()}
    wanted = set()
    if config.lora_rank:
        wanted.add(lora.LoRALinear)
    if config.soft_prompts:
        wanted.add(lora.SoftPrompt)
    if wanted - found:
        raise InputError(
            f"{checkpoint}: LoRA or soft prompts, which this run trains, are missing in it"
        )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, with a peak learning rate for each kind of parameter. Raises InputError."""
    of_losses = lora.loss_parameters(model)
    of_lora = []
    soft_prompts = []
    for name, parameter in trainable_parameters(model).items():
        if ".lora_" in name:
            of_lora.append(parameter)
        elif name.startswith("language_model.embed_tokens."):
            soft_prompts.append(parameter)
        elif name not in of_losses:  # no checkpoint would save it
            raise InputError(
                f"{name} trains, but is of no LoRA and no soft prompt; a parameter of a loss "
                "must be the model's own, as lora.add_temperature adds one"
            )
    groups = [
        {"params": of_lora, "peak_lr": config.lr, "weight_decay": config.weight_decay},
        {"params": soft_prompts, "peak_lr": config.soft_lr},
        {"params": list(of_losses.values()), "peak_lr": config.temperature_lr},
    ]
    groups = [group for group in groups if group["params"]]
    # beta 2 is CLIP's: batches differ much, and old squares are forgotten sooner.
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up to 1, then a cosine down to 0.05."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def update(model, optimizer, step: int, config: TrainConfig) -> float:
    """One step of the optimiser with the current gradients -> their norm before clipping.

    Where that is not finite, nothing moves."""
    factor = learning_rate_factor(step, config)
    parameters = []
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
        parameters += group["params"]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
    if math.isfinite(norm):
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # a temperature of at least 0.01, as in CLIP
            model.log_scale.clamp_(max=math.log(100))
    return norm


def make_sampler(dataset, config: TrainConfig, first_step: int, places=None) -> ResumableSampler:
    """Which records the batches hold, from `first_step` on: a function of seed and step alone.

    places: which positions of each batch are wanted; None: all."""
    units = dataset.units if config.groups else range(len(dataset))
    return ResumableSampler(units, config.batch_size, config.steps, config.seed, first_step, places)


def make_batches(embedder, config: TrainConfig, dataset, first_step: int) -> DataLoader:
    """This process's share of each batch, from `first_step` on."""
    places = range(rank(), config.batch_size, world_size())
    sampler = make_sampler(dataset, config, first_step, places)
    # GPUs like few and round lengths.
    multiple = 32 if embedder.model.device.type == "cuda" else 1
    caption_share = config.caption_share if active_weights(CAPTION_LOSSES, config) else 0.0

    collate = partial(
        data.collate,
        layout=embedder.layout,
        micro_batch=config.micro_batch,
        caption_share=caption_share,
        multiple=multiple,
        places=places,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.workers,
        worker_init_fn=signals.ignore,
        generator=torch.Generator(),  # its own: the global random numbers are dropout's
    )


def train(
    embedder: eval.Embedder,
    config: TrainConfig,
    dataset: data.CaptionDataset,
    out: Path,
    checkpoint: Path | None = None,
) -> None:
    """The loop, from a checkpoint if one is given. Writes log.jsonl and checkpoints into `out`.

    Raises InputError where training diverges, or too many records cannot be used."""
    model = embedder.model.train()
    model.language_model.checkpoint_layers = config.checkpoint_layers
    optimizer = make_optimizer(model, config)
    torch.manual_seed(config.seed + rank())  # dropout differs from process to process
    first_step = 0
    if checkpoint:
        first_step = checkpoints.load(
            checkpoint, trainable_parameters(model), lora.loss_parameters(model), optimizer
        )
    fingerprint = dataset.fingerprint()
    without_negatives = 0  # batches in which nothing was contrasted
    log = RunLog(out, first_step)
    batches = make_batches(embedder, config, dataset, first_step)
    bar = tqdm(batches, "training", config.steps, initial=first_step, unit="step")

    with bar, log, signals.StopRequests() as stop:
        for step, batch in enumerate(bar, first_step):
            if step == first_step and batch.images:
                say_memory(model, batch, config)

            losses = training_step(model, batch, config)
            if step == first_step:
                say_what_no_loss_reaches(model)
                say_without_long_captions(losses, config)
            norm = update(model, optimizer, step, config)
            if not (math.isfinite(losses["loss"]) and math.isfinite(norm)):
                raise diverged(step, losses, norm, config, dataset, out)

            if losses["pairs"] < 2:
                without_negatives += 1
            line = log_line(step, batch, losses, norm, model, config)
            log.write(line)
            bar.set_postfix_str(in_short(line), refresh=False)
            done = step + 1
            log.refuse_too_many_skipped(done * config.batch_size)

            stopped = stop.received_anywhere()
            is_due = config.save_every > 0 and done % config.save_every == 0
            if stopped or is_due or done == config.steps:
                save(embedder, optimizer, done, config, out, fingerprint)
            if stopped:
                signals.say_how_to_go_on(stopped, done, out)
                sys.exit(128 + stopped)
    model.eval()
    for reason in log.skipped:
        print(f"left out: {reason}")
    if config.contrastive_weight > 0:
        say_without_negatives(without_negatives, config.steps - first_step)


def save(
    embedder, optimizer, step: int, config: TrainConfig, out: Path, fingerprint: dict | None = None
) -> None:
    """Write checkpoints/step-N into the run folder. `fingerprint`: of the data."""
    model = embedder.model
    checkpoints.save(
        out,
        step,
        trainable_parameters(model),
        lora.loss_parameters(model),
        optimizer,
        write_adapter=partial(lora.save_adapter, model, notes=embedder.notes),
        notes={"seed": config.seed, "data": fingerprint},
        keep=config.keep,
    )


def say_memory(model: nn.Module, batch: Batch, config: TrainConfig) -> None:
    """What training will take, by its first batch."""
    batch = without_unread_texts(batch, active_weights(EMBEDDING_LOSSES, config))
    _, free = memory.held_and_free(model.device)
    memory.report(memory.estimate(config, model, batch), free)


def say_what_no_loss_reaches(model: nn.Module) -> None:
    """Parameters without a gradient after the first step: switched off, or forgotten in a loss."""
    names = []
    for name, parameter in trainable_parameters(model).items():
        # (LoRA's A has a gradient of zeros as long as its B is zero.)
        is_zero = parameter.grad is None or not parameter.grad.any()
        if is_zero and ".lora_A." not in name:
            names.append(name)
    if names:
        tqdm.write(f"no loss reaches {', '.join(names[:5])}; it stays as it is")


def say_without_long_captions(losses: dict, config: TrainConfig) -> None:
    """After the first step: where nothing asks for captions, the model may forget to write them."""
    wanted = active_weights(CAPTION_LOSSES, config)
    if wanted and config.caption_share > 0 and not any(losses[name] for name in wanted):
        found = f"no caption of the first batch has {data.LONG} tokens or more"
        tqdm.write(f"{found}: captioning is not trained on such data, and may get worse")


def say_without_negatives(number: int, steps: int) -> None:
    """After a run of so many steps, in `number` of which nothing was contrasted."""
    if number:
        found = f"{number} of {steps} batches had fewer than 2 pairs"
        print(f"{found} of a picture and a short caption: nothing was contrasted in them")


def diverged(step: int, losses: dict, norm: float, config, dataset, out: Path) -> InputError:
    """What to say of a loss or gradient that is not finite: where, of what, and what is left."""
    # The batch of a step can be drawn again at any time, here the whole of it.
    batch = next(iter(make_sampler(dataset, config, step)))
    records = sorted(record for record, _ in batch)
    names = ("loss", *EMBEDDING_LOSSES, *CAPTION_LOSSES)
    of_losses = ", ".join(f"{name} {losses[name]}" for name in names)
    return InputError(
        f"{of_losses}, gradient {norm} in step {step}, of the records {records}; "
        f"last good checkpoint: {checkpoints.newest(out)}; perhaps lower the learning rates"
    )


def log_line(step: int, batch: Batch, losses: dict, norm: float, model, config) -> dict:
    """What log.jsonl keeps of a step. Times are added by `RunLog.write`."""
    tokens = sum(chunk.input_ids.numel() for chunk in batch.images + batch.texts)
    line = {"step": step, **losses}
    line["chance"] = math.log(max(losses["pairs"], 1))  # the contrastive loss of equal embeddings
    line["gradient_norm"] = norm
    line["lr"] = learning_rate_factor(step, config) * config.lr
    line["temperature"] = math.exp(-model.log_scale.item())
    for name, parameter in lora.loss_parameters(model).items():
        if name != "log_scale" and parameter.numel() == 1:
            line[name] = parameter.item()
    line["memory"], _ = memory.held_and_free(model.device)
    line["tokens"] = 0
    line["skipped"] = []
    for process_tokens, process_skipped in everyone((tokens, batch.skipped)):
        line["tokens"] += process_tokens
        line["skipped"] += process_skipped
    return line


def in_short(line: dict) -> str:
    """A line of the log for the progress bar."""
    parts = []
    for name in (*EMBEDDING_LOSSES, *CAPTION_LOSSES):
        value = f"{line[name]:.3f}" if line[name] else "-"  # off, or without captions
        parts.append(f"{name} {value}")
    parts[0] += f" (chance {line['chance']:.2f})"  # the contrastive loss is the first one
    parts.append(f"temperature {line['temperature']:.3f}")
    parts.append(f"{line['pairs_per_second']:.0f} pairs/s")
    return ", ".join(parts)


# ---- The job: table, training, table

TOY = Path(__file__).parent / "toy" / "data"


def job(config: TrainConfig) -> None:
    """What `python train.py` does. Raises InputError."""
    began = time.perf_counter()
    device, dtype = start(config)
    out = Path(config.out)
    checkpoints.check_run_folder(out)
    checkpoint = checkpoints.to_go_on_from(out) if config.resume else None
    if config.resume and checkpoint is None:
        print(f"--resume: {out} has no checkpoint to go on from, so this is a new run")

    # Small files first: a fault in the data must show before gigabytes of weights are read.
    data_path, tests, score = choose_data(config)
    dataset = open_dataset(config, data_path, checkpoint)
    embedder = load_and_adapt(config, device, dtype, checkpoint)

    digest = resuming.digest_of_tests(tests)
    before = resuming.measured_before(out, digest) if checkpoint else None
    if before is None:
        # The base model first: with adapters off it is what it was, to the last bit.
        with lora.adapters_disabled(embedder.model):
            before = measure(embedder, tests, score)
    if before["tables"]:
        eval.print_table({"untrained": eval.table_columns(before["tables"])})
    print_sizes(config, embedder, dataset, data_path)

    # Only when all of this has worked, in every process, may the folder change.
    data.check_batch_size(len(dataset), config.batch_size)
    processes.wait_for_all()
    results = {"before": before["tables"], "seed": config.seed, "untrained": before}
    results["tests"] = digest
    if rank() == 0:
        checkpoints.start_run_folder(out, dataclasses.asdict(config), goes_on=checkpoint)
        write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")

    train(embedder, config, dataset, out, checkpoint)

    after = measure(embedder, tests, score, before["picture"])
    results["after"] = after["tables"]
    results["seconds"] = time.perf_counter() - began
    if rank() == 0:
        write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
        report(before, after, out)
    print(f"{results['seconds']:.0f} s. The run is in {out}. Next, for example:")
    print(f"  python eval.py caption {before['picture'] or 'IMAGE'} --model {out}")
    print("  python train.py --help")


def start(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Meet the other processes, check the settings -> where and in which precision to train."""
    device, dtype = eval.pick_device(config.device or None)
    device = processes.start(device)
    if dtype == torch.float16:
        dtype = torch.float32  # fp16 would need losses scaled up
    why = "as asked for" if config.device else "the best device here"
    precision = str(dtype).removeprefix("torch.")
    number = "1 process" if world_size() == 1 else f"{world_size()} processes"
    print(f"training on {device} ({why}) in {precision}, {number}")
    config.check(device)
    return device, dtype


def choose_data(config: TrainConfig) -> tuple[str, str, object]:
    """The training data, a tests.json ("": no tables), and what scores captions (None: nothing).

    Without --data it is the toy world, drawn where it is missing."""
    if config.data:
        tests = "" if config.tests == "none" else config.tests
        return config.data, tests, None
    data_path, toy_tests, score = draw_toy_world()
    tests = config.tests or toy_tests
    return data_path, "" if tests == "none" else tests, score


def open_dataset(
    config: TrainConfig, data_path: str, checkpoint: Path | None
) -> data.CaptionDataset:
    """The training data. Raises InputError; also where a run would go on with other data than it
    began with."""
    # This layout only says how long captions are; `collate` gets the embedder's, with soft prompts.
    _, _, layout, processor = eval.read_folder(
        config.model, config.image_prompt, config.text_prompt, config.max_pixels
    )
    dataset = data.CaptionDataset(
        data_path, layout, processor, config.image_root or None, config.contrast
    )
    if checkpoint:
        now = dataset.fingerprint()
        resuming.refuse_changed_data(checkpoint, data_path, now, config.changed_data)
    return dataset


def draw_toy_world() -> tuple[str, str, object]:
    """The toy's training data, its tests.json, and what scores its captions."""
    from toy import world  # only this job needs it

    if rank() == 0:  # draws it for all, where it is missing
        world.build(TOY)
    processes.wait_for_all()
    return str(TOY / "train.jsonl"), str(TOY / "test" / "tests.json"), world.score_captions


def load_and_adapt(config, device, dtype, checkpoint: Path | None) -> eval.Embedder:
    """The base model on its device, with what learns added."""
    is_sharded = config.shard and world_size() > 1
    embedder = eval.load_base(
        config.model,
        device,
        config.image_prompt,
        config.text_prompt,
        int8=config.int8,
        dtype=dtype,
        mapped=is_sharded,
        max_pixels=config.max_pixels,
    )
    add_adapters(embedder, config, checkpoint)
    if is_sharded:
        processes.shard(embedder.model, device, dtype)
    return embedder


def print_sizes(config, embedder, dataset, data_path: str) -> None:
    learning = sum(p.numel() for p in trainable_parameters(embedder.model).values())
    frozen = sum(p.numel() for p in embedder.model.parameters()) - learning
    share = 100 * learning / frozen
    millions = f"{frozen / 1e6:.1f} M"
    print(f"{config.model}: {millions} frozen parameters, {learning:,} new ({share:.1f} %)")
    print(f"{len(dataset):,} images in {data_path}")
    rates = f"learning rates: LoRA {config.lr:g}, soft prompts {config.soft_lr:g}"
    if not is_toy(config.model) and config.lr > PAPER["lr"]:
        rates += f" (the paper's, for 7B: {PAPER['lr']:g})"
    print(f"{rates}; caption_share {config.caption_share:g}")
    for reason, number in dataset.faults.items():
        print(f"  {number} lines left out: {reason}")


def measure(embedder: eval.Embedder, tests: str, score, picture: str = "") -> dict:
    """The tables of a tests.json, and for people to look at: what four captions find, one caption.

    Args:
        tests: path of a tests.json, or empty.
        score: measures greedy captions, see eval.captioning.
        picture: the one to describe; where none is given, what the first caption finds.
    Returns: {"tables", "nearest", "picture", "caption"}, ready for results.json."""
    embeddings = eval.Embeddings(embedder)
    tables = {}
    nearest = []
    if tests:
        tables = eval.evaluate(embeddings, Path(tests), score)
    if "retrieval" in tables:
        nearest = eval.nearest_pictures(embeddings, Path(tests), captions=4, pictures=5)
        _, ranked = nearest[0]
        best, _, _ = ranked[0]
        picture = picture or best
    caption = ""
    if picture:
        caption = eval.caption(embedder, [data.open_image(picture)])[0]
    return {"tables": tables, "nearest": nearest, "picture": picture, "caption": caption}


def report(before: dict, after: dict, out: Path) -> None:
    """Print both tables, draw what was found, show both captions."""
    if after["tables"]:
        rows = {
            "untrained": eval.table_columns(before["tables"]),
            "trained": eval.table_columns(after["tables"]),
        }
        rows["difference"] = {
            name: value - rows["untrained"][name] for name, value in rows["trained"].items()
        }
        eval.print_table(rows | eval.paper_rows())
        for line in eval.in_words(rows["difference"]):
            print(line)
    if not before["picture"]:
        return
    rows = []
    for old, new in zip(before["nearest"], after["nearest"]):
        rows.append((f"before: {old[0]}", opened(old[1])))
        rows.append((f"after: {new[0]}", opened(new[1])))
    if rows:
        gallery(out / "retrieval.png", rows)
    print(f"{before['picture']}")
    print(f"  before: {before['caption']}")
    print(f"  after:  {after['caption']}")


def opened(row: list) -> list:
    return [(data.open_image(path), is_right, score) for path, is_right, score in row]


# ---- The command

# What may be another when a run goes on: the rest decides which numbers come out.
MAY_CHANGE = {"out", "resume", "changed_data", "steps", "device", "workers", "shard"}
MAY_CHANGE |= {"save_every", "keep"}
# Exact but for rounding and dropout masks.
MAY_CHANGE |= {"micro_batch", "gradient_cache", "checkpoint_layers", "fast"}


def settings(given: dict) -> TrainConfig:
    """The flags that were given; with --resume, on top of the run's own.

    Raises InputError where they contradict."""
    given = dict(given)
    for name in resuming.PATHS:
        # A run must find its files from any folder. The default model is looked for in ours.
        if given.get(name) and given[name] not in (TrainConfig.model, "none"):
            given[name] = str(Path(given[name]).resolve())
    path = Path(given.get("out", TrainConfig.out)) / "config.json"
    is_new = not path.exists() and not checkpoints.newest(path.parent)
    if is_new or not given.get("resume"):
        return TrainConfig(**defaults(given.get("model", TrainConfig.model)) | given)
    types = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    saved = resuming.read_settings(path, types, given, MAY_CHANGE, ROOT)
    return TrainConfig(**saved | given)


# The parts of --help, by the first setting of each.
PARTS = {
    "model": "what is trained on what, and where it goes",
    "steps": "the batch",
    "contrastive_weight": "the losses",
    "soft_prompts": "what learns",
    "lr": "the optimiser",
    "fast": "memory and speed: the same numbers",
    "save_every": "stopping and going on",
}


def make_parser() -> ArgumentParser:
    """A flag for each field of TrainConfig."""
    parser = ArgumentParser(
        usage="python train.py [--SETTING VALUE ...]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_settings(parser, TrainConfig, PARTS, PAPER)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    print_any_text()
    try:
        job(settings(vars(parser.parse_args(arguments))))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # inside of the loop it is noted, and the step is finished first
        print("interrupted before or after the training steps: nothing to save", file=sys.stderr)
        sys.exit(130)
    finally:
        signals.interrupt_at_once()
        processes.stop()


if __name__ == "__main__":
    main()
