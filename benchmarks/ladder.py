"""The training step as a ladder: every rung adds one thing, and computes the same numbers.

    python -m benchmarks.ladder               a tiny model, on the CPU or what is there
    python -m benchmarks.ladder --pairs 15    more pairs of timed steps

It begins with what one writes first, three forward passes with masks and logits everywhere, and
ends with the gradient cache of train.py. A rung is compared with the one it stands on; losses and
gradients are compared with the first. docs/performance.md tells what each of them buys.

To read: from `three_forwards` on, the steps become better one after another; `make_rungs` lists
them. A step adds gradients to the parameters, and returns both losses. Clipping and the optimiser
are the same for all and left out.

Axes: B pairs, b sequences of a chunk, T tokens, D hidden, V vocabulary.
"""

import argparse
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import fast
import losses
import model
import train
from benchmarks.measure import (
    DEVICE,
    count_flops,
    device_name,
    peak_memory,
    quartiles,
    saved_bytes,
    times,
)
from benchmarks.step import (
    SIZES,
    Layout,
    adapter_parameters,
    build_plain,
    largest_difference,
    make_samples,
)
from data import Batch, Chunk, Sample, collate
from fast import chunked, int8, lean
from losses import IGNORE, at_least_fp32, contrastive_loss, cross_entropy
from model import Llava, LlavaConfig

ROOT = Path(__file__).resolve().parents[1]
Losses = tuple[float, float]  # contrastive and autoregressive


# ---- The first steps: a forward pass for each thing that is wanted


class PaddingMask:
    """Stands where a KVCache would, and gives attention a mask: causal, and without padding."""

    def __init__(self, is_token: Tensor):
        """is_token: (B, T), False where a row is padded."""
        T = is_token.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=is_token.device).tril()
        mask = causal & is_token[:, None, None, :]
        # Padding sees itself: a softmax over nothing would not be a number.
        itself = torch.eye(T, dtype=torch.bool, device=is_token.device)
        self.mask = mask | itself  # (B, 1, T, T)
        self.positions = (is_token.cumsum(1) - 1).clamp(min=0)  # (B, T)

    def extend(self, T: int) -> Tensor:
        return self.positions

    def update(self, layer_index: int, key: Tensor, value: Tensor):
        return key, value, self.mask


def pad(rows: list[list[int]], side: str, value: int = 0) -> Tensor:
    """Rows of ids -> (B, T), padded on one side."""
    tensors = [torch.tensor(row, device=DEVICE) for row in rows]
    return nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value, padding_side=side
    )


def forward_rows(llava: Llava, rows: list[list[int]], pixels, side: str) -> tuple[Tensor, Tensor]:
    """-> hidden states (B, T, D), and those at each row's last token (B, D)."""
    input_ids = pad(rows, side)
    if side == "left":
        is_token = pad([[1] * len(row) for row in rows], side) == 1
        hidden = llava(input_ids, pixels, cache=PaddingMask(is_token))
        return hidden, hidden[:, -1]
    # On the right, padding stands behind all tokens: under causal attention none sees it.
    hidden = llava(input_ids, pixels)
    last = torch.tensor([len(row) - 1 for row in rows], device=DEVICE)
    return hidden, hidden[torch.arange(len(rows), device=DEVICE), last]


def three_forwards(llava: Llava, samples: list[Sample], layout: Layout, side: str) -> Losses:
    """Images, short captions, and images with long captions, each through the model."""
    pixels = torch.stack([sample.pixel_values for sample in samples])
    pixels = pixels.to(DEVICE, llava.dtype)
    images = [layout.image_side() for _ in samples]
    texts = [layout.text_side(sample.short) for sample in samples]
    captioned = [layout.image_side(sample.long) for sample in samples]

    hidden, image_embeddings = forward_rows(llava, images, pixels, side)
    logits_everywhere(llava, hidden)
    hidden, text_embeddings = forward_rows(llava, texts, None, side)
    logits_everywhere(llava, hidden)
    hidden, _ = forward_rows(llava, captioned, pixels, side)
    # The summary predicts a caption's first token; behind it each token predicts the next.
    labels = []
    for row in captioned:
        caption = row[layout.image_summary + 1 :]
        labels.append([IGNORE] * layout.image_summary + caption + [IGNORE])
    num_tokens = sum(len(sample.long) + 1 for sample in samples)
    autoregressive = logits_everywhere(llava, hidden, pad(labels, side, IGNORE), num_tokens)

    contrastive = contrastive_loss(image_embeddings, text_embeddings, llava.log_scale.exp())
    (contrastive + autoregressive).backward()
    return contrastive.item(), autoregressive.item()


