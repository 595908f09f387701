"""Four patients for notebook 6: each trains without a complaint, and each has one silent fault.

A `System` is the method in plain code, made of four parts. Each part is here twice, as it should be
and as somebody wrote it. (Who only wants the answers finds them below. The point is to find them by
a measurement, as nobody tells in real life.)

Axes: b sequences, T tokens, D hidden.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import Layout, Sample
from eval import load_embedder
from losses import IGNORE, contrastive_loss, cross_entropy
from train import TrainConfig, add_adapters, make_optimizer

POSITION = "the embedding is read at a wrong position"
LABELS = "the labels are off by one"
TEMPERATURE = "the temperature is frozen"
LEAK = "the caption leaks into the summary"
FAULTS = (POSITION, LABELS, TEMPERATURE, LEAK)


class Row(NamedTuple):
    """A picture's sequence."""

    ids: list[int]
    summary: int  # the position that is the embedding
    places: range  # the positions that are trained to predict the caption


# ---- The four parts, as they should be


def pool(hidden, lengths):
    """hidden (b, T, D) of texts, padded on the right, lengths (b,) -> (b, D)."""
    return hidden[torch.arange(len(hidden)), lengths - 1]


def labels(ids, places):
    """ids (T,), places: a tensor of those positions that are trained -> labels (T,)."""
    wanted = torch.full_like(ids, IGNORE)
    wanted[places] = ids[places + 1]
    return wanted


def scale(model):
    """What the similarities are multiplied by: 1 / temperature."""
    return model.log_scale.exp()


def sequence(layout: Layout, caption: list[int]) -> Row:
    """Picture, prompt, caption. The summary is the end of the prompt."""
    ids = layout.image_side(caption)
    summary = layout.image_summary
    return Row(ids, summary, range(summary, len(ids) - 1))


# ---- The four parts, as somebody wrote them


def pool_of_the_last(hidden, lengths):
    """hidden (b, T, D) of texts, padded on the right, lengths (b,) -> (b, D)."""
    return hidden[:, -1]


def labels_of_themselves(ids, places):
    """ids (T,), places: a tensor of those positions that are trained -> labels (T,)."""
    wanted = torch.full_like(ids, IGNORE)
    wanted[places + 1] = ids[places + 1]
    return wanted


def scale_of_the_start(model):
    """What the similarities are multiplied by: 1 / temperature."""
    return 1 / 0.07


def sequence_with_caption_first(layout: Layout, caption: list[int]) -> Row:
    """Picture, caption, prompt. The summary is the end of the prompt."""
    front = layout.prefix()
    ids = front + caption + layout.image_prompt
    first = len(front) - 1
    return Row(ids, len(ids) - 1, range(first, first + len(caption)))


# ---- What is made of them


