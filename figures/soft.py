"""What the soft prompts became: how far each position moved, and which word is nearest to it now.

    python -m figures soft --runs both=runs/toy both=runs/seed-1

Axes: P prompt tokens, D hidden, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F

from eval import Embedder
from figures.common import Compared, trained, verdict, word
from figures.style import OFFSET, ORANGE, SEED, SKY, drawing, new_figure
from formats.files import InputError
from lora import SoftPrompt


@torch.no_grad()
def measure(embedder: Embedder) -> dict:
    """{"image": [...], "text": [...]}, of each position of both soft prompts `measure_position`.

    Raises InputError for a model without soft prompts."""
    embedding = embedder.model.language_model.embed_tokens
    if not isinstance(embedding, SoftPrompt):
        raise InputError("this model has no soft prompts")
    vocabulary = embedding.weight.float()  # (V, D)
    began = embedding.prompt_ids.tolist()
    number = len(embedding.image)
    prompts = {
        "image": (began[:number], embedding.image),  # P ids, (P, D)
        "text": (began[number:], embedding.text),
    }
    result = {}
    for kind, (ids, vectors) in prompts.items():
        result[kind] = []
        for start, vector in zip(ids, vectors.float()):
            position = measure_position(vocabulary, start, vector)
            # Words for ids, which say nothing to a reader.
            for key in ("start", "nearest_cosine", "nearest_l2"):
                position[key] = word(embedder, position[key])
            result[kind].append(position)
    return result


def measure_position(vocabulary: torch.Tensor, start: int, vector: torch.Tensor) -> dict:
    """Of a vector (D,) that began as token `start` of the vocabulary (V, D):

    moved             L2 distance from the start, over the length of the start
    gaps              the same over the start's distance to its nearest other token: from 0.5 on the
                      vector may have come nearer to that one
    nearest_cosine    the nearest token by cosine, and `cosine` itself
    nearest_l2        the nearest token by distance, and the distance `l2`
    stayed            is one of these two still the start?"""
    origin = vocabulary[start]
    distance = (vocabulary - vector).norm(dim=-1)  # (V,)
    cosine = F.cosine_similarity(vocabulary, vector[None])
    from_origin = (vocabulary - origin).norm(dim=-1)
    from_origin[start] = torch.inf  # itself is no other token
    nearest = int(distance.argmin())
    alike = int(cosine.argmax())
    # Lengths can be 0: an unused row of a vocabulary is one of zeros.
    return {
        "start": start,
        "moved": (distance[start] / origin.norm().clamp(min=1e-12)).item(),
        "gaps": (distance[start] / from_origin.min().clamp(min=1e-12)).item(),
        "cosine_to_start": cosine[start].item(),
        "nearest_cosine": alike,
        "cosine": cosine[alike].item(),
        "nearest_l2": nearest,
        "l2": distance[nearest].item(),
        "stayed": start in (nearest, alike),
    }


def say(found: Compared) -> str:
    sentences = []
    for name in trained(found):
        told = []
        holds = []
        for kind in ("image", "text"):
            seeds = [seed[kind] for seed in found[name]]
            moved = column(seeds, "moved")  # (seeds, P)
            edge = moved[:, [0, -1]].mean()
            inner = moved[:, 1:-1].mean()
            stayed = column(seeds, "stayed").mean()
            # Our reading of "only boundary tokens change".
            holds.append(edge / max(inner, 1e-12) > 1.2 and stayed >= 0.5)
            told.append(
                f"{kind} prompt: first and last token moved {edge:.2f} of their length, those "
                f"between {inner:.2f}; {100 * stayed:.0f} % are still nearest to the token they "
                "began as"
            )
        sentences.append(
            f"{name}, {len(found[name])} run(s): the paper's trend (prompts stay what they say, "
            f"only boundary tokens change) {verdict(holds)}: {'; '.join(told)}."
        )
    return "\n".join(sentences)


def column(seeds: list[list[dict]], key: str) -> np.ndarray:
    """One number of every seed and position, (seeds, P)."""
    values = []
    for rows in seeds:
        values.append([row[key] for row in rows])
    return np.array(values)


@drawing
def draw(found: Compared, name: str | None = None):
    """Each position of both prompts: how far it moved (bar: mean, dots: seeds), in lengths of the
    token that it began as; beside it the vocabulary's nearest tokens by cosine and by L2 (first
    seed), bold where they changed."""
    seeds = found[name or trained(found)[0]]
    first = seeds[0]
    rows = max(len(first["image"]), len(first["text"]))
    farthest = 0.0
    for seed in seeds:
        for row in seed["image"] + seed["text"]:
            farthest = max(farthest, row["moved"])

    # One scale for both prompts, and room behind the longest bar for the words.
    figure = new_figure(12, 1.3 + 0.42 * rows)
    for axes, kind in zip(figure.subplots(1, 2, sharex=True), ("image", "text")):
        draw_prompt(axes, [seed[kind] for seed in seeds])
        axes.set(ylim=(rows - 0.4, -0.6), xlim=(0, 1.75 * farthest))
        axes.set_title(f"soft {kind} prompt ({name or trained(found)[0]})")
    note = (
        "beside the bars: the nearest token now (by cosine | by L2, where they differ), "
        "bold where it is another; orange: boundary tokens"
    )
    figure.supxlabel(note, fontsize=11)
    return figure


def draw_prompt(axes, seeds: list[list[dict]]) -> None:
    first = seeds[0]
    places = range(len(first))
    moved = column(seeds, "moved")  # (seeds, P)
    # The first and the last token are those that the paper saw change.
    colors = [SKY] * len(first)
    colors[0] = ORANGE
    colors[-1] = ORANGE
    axes.barh(places, moved.mean(0), color=colors)
    if len(seeds) > 1:
        for each in moved:
            axes.plot(each, places, "o", markersize=4, **SEED)
    for place, row in enumerate(first):
        near = row["nearest_cosine"]
        if row["nearest_l2"] != near:
            near += f" | {row['nearest_l2']}"
        weight = "normal" if near == row["start"] else "bold"
        end = (moved[:, place].max(), place)
        axes.annotate(near, end, (7, 0), va="center", weight=weight, **OFFSET)
    axes.set(yticks=places, yticklabels=[row["start"] for row in first])
    axes.set_xlabel("distance from the start / length of the start")