def logits_everywhere(llava: Llava, hidden, labels=None, num_tokens: int = 1):
    """As the models of transformers do: every position meets the head, wanted or not."""
    logits = at_least_fp32(llava.logits(hidden))  # (B, T, V)
    if labels is None:
        return torch.zeros((), device=DEVICE)
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / num_tokens


# ---- One forward pass of an image, for both losses


def caption_rows(llava: Llava, hidden, labels=None, num_tokens: int = 1, loss=cross_entropy):
    """Only positions with a label meet the head."""
    if labels is None:
        return torch.zeros((), device=DEVICE)
    return loss(hidden, llava.lm_head.weight, labels, num_tokens)


def encode(llava: Llava, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """-> hidden states (b, T, D), and the embeddings (b, D): those at the summary positions.

    Causal attention: what a summary's state is does not depend on the caption behind it."""
    pixels = chunk.pixel_values
    if pixels is not None:
        pixels = pixels.to(DEVICE, llava.dtype)
    hidden = llava(chunk.input_ids.to(DEVICE), pixels)
    rows = torch.arange(len(hidden), device=DEVICE)
    return hidden, hidden[rows, chunk.summary.to(DEVICE)]


def head_loss(llava: Llava, head: Callable, chunk: Chunk, hidden, batch: Batch):
    """A chunk's share of the autoregressive loss; of texts it is zero."""
    if chunk.labels is None:
        return head(llava, hidden)
    return head(llava, hidden, chunk.labels.to(DEVICE), batch.num_tokens)


def contrast_of(llava: Llava, contrast: Callable, batch: Batch, embeddings: list[Tensor]):
    """The contrastive loss of the embeddings of all chunks, images first."""
    number = len(batch.images)
    images = train.in_order_of_pairs(batch.images, embeddings[:number], batch.num_pairs)
    texts = train.in_order_of_pairs(batch.texts, embeddings[number:], batch.num_pairs)
    return contrast(images, texts, llava.log_scale.exp())


def one_image_forward(llava: Llava, batch: Batch, head: Callable, contrast: Callable) -> Losses:
    """Every sequence goes through the model once, chunk by chunk; one backward pass of all."""
    embeddings = []
    autoregressive = 0.0
    for chunk in batch.images + batch.texts:
        hidden, summaries = encode(llava, chunk)
        embeddings.append(summaries)
        autoregressive = autoregressive + head_loss(llava, head, chunk, hidden, batch)
    contrastive = contrast_of(llava, contrast, batch, embeddings)
    (contrastive + autoregressive).backward()
    return contrastive.item(), autoregressive.item()


# ---- Two passes: the gradient cache


def two_passes(
    llava: Llava,
    batch: Batch,
    head: Callable,
    contrast: Callable,
    keep_features: bool = False,
    prefix_only: bool = False,
) -> Losses:
    """The activations of one chunk at a time are held, whatever the batch (arXiv 2101.06983)."""
    chunks = batch.images + batch.texts
    features = [None] * len(chunks)
    if keep_features:
        # Vision tower and projector are frozen: both passes see the same features.
        features = [image_features(llava, chunk) for chunk in chunks]

    # Pass 1: the embeddings, and nothing kept for a backward pass.
    embeddings = []
    with torch.no_grad():
        for chunk, kept in zip(chunks, features):
            if prefix_only:
                # A summary sees nothing of the caption behind it.
                end = int(chunk.summary.max()) + 1
                chunk = replace(chunk, input_ids=chunk.input_ids[:, :end])
            embeddings.append(encode_kept(llava, chunk, kept)[1])
    # The gradient of the contrastive loss with respect to each embedding.
    for summaries in embeddings:
        summaries.requires_grad_()
    contrastive = contrast_of(llava, contrast, batch, embeddings)
    contrastive.backward()

    # Pass 2: each chunk once more, now with a backward pass.
    autoregressive = 0.0
    for chunk, kept, known in zip(chunks, features, embeddings):
        hidden, summaries = encode_kept(llava, chunk, kept)
        loss = head_loss(llava, head, chunk, hidden, batch)
        # The chain rule: the gradient of this product is what contrast contributes.
        total = (summaries * known.grad).sum() + loss
        total.backward()
        autoregressive += loss.item()
    return contrastive.item(), autoregressive


def image_features(llava: Llava, chunk: Chunk) -> Tensor | None:
    if chunk.pixel_values is None:
        return None
    with torch.no_grad():
        return llava.image_features(chunk.pixel_values.to(DEVICE, llava.dtype))


def encode_kept(llava: Llava, chunk: Chunk, features: Tensor | None) -> tuple[Tensor, Tensor]:
    """`encode`, with image features that were computed before, where there are some."""
    if features is None:
        return encode(llava, chunk)
    hidden = llava(chunk.input_ids.to(DEVICE), image_features=features)
    rows = torch.arange(len(hidden), device=DEVICE)
    return hidden, hidden[rows, chunk.summary.to(DEVICE)]


# ---- Other models under the same steps


def sharing(llava: Llava) -> Llava:
    """A copy of the modules, but not of the parameters: gradients go to the same place."""
    return copy.deepcopy(llava, memo={id(each): each for each in llava.parameters()})


def checkpointed(llava: Llava, step: Callable) -> Losses:
    """A step with every decoder layer's activations computed twice instead of kept."""
    llava.language_model.checkpoint_layers = len(llava.language_model.layers)
    result = step(llava)
    llava.language_model.checkpoint_layers = 0
    return result


# ---- The rungs


@dataclass
class Rung:
    name: str
    llava: Llava
    step: Callable[[Llava], Losses]
    code: object  # the function or class of the project that does it; None for the first
    before: str  # the rung it stands on, by name

    def run(self) -> Losses:
        return self.step(self.llava)

    def run_and_forget(self) -> None:
        """For the clock: gradients do not pile up."""
        self.run()
        self.llava.zero_grad()


def make_rungs(config: LlavaConfig, pairs: int, micro_batch: int, dtype: torch.dtype) -> list[Rung]:
    """All rungs, on the same weights, LoRA and batch."""
    samples = make_samples(config, pairs)
    layout = Layout(config)
    whole = collate(samples, layout, micro_batch=pairs)  # each side in one chunk
    multiple = 32 if DEVICE.type == "cuda" else 1
    batch = collate(samples, layout, micro_batch, multiple=multiple)  # sorted by length

    plain = build_plain(config, dtype)
    leaner = sharing(plain)
    fast.install(leaner)
    rounded = sharing(leaner)
    int8.quantize(rounded)

    rungs = []

    def add(name: str, llava: Llava, step: Callable, code: object, before: str = "") -> None:
        if not before and rungs:
            before = rungs[-1].name
        rungs.append(Rung(name, llava, step, code, before))

    step = partial(three_forwards, samples=samples, layout=layout, side="left")
    add("three forwards, masks, logits everywhere", plain, step, None)

    step = partial(three_forwards, samples=samples, layout=layout, side="right")
    add("right padding, no masks", plain, step, data.make_chunk)

    parts = {"head": logits_everywhere, "contrast": contrastive_loss}
    step = partial(one_image_forward, batch=whole, **parts)
    add("one image forward for both losses", plain, step, train.backward_whole)

    step = partial(one_image_forward, batch=batch, **parts)
    add("micro-batches sorted by length", plain, step, data.make_chunks)

    parts["head"] = caption_rows
    step = partial(one_image_forward, batch=batch, **parts)
    add("head on caption rows only", plain, step, losses.cross_entropy)

    parts["head"] = partial(caption_rows, loss=chunked.linear_cross_entropy)
    step = partial(one_image_forward, batch=batch, **parts)
    add("cross-entropy in chunks", plain, step, chunked.linear_cross_entropy)

    parts["contrast"] = chunked.tiled_contrastive_loss
    step = partial(one_image_forward, batch=batch, **parts)
    add("contrast in tiles", plain, step, chunked.tiled_contrastive_loss)

    all_held = "lean LoRA and decoder"
    step = partial(one_image_forward, batch=batch, **parts)
    add(all_held, leaner, step, lean.LeanDecoderLayer)

    # From here on, time is paid for memory. Two ways, which both stand on the lean layers.
    again = partial(checkpointed, step=step)
    add("every layer checkpointed", leaner, again, model.LanguageModel.run_layers)

    step = partial(two_passes, batch=batch, **parts)
    add("gradient cache", leaner, step, train.backward_cached, before=all_held)

    step = partial(two_passes, batch=batch, keep_features=True, **parts)
    add("image features once a step", leaner, step, train.prepare_chunks)

    step = partial(two_passes, batch=batch, keep_features=True, prefix_only=True, **parts)
    add("first pass on the prefix only", leaner, step, train.embeddings_only)
    cached = rungs[-1].name

    again = partial(checkpointed, step=step)
    add("both: cache and checkpoints", leaner, again, model.LanguageModel.run_layers)

    add("int8 base (other numbers)", rounded, step, int8.quantize, before=cached)
    return rungs


def place_of(code: object) -> str:
    """`file: function` of what a rung uses of the project."""
    if code is None:
        return "-"
    path = Path(inspect.getsourcefile(code)).relative_to(ROOT)
    return f"`{path.as_posix()}`: `{code.__qualname__}`"


# ---- What is measured


def losses_and_gradients(rung: Rung) -> tuple[Losses, dict[str, Tensor]]:
    rung.llava.zero_grad()
    found = rung.run()
    parameters = adapter_parameters(rung.llava)
    gradients = {name: each.grad.float().clone() for name, each in parameters.items()}
    rung.llava.zero_grad()
    return found, gradients


def weight_bytes(llava: Llava) -> int:
    return sum(each.nbytes for each in llava.parameters())


def differences(rungs: list[Rung]) -> list[float]:
    """How far each rung is from the first: the largest relative difference of both losses and of
    the gradient of any trained tensor."""
    first_losses, first_gradients = losses_and_gradients(rungs[0])
    found = []
    for rung in rungs:
        its_losses, its_gradients = losses_and_gradients(rung)
        of_losses = [abs(a / b - 1) for a, b in zip(its_losses, first_losses)]
        found.append(max(*of_losses, largest_difference(first_gradients, its_gradients)))
    return found


def measure(rungs: list[Rung], rounds: int) -> list[dict]:
    """One row a rung: what is counted, then what is timed."""
    held = [each for rung in rungs for each in rung.llava.parameters()]
    rows = []
    for rung, difference in zip(rungs, differences(rungs)):
        rows.append(
            {
                "name": rung.name,
                "before": rung.before,
                "code": place_of(rung.code),
                "difference": difference,
                "flops": count_flops(rung.run_and_forget),
                "saved": saved_bytes(rung.run_and_forget, held),
                "weights": weight_bytes(rung.llava),
                "peak": peak_memory(rung.run_and_forget),
            }
        )
    taken = times([rung.run_and_forget for rung in rungs], rounds)
    place = {rung.name: index for index, rung in enumerate(rungs)}
    for index, (rung, row) in enumerate(zip(rungs, rows)):
        before = taken[place.get(rung.before, 0)]
        row["of_before"] = quartiles([a / b for a, b in zip(taken[index], before)])
        row["of_first"] = quartiles([a / b for a, b in zip(taken[index], taken[0])])
    return rows


def ratio(values: dict[str, float]) -> str:
    return f"{values['ratio']:.2f} ({values['low']:.2f} - {values['high']:.2f})"


def print_rows(rows: list[dict]) -> None:
    """Markdown, so that a document can take it as it is."""
    columns = ["rung", "time / rung before", "time / first", "GFLOP", "kept, MB", "peak, MB"]
    columns += ["weights, MB", "differs by", "code"]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")
    previous = ""
    for row in rows:
        name = row["name"]
        if row["before"] != previous:
            name += f" (on: {row['before']})"
        previous = row["name"]
        before = ratio(row["of_before"]) if row["before"] else "-"
        cells = [name, before, ratio(row["of_first"]), f"{row['flops'] / 1e9:.0f}"]
        cells += [f"{row[key] / 1e6:.0f}" for key in ("saved", "peak")]
        cells += [f"{row['weights'] / 1e6:.1f}", f"{row['difference']:.0e}", row["code"]]
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="see benchmarks/step.py")
    parser.add_argument("--batch", type=int, default=8, help="pairs of image and captions (8)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of timed steps (7)")
    args = parser.parse_args()
    config, _, micro_batch = SIZES[args.size]
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    rungs = make_rungs(config, args.batch, micro_batch, dtype)
    print(f"{args.size}, {device_name()}, {dtype}, {args.batch} images with captions, ", end="")
    print(f"micro-batches of {micro_batch}, {args.pairs} pairs of steps")
    rows = measure(rungs, args.pairs)
    print_rows(rows)
    for row in rows:
        # (bf16 has three digits: there the column is all there is to see.)
        if dtype == torch.float32 and "int8" not in row["name"] and row["difference"] > 1e-5:
            raise SystemExit(f"{row['name']}: losses or gradients are not those of the first rung")


if __name__ == "__main__":
    main()
