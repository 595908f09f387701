"""Figure 6: where the summary token looks, before and after training.

    python -m figures attention --runs contrastive=runs/contrastive-0 both=runs/toy
    python -m figures attention --heads 0.1 3.2                    layer.head, for the pictures

Axes: B batch, T tokens, N image tokens, D hidden, H heads, K key/value heads, L layers.
"""

import math

import numpy as np
import torch

from eval import Embedder
from figures.common import (
    BEFORE,
    Compared,
    Item,
    as_seen,
    decode_picture,
    image_features,
    nothing_trained,
    trained,
    trend,
    verdict,
)
from figures.style import color_of, drawing, new_figure, show
from formats.files import InputError
from model import rotate, split_heads


@torch.no_grad()
def summary_attention(
    embedder: Embedder, features: torch.Tensor, batch_size: int = 32
) -> torch.Tensor:
    """Attention weights of the summary position of images, (B, L, H, T) in fp32 on the CPU, over
    the T positions up to the summary; the last axis sums to 1. `features` are (B, N, D).

    Attention as it is computed never shows its weights, so each layer's are computed again, from
    its own queries and keys."""
    model = embedder.model
    ids = torch.tensor([embedder.layout.image_side()], device=model.device)  # (1, T)
    seen: list[torch.Tensor] = []  # of one batch, layer by layer

    def watch(layer, inputs):
        x, cos, sin = inputs[:3]
        seen.append(weights_of_last(layer, x, cos, sin).cpu())

    # At the layer, for a lean one (fast/) has an attention module but does not call it.
    handles = [layer.register_forward_pre_hook(watch) for layer in model.language_model.layers]
    try:
        parts = []
        for part in features.split(batch_size):
            seen.clear()
            model(ids.expand(len(part), -1), image_features=part)
            parts.append(torch.stack(seen, dim=1))  # (b, L, H, T)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts)


def weights_of_last(layer, x, cos, sin) -> torch.Tensor:
    """What the last position attends to in one decoder layer: x (b, T, D) -> (b, H, T) in fp32.

    The last position may see all positions, so no causal mask is needed."""
    attention = layer.self_attn
    x = layer.input_layernorm(x)
    head_dim = cos.shape[-1]
    q = rotate(split_heads(attention.q_proj(x), head_dim), cos, sin)  # (b, H, T, head_dim)
    k = rotate(split_heads(attention.k_proj(x), head_dim), cos, sin)  # (b, K, T, head_dim)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (b, H, T, head_dim)
    scores = (q[:, :, -1:] @ k.transpose(2, 3)).float() * head_dim**-0.5  # (b, H, 1, T)
    return scores.softmax(dim=-1)[:, :, 0]


def measure(
    embedder: Embedder,
    items: list[Item],
    chosen: list[list[int]] | None = None,
    shown: int = 3,
) -> dict:
    """Where the summary position looks. For each layer and head, means over the images:

    mass      the share of attention that falls on image tokens
    density   the entropy of how it is spread over them, in nats, at most log N
    maps      of the first `shown` images the weights over the N image tokens, for the `chosen`
              heads [layer, head]; where none are given, the 4 that look at the image most"""
    weights = summary_attention(embedder, image_features(embedder, items))  # (B, L, H, T)
    layout = embedder.layout
    is_image = torch.tensor(layout.image_side()) == layout.image_id
    on_image = weights[..., is_image]  # (B, L, H, N)
    mass = on_image.sum(dim=-1)  # (B, L, H)
    # As a distribution over the image alone; a head may not look at it at all.
    spread = on_image / mass[..., None].clamp(min=1e-12)
    density = torch.special.entr(spread).sum(dim=-1).mean(dim=0)  # (L, H)
    mass = mass.mean(dim=0)
    if chosen is None:
        chosen = most_on_image(mass)
    refuse_unknown(chosen, *mass.shape)

    maps = []
    for item, each in zip(items[:shown], on_image):
        heat = [each[layer, head].tolist() for layer, head in chosen]
        maps.append({"picture": as_seen(embedder, item), "weights": heat})
    return {
        "items": len(items),
        "image_tokens": int(is_image.sum()),
        "density": density.tolist(),
        "mass": mass.tolist(),
        "mean_density": density.mean().item(),
        "mean_mass": mass.mean().item(),
        "chosen": [list(each) for each in chosen],
        "maps": maps,
    }


