"""Figures 2, 3 and 5: which hand-written prompt makes a good embedding?

    python -m figures prompts --model toy/tiny-llava

For each pair of prompts: entropy of the next token, effective rank of the embeddings, zero-shot
retrieval; and the rank correlations between the three over all pairs. On the base model.

Axes: B batch, D hidden.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from eval import Embedder, recall_at_k
from figures.common import (
    Item,
    entropy,
    image_features,
    next_token,
    summaries,
    verdict,
    with_short,
)
from figures.style import GRAY, OFFSET, drawing, new_figure
from lora import adapters_disabled

# Pairs of an image prompt and a text prompt, from good to useless; the first is the paper's.
PROMPTS = Path(__file__).parent / "prompts.json"


def measure(embedder: Embedder, items: list[Item], pairs: list[list[str]]) -> dict:
    """Of each pair (image prompt, text prompt), with each item's first short caption: the mean
    entropy of the next token in nats, the effective rank of the embeddings and their cumulative
    PCA variance in percent, and R@1 in percent. Then the correlations, see `correlate`."""
    items = with_short(items)
    features = image_features(embedder, items)
    with adapters_disabled(embedder.model):
        rows = [measure_pair(embedder, items, features, pair) for pair in pairs]
    return {"items": len(items), "prompts": rows, "correlations": correlate(rows)}


def measure_pair(
    embedder: Embedder, items: list[Item], features: torch.Tensor, pair: list[str]
) -> dict:
    layout = embedder.layout.with_prompts(*pair)
    image_ids = [layout.image_side()] * len(items)
    text_ids = [layout.text_side(item.short[0]) for item in items]
    images = summaries(embedder, image_ids, features)  # (B, D)
    texts = summaries(embedder, text_ids)

    # A prompt of words that the tokenizer does not know asks for something else.
    unknown = embedder.tokenizer.special_ids.get("<unk>")
    row = {
        "image_prompt": pair[0],
        "text_prompt": pair[1],
        "unknown_words": layout.prompt_ids.count(unknown) / len(layout.prompt_ids),
    }
    embeddings = {}
    for kind, states in (("image", images), ("text", texts)):
        embeddings[kind] = F.normalize(states.float().cpu(), dim=-1)
        rank, variance = spectrum(embeddings[kind])
        row[f"{kind}_entropy"] = entropy(next_token(embedder, states)).mean().item()
        row[f"{kind}_rank"] = rank
        row[f"{kind}_variance"] = variance

    scores = embeddings["text"] @ embeddings["image"].T  # (texts, images)
    recall = recall_at_k(scores, torch.arange(len(items)), ks=(1,))
    row.update(recall)
    row["r1"] = sum(recall.values()) / 2
    row["entropy"] = (row["image_entropy"] + row["text_entropy"]) / 2
    row["rank"] = (row["image_rank"] + row["text_rank"]) / 2
    return row


# ---- Small calculations


def spectrum(embeddings: torch.Tensor) -> tuple[float, list[float]]:
    """(B, D), centred here -> the effective rank, and the share of variance in the first 1, 2, ...
    principal components, in percent.

    The effective rank is exp of the entropy of the normalised singular values (Roy and Vetterli,
    EUSIPCO 2007)."""
    centred = embeddings - embeddings.mean(dim=0)
    values = torch.linalg.svdvals(centred.double())
    share = values / values.sum()
    rank = torch.special.entr(share).sum().exp().item()
    variance = (values**2).cumsum(0) / (values**2).sum()
    return rank, [round(100 * each, 3) for each in variance[:64].tolist()]


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1 on; equal values share the mean of their ranks."""
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    equal = (x[..., None, :] == x[..., :, None]).sum(-1)
    return below + (equal + 1) / 2


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's, along the last axis: Pearson's correlation of the ranks."""
    middle = (x.shape[-1] + 1) / 2
    x = ranks(x) - middle
    y = ranks(y) - middle
    norm = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return (x * y).sum(-1) / np.where(norm > 0, norm, 1)  # 0 where all values are equal


def spearman(x: list[float], y: list[float], draws: int = 2000) -> dict[str, float]:
    """Rank correlation "rho", its two-sided p value by permutation, and a 95 % interval ("low",
    "high") by bootstrap over the pairs."""
    x = np.asarray(x, float)
    y = np.asarray(y, float)
    random = np.random.default_rng(0)  # the same numbers every time
    rho = rank_correlation(x, y)
    shuffled = random.permuted(np.tile(y, (draws, 1)), axis=1)  # (draws, pairs)
    by_chance = np.abs(rank_correlation(x, shuffled))
    # How often an order by chance correlates as much; the true order counts as one of them.
    as_large = (by_chance >= abs(rho) - 1e-12).sum()  # rounding is no difference
    # Bootstrap: pairs drawn with repetition, as if the experiment were done again.
    chosen = random.integers(len(x), size=(draws, len(x)))
    low, high = np.quantile(rank_correlation(x[chosen], y[chosen]), (0.025, 0.975))
    return {
        "rho": float(rho),
        "p": float((1 + as_large) / (1 + draws)),
        "low": float(low),
        "high": float(high),
    }


def correlate(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Rank correlations over the prompts, "entropy ~ r1" and the like.

    Two clusters of prompts alone would make a correlation. So there are two more, of entropy with
    R@1: "good", among the prompts of at least half of the best R@1, and "poor", among the rest."""

    def of(x: str, y: str) -> dict[str, float]:
        return spearman([row[x] for row in rows], [row[y] for row in rows])

    entropies = ("entropy", "image_entropy", "text_entropy")
    all_ranks = ("rank", "image_rank", "text_rank")
    result = {}
    for cause in (*entropies, *all_ranks):
        for recall in ("r1", "t2i_r1", "i2t_r1"):
            result[f"{cause} ~ {recall}"] = of(cause, recall)
    for x, y in zip(entropies, all_ranks):
        result[f"{x} ~ {y}"] = of(x, y)

    half = max(row["r1"] for row in rows) / 2
    clusters = {
        "good": [row for row in rows if row["r1"] >= half],
        "poor": [row for row in rows if row["r1"] < half],
    }
    for name, cluster in clusters.items():
        if len(cluster) > 2:
            x = [row["entropy"] for row in cluster]
            y = [row["r1"] for row in cluster]
            result[name] = spearman(x, y)
            result[name]["prompts"] = len(cluster)
    return result