class System:
    """A model with adapters, both losses, and the step that trains it."""

    def __init__(self, folder: str | Path, **parts):
        """parts: functions that take the places of `pool`, `labels`, `scale` or `sequence`."""
        embedder = load_embedder(folder, device="cpu")
        config = TrainConfig(fast=False)
        add_adapters(embedder, config)
        self.model = embedder.model
        self.layout = embedder.layout
        self.optimizer = make_optimizer(self.model, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] / 4  # there is no warm-up here
        self.pool = parts.get("pool", pool)
        self.labels = parts.get("labels", labels)
        self.scale = parts.get("scale", scale)
        self.sequence = parts.get("sequence", sequence)

    def embed_texts(self, texts: list[str]):
        """-> (b, D), unit length."""
        rows = [torch.tensor(self.layout.text_side(text)) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        hidden = self.model(pad_sequence(rows, batch_first=True))  # (b, T, D)
        return F.normalize(self.pool(hidden, lengths), dim=-1)

    def rows(self, samples: list[Sample], captions: list[list[int]] | None = None):
        """What the model reads of pictures and captions (their own, or those given), and what it is
        to say: input_ids (b, T), labels (b, T), summary (b,)."""
        captions = captions or [sample.long for sample in samples]
        ids = []
        wanted = []
        summary = []
        for caption in captions:
            row = self.sequence(self.layout, caption)
            ids.append(torch.tensor(row.ids))
            wanted.append(self.labels(ids[-1], torch.tensor(row.places)))
            summary.append(row.summary)
        input_ids = pad_sequence(ids, batch_first=True)
        padded = pad_sequence(wanted, batch_first=True, padding_value=IGNORE)
        return input_ids, padded, torch.tensor(summary)

    def read_pictures(self, samples: list[Sample], captions: list[list[int]] | None = None):
        """One pass -> hidden states (b, T, D), labels (b, T), embeddings (b, D) of unit length."""
        input_ids, wanted, summary = self.rows(samples, captions)
        pixel_values = torch.stack([sample.pixel_values for sample in samples])
        hidden = self.model(input_ids, pixel_values)
        embeddings = hidden[torch.arange(len(hidden)), summary]
        return hidden, wanted, F.normalize(embeddings, dim=-1)

    def embed_pictures(self, samples: list[Sample], captions: list[list[int]] | None = None):
        """-> (b, D), unit length: what training takes for the pictures' embeddings."""
        return self.read_pictures(samples, captions)[2]

    def losses(self, samples: list[Sample]):
        """The two of the paper, by name."""
        hidden, wanted, images = self.read_pictures(samples)
        texts = self.embed_texts([sample.short for sample in samples])
        number = int((wanted != IGNORE).sum())
        return {
            "contrastive": contrastive_loss(images, texts, self.scale(self.model)),
            "autoregressive": cross_entropy(hidden, self.model.lm_head.weight, wanted, number),
        }

    def backward(self, samples: list[Sample]) -> dict[str, float]:
        """Forward and backward: new gradients are in `.grad`, nothing has moved. -> the losses."""
        self.optimizer.zero_grad()
        found = self.losses(samples)
        sum(found.values()).backward()
        return {name: loss.item() for name, loss in found.items()}

    def step(self, samples: list[Sample]) -> dict[str, float]:
        """One step of training -> the losses before it."""
        found = self.backward(samples)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return found


BROKEN = {
    POSITION: {"pool": pool_of_the_last},
    LABELS: {"labels": labels_of_themselves},
    TEMPERATURE: {"scale": scale_of_the_start},
    LEAK: {"sequence": sequence_with_caption_first},
}
ILLNESS = {"A": LABELS, "B": LEAK, "C": TEMPERATURE, "D": POSITION}  # do not look


def patients(folder: str | Path) -> dict[str, System]:
    """A to D, each with another fault."""
    return {name: System(folder, **BROKEN[fault]) for name, fault in ILLNESS.items()}


# ---- The four measurements, with which the checkers compare


@torch.no_grad()
def ignores_neighbours(system: System, samples: list[Sample]) -> bool:
    """A text has its embedding, whatever else is in its batch."""
    short = "a red ring"
    longer = "there is a large red ring on a navy background"
    alone = system.embed_texts([short])
    together = system.embed_texts([short, longer])[:1]
    return bool((alone - together).abs().max() < 1e-3)


@torch.no_grad()
def predicts_the_next(system: System, samples: list[Sample]) -> bool:
    """Each position that is trained is to say the token behind it."""
    input_ids, wanted, _ = system.rows(samples)
    for ids, row in zip(input_ids, wanted):
        places = (row != IGNORE).nonzero()[:, 0]
        if not torch.equal(row[places], ids.roll(-1)[places]):
            return False
    return True


def temperature_learns(system: System, samples: list[Sample]) -> bool:
    """The loss has a gradient for the temperature."""
    system.backward(samples)
    gradient = system.model.log_scale.grad
    return gradient is not None and bool(gradient != 0)


@torch.no_grad()
def caption_stays_out(system: System, samples: list[Sample]) -> bool:
    """A picture has its embedding, whatever caption stands beside it."""
    captions = [sample.long for sample in samples]
    own = system.embed_pictures(samples)
    others = system.embed_pictures(samples, captions[1:] + captions[:1])
    return bool((own - others).abs().max() < 1e-3)


MEASUREMENTS = {
    POSITION: ignores_neighbours,
    LABELS: predicts_the_next,
    TEMPERATURE: temperature_learns,
    LEAK: caption_stays_out,
}


@functools.cache
def systems(folder: str | Path) -> dict[str, System]:
    """A healthy one under "", and one with each fault, made once: what a test is tried on."""
    found = {"": System(folder)}
    for fault, parts in BROKEN.items():
        found[fault] = System(folder, **parts)
    return found
