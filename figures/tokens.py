"""Figure 4: the next tokens at the position where the summary is read, before and after training.

    python -m figures tokens --runs contrastive=runs/contrastive-0 both=runs/toy

Axes: B batch, V vocabulary.
"""

import math
from collections import Counter

import numpy as np
import torch

from eval import Embedder
from figures.common import (
    BEFORE,
    Compared,
    Item,
    as_seen,
    decode_picture,
    entropy,
    image_features,
    next_token,
    nothing_trained,
    summaries,
    trained,
    trend,
    verdict,
    with_short,
    word,
)
from figures.style import color_of, drawing, new_figure, show, title_of, wrapped


def measure(embedder: Embedder, items: list[Item], k: int = 10, shown: int = 3) -> dict:
    """The next token's distribution at the summary position of the items' images and of their first
    short captions, of the model as it is. See `describe`; of the first `shown` items the top k."""
    items = with_short(items)
    image_ids = [embedder.layout.image_side()] * len(items)
    text_ids = [embedder.layout.text_side(item.short[0]) for item in items]
    states = {
        "images": summaries(embedder, image_ids, image_features(embedder, items)),
        "captions": summaries(embedder, text_ids),
    }
    # One dictionary an item, to which both kinds add their list.
    examples = []
    for item in items[:shown]:
        examples.append({"picture": as_seen(embedder, item), "caption": item.short[0]})
    result = {"items": len(items), "k": k, "examples": examples}
    for kind, hidden in states.items():
        log_probabilities = next_token(embedder, hidden)  # (B, V)
        result[kind] = describe(log_probabilities, k)
        best = log_probabilities[:shown].topk(k)
        for row, example in enumerate(examples):
            ids = best.indices[row].tolist()
            values = best.values[row].exp().tolist()
            example[f"{kind}_top"] = [[word(embedder, id), p] for id, p in zip(ids, values)]
    return result


def describe(log_probabilities: torch.Tensor, k: int) -> dict:
    """(B, V) -> what is told about next tokens, means over the items:

    entropy     in nats
    top1        probability of the likeliest token
    sorted      probabilities, sorted downwards, the first 100
    different   how many tokens there are in all top-k lists together
    rarity      of a token in a top-k list: log(items / items that have it in theirs)"""
    number = len(log_probabilities)
    top = log_probabilities.topk(k).indices  # (B, k)
    lists_with = Counter(top.flatten().tolist())
    # A token stands in `count` lists, and has this rarity in each of them.
    rarity = sum(count * math.log(number / count) for count in lists_with.values())
    downwards = log_probabilities.exp().sort(dim=-1, descending=True).values
    mean = downwards.mean(dim=0)
    return {
        "entropy": entropy(log_probabilities).mean().item(),
        "top1": mean[0].item(),
        "different": len(lists_with),
        "rarity": rarity / (k * number),
        "sorted": mean[:100].tolist(),
    }


def say(found: Compared) -> str:
    before = found[BEFORE][0]
    sentences = []
    for name in trained(found):
        told = []
        is_up = []
        for kind in ("images", "captions"):
            # Flatter.
            new = [seed[kind]["entropy"] for seed in found[name]]
            direction, change = trend(before[kind]["entropy"], new)
            told.append(f"entropy on {kind} {change}")
            is_up.append(direction == "up")

            # More diverse: more words stand in some list.
            new = [seed[kind]["different"] for seed in found[name]]
            direction, change = trend(before[kind]["different"], new, ".0f")
            told.append(f"different top words on {kind} {change}")
            is_up.append(direction == "up")
        appears = verdict(is_up)
        sentences.append(
            f"{name}: the paper's trend (flatter, more diverse) {appears}: {'; '.join(told)}."
        )
    return "\n".join(sentences) or nothing_trained(found)


@drawing
def draw(found: Compared):
    """A row for each example: the picture, and the likeliest next tokens behind it, before and
    after each recipe (its first seed); a row for the first example's caption; below, the mean
    distribution, likeliest token first."""
    names = list(found)
    colors = color_of(found)
    examples = found[BEFORE][0]["examples"]
    rows = [(index, "images") for index in range(len(examples))] + [(0, "captions")]
    heights = [1.0] * len(rows) + [1.6]
    widths = [0.75] + [1] * len(names)
    figure = new_figure(3.0 + 3.4 * len(names), 1.75 * sum(heights))
    grid = figure.add_gridspec(
        len(heights), len(widths), height_ratios=heights, width_ratios=widths
    )
    for row, (index, kind) in enumerate(rows):
        draw_input(figure.add_subplot(grid[row, 0]), examples[index], kind)
        for column, name in enumerate(names, 1):
            axes = figure.add_subplot(grid[row, column])
            top = found[name][0]["examples"][index][f"{kind}_top"]
            draw_bars(axes, top[:6], colors[name])
            axes.tick_params(labelbottom=row == len(rows) - 1)
            if row == 0:
                axes.set_title(title_of(name), color=colors[name], weight="bold")
    below = figure.add_subfigure(grid[-1, :]).subplots(1, 2, sharey=True)
    draw_distribution(below[0], found, "images")
    draw_distribution(below[1], found, "captions")
    below[0].set_ylabel("probability")
    return figure


def draw_input(axes, example: dict, kind: str) -> None:
    if kind == "images":
        show(axes, decode_picture(example["picture"]))
    else:
        axes.text(0, 0.5, wrapped(example["caption"], 20), va="center", style="italic")
        axes.axis("off")


def draw_bars(axes, top: list[list], color: str, rows: int = 6) -> None:
    """The likeliest tokens, each written behind its bar, or into it where it is long."""
    axes.barh(range(len(top)), [p for _, p in top], color=color, height=0.75)
    for place, (token, p) in enumerate(top):
        if p > 0.5:
            style = dict(ha="right", color="white")
            x = p - 0.02
        else:
            style = dict(ha="left", color="black")
            x = p + 0.02
        axes.text(x, place, token, va="center", fontsize=11, **style)
    # Upside down: the likeliest on top. All alike, so that bars compare between the panels.
    axes.set(xlim=(0, 1), ylim=(rows - 0.4, -0.6), yticks=[], xticks=[0, 0.5, 1])


def draw_distribution(axes, found: Compared, kind: str) -> None:
    colors = color_of(found)
    for name, seeds in found.items():
        mean = np.mean([numbers[kind]["entropy"] for numbers in seeds])
        label = f"{name}: entropy {mean:.2f}"
        for numbers in seeds:
            curve = numbers[kind]["sorted"]
            style = dict(color=colors[name], label=label, alpha=0.85, linewidth=1.6)
            axes.plot(range(1, len(curve) + 1), curve, **style)
            label = None  # the legend names a recipe once
    # Logarithms: most tokens are as good as impossible.
    axes.set(xscale="log", yscale="log", ylim=(1e-5, 1.5), xlabel="rank of the token")
    axes.set_title(f"mean over {found[BEFORE][0]['items']} {kind}")
    axes.legend(fontsize=11, loc="lower left")