# ---- What they say


def say(numbers: dict) -> str:
    found = numbers["correlations"]
    retrieval = found["entropy ~ r1"]
    rank = found["entropy ~ rank"]
    both = found["rank ~ r1"]
    appears = verdict([each["low"] > 0 for each in (retrieval, rank, both)])
    told = (
        "The paper's trend (entropy of the next token goes with rank and with retrieval) "
        f"{appears} over {len(numbers['prompts'])} prompts: Spearman of entropy with R@1 "
        f"{tell(retrieval)}; of entropy with effective rank {tell(rank)}; of rank with R@1 "
        f"{tell(both)}."
    )
    for name in ("good", "poor"):
        if name in found:
            told += (
                f" Of entropy with R@1 among the {found[name]['prompts']} {name} prompts alone: "
                f"{tell(found[name])}."
            )
    return told


def tell(correlation: dict[str, float]) -> str:
    """A correlation in words: +0.78 [+0.62, +0.87], p < 0.001."""
    p = correlation["p"]
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return "{rho:+.2f} [{low:+.2f}, {high:+.2f}], ".format(**correlation) + chance


# ---- What they show


@drawing
def draw(numbers: dict):
    """Each prompt a dot or a line, the lighter the higher its entropy. Left: entropy and R@1;
    middle: cumulative PCA variance; right: effective rank and R@1. The star is the paper's pair,
    the first of the list."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    rows = numbers["prompts"]
    figure = new_figure(13, 4.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.12])
    entropies = [row["entropy"] for row in rows]
    # The map's last, yellow part would be too light on white.
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))
    colors = ScalarMappable(Normalize(min(entropies), max(entropies)), shades)
    dots = colors.to_rgba(entropies)  # (prompts, 4)

    draw_recall(left, numbers, "entropy", "entropy of the next token, nats", dots)
    draw_recall(right, numbers, "rank", "effective rank", dots)
    annotate(left, rows)
    draw_variance(middle, rows, dots)
    figure.colorbar(colors, ax=right, pad=0.02).set_label("entropy, nats")
    return figure


def draw_recall(axes, numbers: dict, x: str, label: str, dots: np.ndarray) -> None:
    rows = numbers["prompts"]
    values = [row[x] for row in rows]
    recalls = [row["r1"] for row in rows]
    axes.scatter(values, recalls, c=dots, s=42, edgecolor="white", linewidth=0.6)
    axes.scatter(values[:1], recalls[:1], marker="*", s=260, c=dots[:1], edgecolor="black")
    rho = numbers["correlations"][f"{x} ~ r1"]["rho"]
    axes.set(xlabel=label, ylabel="zero-shot R@1, %")
    axes.set_title(f"{x} and retrieval: Spearman {rho:.2f}")
    axes.set_ylim(-4, 1.12 * max(recalls))


def annotate(axes, rows: list[dict]) -> None:
    """Name the paper's prompt, and the one that a LLaVA captions with."""
    first = rows[0]
    alike = 0
    for row in rows[1:]:
        same_entropy = abs(row["entropy"] - first["entropy"]) < 0.1
        same_recall = abs(row["r1"] - first["r1"]) < 2
        alike += same_entropy and same_recall
    note = f"the paper's, and {alike} much alike"
    place = (first["entropy"], first["r1"])
    axes.annotate(note, place, (14, 15), ha="right", va="center", **OFFSET)
    for row in rows:
        if row["image_prompt"].startswith("Describe the image in detail"):
            line = dict(arrowstyle="-", color=GRAY)
            place = (row["entropy"], row["r1"])
            note = "Describe ... in detail."
            axes.annotate(note, place, (66, 3), va="center", arrowprops=line, **OFFSET)


def draw_variance(axes, rows: list[dict], dots: np.ndarray) -> None:
    # The highest entropy last, so that it lies on top.
    for index in sorted(range(len(rows)), key=lambda index: rows[index]["entropy"]):
        row = rows[index]
        variance = np.mean([row["image_variance"], row["text_variance"]], axis=0)
        axes.plot(range(1, len(variance) + 1), variance, color=dots[index], linewidth=1.2)
    # Logarithmic: the first components tell the prompts apart.
    axes.set(xscale="log", xlabel="principal components")
    axes.set(ylabel="variance explained, %", ylim=(0, 103))
    places = [1, 2, 5, 10, 20, 50]
    axes.set(xticks=places, xticklabels=places, title="embeddings, prompt by prompt")