def most_on_image(mass: torch.Tensor, number: int = 4) -> list[list[int]]:
    """mass (L, H) -> the heads that look at the image most, [layer, head], in their own order."""
    number = min(number, mass.numel())
    best = mass.flatten().topk(number).indices.tolist()
    H = mass.shape[1]
    return sorted([index // H, index % H] for index in best)


def refuse_unknown(chosen: list[list[int]], L: int, H: int) -> None:
    wrong = []
    for layer, head in chosen:
        if not (0 <= layer < L and 0 <= head < H):
            wrong.append(f"{layer}.{head}")
    if wrong:
        known = f"layers 0 to {L - 1} with heads 0 to {H - 1}"
        raise InputError(f"no head {', '.join(wrong)}: there are {known}")


def say(found: Compared) -> str:
    before = found[BEFORE][0]
    most = math.log(before["image_tokens"])
    old = np.array(before["density"])  # (L, H)
    sentences = []
    for name in trained(found):
        seeds = found[name]
        direction, density = trend(before["mean_density"], [seed["mean_density"] for seed in seeds])
        percent = [100 * seed["mean_mass"] for seed in seeds]
        _, mass = trend(100 * before["mean_mass"], percent, ".1f")
        higher = np.mean([(np.array(seed["density"]) > old).sum() for seed in seeds])
        appears = verdict([direction == "up"])
        sentences.append(
            f"{name}: the paper's trend (attention to the image gets dense) {appears}: entropy "
            f"over the image tokens {density} nats of at most {most:.2f}, higher in {higher:.0f} "
            f"of {old.size} heads; share of attention on the image {mass} %."
        )
    return "\n".join(sentences) or nothing_trained(found)


@drawing
def draw(found: Compared, name: str | None = None):
    """Above: density (entropy over the image tokens) and share of attention on the image, layer by
    layer, thin lines are seeds. Below: attention of the chosen heads laid over the pictures, before
    and after (`name`'s first seed); each map is scaled to its own largest weight, and the number is
    its entropy."""
    if name is None:
        name = (trained(found) or [BEFORE])[-1]
    before = found[BEFORE][0]
    shown = {BEFORE: before, name: found[name][0]}
    rows = len(before["maps"])
    # The picture; then, for each model, a gap and its heads.
    widths = [1.0]
    for _ in shown:
        widths += [0.18] + [1.0] * len(before["chosen"])

    figure = new_figure(0.6 + 1.35 * sum(widths), 3.3 + 1.5 * rows)
    above, below = figure.subfigures(2, 1, height_ratios=[3.1, 0.35 + 1.4 * rows])
    draw_layers(above, found)
    grid = below.add_gridspec(rows, len(widths), width_ratios=widths)
    for row in range(rows):
        picture = decode_picture(before["maps"][row]["picture"])
        show(below.add_subplot(grid[row, 0]), picture)
        column = 1
        for when, numbers in shown.items():
            column += 1  # the gap
            for place, weights in enumerate(numbers["maps"][row]["weights"]):
                axes = below.add_subplot(grid[row, column])
                draw_map(axes, picture, np.array(weights))
                if row == 0:
                    layer, head = before["chosen"][place]
                    title = f"{layer}.{head}" if place else f"{when}: {layer}.{head}"
                    style = dict(fontsize=11, loc="center", weight="bold")
                    axes.set_title(title, color=color_of(found)[when], **style)
                column += 1
    note = "attention of single heads (layer.head); below each map its entropy"
    below.suptitle(note, fontsize=12)
    return figure


def draw_layers(part, found: Compared) -> None:
    """Density and share of attention, layer by layer: means over the heads."""
    colors = color_of(found)
    density, mass = part.subplots(1, 2)
    for key, axes in (("density", density), ("mass", mass)):
        for name, seeds in found.items():
            lines = [np.mean(seed[key], axis=1) for seed in seeds]
            if len(lines) > 1:  # one seed is its own mean
                for line in lines:
                    axes.plot(line, color=colors[name], linewidth=0.8, alpha=0.6)
            style = dict(color=colors[name], label=name, marker="o", markersize=4)
            axes.plot(np.mean(lines, axis=0), **style)
        layers = len(found[BEFORE][0][key])
        axes.set_xticks(range(0, layers, 1 + layers // 9))  # at most ten
    most = math.log(found[BEFORE][0]["image_tokens"])
    density.axhline(most, color="black", linewidth=1, linestyle=":")
    style = dict(textcoords="offset points", fontsize=10)
    density.annotate("all image tokens alike", (0, most), (2, 3), **style)
    density.set(xlabel="layer", ylabel="entropy, nats", title="density of attention to the image")
    density.set_ylim(0, most * 1.15)
    density.legend(loc="best", fontsize=11)
    mass.set(xlabel="layer", ylabel="share", title="attention that falls on the image")
    mass.set_ylim(0, 1.03)


def draw_map(axes, picture: np.ndarray, weights: np.ndarray) -> None:
    """One head's weights (N,) over the picture in gray; below it their entropy."""
    side = math.isqrt(len(weights))
    heat = weights[-side * side :].reshape(side, side)  # without CLIP's class token, if it is there
    settings = dict(extent=(0, side, side, 0), interpolation="nearest")
    axes.imshow(picture.mean(axis=-1), cmap="gray", vmin=0, vmax=255, **settings)
    axes.imshow(heat, cmap="viridis", alpha=0.55, vmin=0, **settings)
    spread = heat[heat > 0] / heat.sum()  # 0 log 0 is 0
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"{-(spread * np.log(spread)).sum():.2f}", fontsize=11, labelpad=1)
