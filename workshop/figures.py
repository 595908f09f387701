"""The paper's figures, on the toy run or on any other: numbers as JSON, a picture as PNG, and one sentence.

    python -m workshop.figures prompts                 figures 2, 3, 5: which prompt makes a good embedding?
    python -m workshop.figures tokens                  figure 4: the next tokens where the summary is read
    python -m workshop.figures attention               figure 6: where the summary token looks
    python -m workshop.figures captions --runs contrastive=runs/contrastive-0 both=runs/toy    figure 7
    python -m workshop.figures soft                    what the soft prompts became
    python -m workshop.figures gallery                 what captions find, before and after
    python -m workshop.figures curves runs/toy runs/seed-1     losses of the training, metrics before and after

`--runs [NAME=]DIR ...` are runs of train.py or LLaVA folders; runs of one NAME are seeds of one recipe (default:
runs/toy). `--data` is a file of captioned images, as in data.py, or of a retrieval test (default: the toy's test set).

Each analysis is a function that returns plain numbers, so that json can write them, another that draws them and
returns matplotlib's Figure, and a third that says in one sentence whether the paper's trend appears. `compare` measures
the base model once and each run once: {"before": [numbers], NAME: [numbers of each seed]}.

Axes: B batch, T tokens, N image tokens, D hidden, H heads, K key/value heads, L layers, V vocabulary.
"""

import argparse
import base64
import functools
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import LONG, CaptionDataset, DataError, Layout, inside, open_image, read_json, read_retrieval
from eval import ROOT, USER_ERRORS, Run, caption, cider_d, load_run, recall_at_k, summary
from examples.commands import positive
from lora import SoftPrompt, adapters_disabled
from model import heads, rotate
from toy import world

PROMPTS = Path(__file__).parent / "prompts.json"  # pairs of an image prompt and a text prompt, from good to useless
BEFORE = "before"
Compared = dict[str, list[dict]]


@dataclass
class Item:
    """A picture with its captions."""

    image: Path
    short: list[str]
    long: list[str]
    part: tuple[int, int] | None = None  # of a larger file: offset, bytes

    def open(self) -> Image.Image:
        return open_image(self.image, self.part)


def read_items(file: Path, run: Run, images: Path | None = None, split: str = "test", limit: int = 500) -> list[Item]:
    """The first `limit` records of a .jsonl file in data.py's format, or of a retrieval test (.json)."""
    if file.suffix == ".json":
        found = read_retrieval(file, images or file.parent, split)
        return [Item(image, captions, []) for image, captions in found if captions][:limit]
    dataset, items = CaptionDataset(file, run.layout, run.processor, images), []
    for index in range(min(limit, len(dataset))):
        record, item = dataset.record(index), Item(Path(), [], [])
        for text in record["short"] + record["long"] + record["captions"]:
            is_long = len(run.tokenizer.encode(text.strip())) >= LONG
            (item.long if is_long else item.short).append(text.strip())
        item.image, item.part = inside(dataset.root, record["image"]), record.get("part")
        items.append(item)
    return items


def compare(recipes: dict[str, list[Path]], measure: Callable[[Run], dict], device: str | None = None) -> Compared:
    """`measure` of the base model, then of every run with its adapters; one model at a time is held in memory.
    Raises DataError where two runs began with different models."""
    result, bases, run = {}, set(), None
    for name, folders in recipes.items():
        for folder in folders:
            del run
            run, settings = load_run(folder, device), Path(folder) / "config.json"
            bases.add(str(read_json(settings).get("model", folder)) if run.is_adapted else str(folder))
            if len(bases) > 1:
                raise DataError(f"{folder}: another base model than the runs before: {sorted(bases)}")
            if not result:
                with adapters_disabled(run.model):
                    result[BEFORE] = [measure(run)]
            if run.is_adapted:
                result.setdefault(name, []).append(measure(run))
    return result


def with_short(items: list[Item]) -> list[Item]:
    """Those that have a short caption. Raises DataError where none has."""
    if not any(item.short for item in items):
        raise DataError(f"none of {len(items)} records has a caption of fewer than {LONG} tokens")
    return [item for item in items if item.short]


def pictures(run: Run, items: list[Item], batch_size: int = 64) -> torch.Tensor:
    """Image features of items, (B, N, D): frozen, so they are the same before and after training."""
    with torch.no_grad():
        parts = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        return torch.cat([run.model.image_features(run.pixel_values([i.open() for i in part])) for part in parts])


def as_seen(run: Run, item: Item, most: int = 96) -> str:
    """The part of a picture that the model sees, cropped and resized as for the model: a PNG in base64, for JSON."""
    low, high = run.processor.table[:, :1, None], run.processor.table[:, -1:, None]
    pixels = (run.processor(item.open()).numpy() - low) / (high - low)  # (3, height, width)
    picture = Image.fromarray((255 * pixels.transpose(1, 2, 0)).round().clip(0, 255).astype(np.uint8))
    picture.thumbnail((most, most))
    picture.save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decode_picture(text: str) -> np.ndarray:
    """What `as_seen` wrote -> (height, width, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]))


@torch.no_grad()
def summaries(run: Run, rows: list[list[int]], features=None, batch_size: int = 64) -> torch.Tensor:
    """Ids that end at the summary position, and image features (B, N, D) or none -> the last hidden states (B, D).
    Not of unit length: the next token's logits are made from them. Normalised, they are eval.py's embeddings."""
    order, device = sorted(range(len(rows)), key=lambda index: len(rows[index])), run.model.device
    states = torch.empty(len(rows), run.model.config.text.hidden_size, dtype=run.model.dtype, device=device)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        padded = [torch.tensor(rows[index], device=device) for index in chosen]
        last = torch.tensor([len(row) - 1 for row in padded], device=device)
        part = None if features is None else features[chosen]
        hidden = run.model(torch.nn.utils.rnn.pad_sequence(padded, batch_first=True), image_features=part)
        states[chosen] = hidden[torch.arange(len(chosen), device=device), last]
    return states


@torch.no_grad()
def next_token(run: Run, states: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, D) -> log-probabilities of the next token (B, V) in fp32, on the CPU."""
    return torch.cat([run.model.logits(part).float().log_softmax(dim=-1).cpu() for part in states.split(64)])


def entropy(log_probabilities: torch.Tensor) -> torch.Tensor:
    """(..., V) -> (...), in nats; exp of it is how many equally likely tokens would be as uncertain."""
    return torch.special.entr(log_probabilities.exp()).sum(dim=-1)


def word(run: Run, token: int) -> str:
    """A token as it is shown: LLaMA's and GPT-2's signs for a space and a line break made plain."""
    text = run.tokenizer.tokenizer.id_to_token(token) or "?"
    text = {"<0x0A>": "\\n", "\n": "\\n"}.get(text, text).replace("Ċ", "\\n")
    return text.replace("▁", "").replace("Ġ", "") or "_"


# ---- Figures 2, 3 and 5: entropy of the next token, rank of the embeddings, zero-shot retrieval, prompt by prompt


def prompts(run: Run, items: list[Item], pairs: list[list[str]]) -> dict:
    """Of each pair (image prompt, text prompt), hand-written and on the base model, with each item's first short
    caption: mean entropy of the next token (nats), effective rank of the embeddings and their cumulative PCA variance,
    R@1; and the rank correlations between these, over the prompts. "good" and "poor": of entropy with R@1 among the
    prompts above and below half of the best R@1, since two clusters alone would make a correlation."""
    items = with_short(items)
    features, rows, own = pictures(run, items), [], torch.arange(len(items))
    unknown = run.tokenizer.special_ids.get("<unk>")
    with adapters_disabled(run.model):
        for pair in pairs:
            layout = Layout(run.tokenizer, run.model.config.num_image_tokens, *pair)
            ids = [layout.image_side()] * len(items), [layout.text_side(item.short[0]) for item in items]
            states = [summaries(run, ids[0], features), summaries(run, ids[1])]
            row = dict(zip(("image_prompt", "text_prompt"), pair))
            row["unknown_words"] = layout.prompt_ids.count(unknown) / len(layout.prompt_ids)
            embeddings = [F.normalize(each.float().cpu(), dim=-1) for each in states]
            for kind, hidden, embedding in zip(("image", "text"), states, embeddings):
                row[f"{kind}_entropy"] = entropy(next_token(run, hidden)).mean().item()
                row[f"{kind}_rank"], row[f"{kind}_variance"] = spectrum(embedding)
            recall = recall_at_k(embeddings[1] @ embeddings[0].T, own, ks=(1,))
            row |= recall | {"r1": sum(recall.values()) / 2}
            rows.append(row | {name: (row[f"image_{name}"] + row[f"text_{name}"]) / 2 for name in ("entropy", "rank")})
    causes = [f"{kind}{name}" for name in ("entropy", "rank") for kind in ("", "image_", "text_")]
    asked = [(x, y) for x in causes for y in ("r1", "t2i_r1", "i2t_r1")] + list(zip(causes[:3], causes[3:]))
    correlations = {f"{x} ~ {y}": spearman([r[x] for r in rows], [r[y] for r in rows]) for x, y in asked}
    half = max(row["r1"] for row in rows) / 2
    for part, chosen in (("good", [r for r in rows if r["r1"] >= half]), ("poor", [r for r in rows if r["r1"] < half])):
        if len(chosen) > 2:
            correlations[part] = spearman([r["entropy"] for r in chosen], [r["r1"] for r in chosen])
            correlations[part]["prompts"] = len(chosen)
    return {"items": len(items), "prompts": rows, "correlations": correlations}


def spectrum(embeddings: torch.Tensor) -> tuple[float, list[float]]:
    """(B, D), centred here -> effective rank, exp of the entropy of the normalised singular values (Roy and Vetterli,
    EUSIPCO 2007), and the share of variance in the first 1, 2, ... components, in percent."""
    values = torch.linalg.svdvals((embeddings - embeddings.mean(dim=0)).double())
    share = values / values.sum()
    variance = (values**2).cumsum(0) / (values**2).sum()
    return torch.special.entr(share).sum().exp().item(), [round(100 * v, 3) for v in variance[:64].tolist()]


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, the mean rank for ties."""
    below, equal = (x[..., None, :] < x[..., :, None]).sum(-1), (x[..., None, :] == x[..., :, None]).sum(-1)
    return below + (equal + 1) / 2


def spearman(x: list[float], y: list[float], draws: int = 2000) -> dict[str, float]:
    """Rank correlation, its p value by permutation (two-sided), and a 95 % interval by bootstrap over the pairs."""

    def correlation(a, b):
        a, b = (ranks(each) - (each.shape[-1] + 1) / 2 for each in (a, b))
        norm = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        return (a * b).sum(-1) / np.where(norm > 0, norm, 1)  # 0 where all are equal

    x, y, random = np.asarray(x, float), np.asarray(y, float), np.random.default_rng(0)
    rho = correlation(x, y)
    shuffled = np.abs(correlation(x, random.permuted(np.tile(y, (draws, 1)), axis=1)))
    chosen = random.integers(len(x), size=(draws, len(x)))
    low, high = np.quantile(correlation(x[chosen], y[chosen]), (0.025, 0.975))
    p = (1 + (shuffled >= abs(rho) - 1e-12).sum()) / (1 + draws)
    return {"rho": float(rho), "p": float(p), "low": float(low), "high": float(high)}


def say_prompts(numbers: dict) -> str:
    found = numbers["correlations"]

    def tell(name):
        c = found[name]
        p = "p < 0.001" if c["p"] < 0.001 else f"p = {c['p']:.3f}"
        return f"{c['rho']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}], {p}"

    keys = "entropy ~ r1", "entropy ~ rank", "rank ~ r1"
    appears = [found[key]["low"] > 0 for key in keys]
    word = "appears" if all(appears) else "appears in part" if any(appears) else "does not appear"
    return (
        f"The paper's trend (entropy of the next token goes with rank and with retrieval) {word} over "
        f"{len(numbers['prompts'])} prompts: Spearman of entropy with R@1 {tell(keys[0])}; of entropy with effective "
        f"rank {tell(keys[1])}; of rank with R@1 {tell(keys[2])}."
        + "".join(
            f" Of entropy with R@1 among the {found[part]['prompts']} {part} prompts alone: {tell(part)}."
            for part in ("good", "poor")
            if part in found
        )
    )


# ---- Figure 4: the next tokens at the summary position


def tokens(run: Run, items: list[Item], k: int = 10, shown: int = 3) -> dict:
    """The next token's distribution at the summary position of the items' images and first short captions, of the
    model as it is: mean entropy (nats), mean probability of the likeliest token, mean probabilities sorted downwards,
    number of different tokens among all top-k lists, and how rare a top-k token is: the mean of log(items / items that
    have it in their list). Of the first `shown` items the top k."""
    items = with_short(items)
    rows = {
        "images": ([run.layout.image_side()] * len(items), pictures(run, items)),
        "captions": ([run.layout.text_side(item.short[0]) for item in items], None),
    }
    result = {"items": len(items), "k": k}
    result["examples"] = [{"picture": as_seen(run, item), "caption": item.short[0]} for item in items[:shown]]
    for kind, (ids, features) in rows.items():
        log_probabilities = next_token(run, summaries(run, ids, features))  # (B, V)
        top = log_probabilities.topk(k)
        lists_with = Counter(top.indices.flatten().tolist())
        ordered = log_probabilities.exp().sort(dim=-1, descending=True).values.mean(dim=0)
        result[kind] = {
            "entropy": entropy(log_probabilities).mean().item(),
            "top1": ordered[0].item(),
            "different": len(lists_with),
            "rarity": sum(n * math.log(len(items) / n) for n in lists_with.values()) / (k * len(items)),
            "sorted": ordered[:100].tolist(),
        }
        for example, ids, values in zip(result["examples"], top.indices.tolist(), top.values.exp().tolist()):
            example[f"{kind}_top"] = [[word(run, index), p] for index, p in zip(ids, values)]
    return result


def trend(found: Compared, name: str, value: Callable[[dict], float], format: str = ".2f") -> tuple[str, str]:
    """How a recipe changed a number: ("up", "1.20 -> 1.90 (1.85 to 1.95)"); "down", or "mixed" where seeds disagree or
    a change is below one percent."""
    old, new = value(found[BEFORE][0]), [value(each) for each in found[name]]
    signs = (
        {new_value > old for new_value in new} if all(abs(n - old) > 0.01 * abs(old) for n in new) else {True, False}
    )
    spread = f" ({min(new):{format}} to {max(new):{format}}, {len(new)} seeds)" if len(new) > 1 else ""
    word = "mixed" if len(signs) > 1 else "up" if True in signs else "down"
    return word, f"{old:{format}} -> {sum(new) / len(new):{format}}{spread}"


def verdict(directions: list[str]) -> str:
    up = [direction == "up" for direction in directions]
    return "appears" if all(up) else "appears in part" if any(up) else "does not appear"


def trained(found: Compared) -> list[str]:
    return [name for name in found if name != BEFORE]


def nothing_trained(found: Compared) -> str:
    return "" if trained(found) else "Only a base model was given: nothing to compare with."


def say_tokens(found: Compared) -> str:
    sentences = []
    for name in trained(found):
        told, directions = [], []
        for kind in ("images", "captions"):
            for key, label, form in (("entropy", "entropy", ".2f"), ("different", "different top words", ".0f")):
                direction, numbers = trend(found, name, lambda each, kind=kind, key=key: each[kind][key], form)
                told.append(f"{label} on {kind} {numbers}")
                directions.append(direction)
        told = "; ".join(told)
        sentences.append(f"{name}: the paper's trend (flatter, more diverse) {verdict(directions)}: {told}.")
    return "\n".join(sentences) or nothing_trained(found)


# ---- Figure 6: attention from the summary token to the image tokens


@torch.no_grad()
def summary_attention(run: Run, features: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Attention weights of the summary position of images, computed from each layer's own queries and keys:
    features (B, N, D) -> (B, L, H, T) in fp32 on the CPU, T positions up to the summary; the last axis sums to 1."""
    ids = torch.tensor([run.layout.image_side()], device=run.model.device)
    weights: list[torch.Tensor] = []

    def watch(layer, inputs):
        (x, cos, sin), attention = inputs[:3], layer.self_attn
        x, head_dim = layer.input_layernorm(x), cos.shape[-1]
        q, k = (rotate(heads(y, head_dim), cos, sin) for y in (attention.q_proj(x), attention.k_proj(x)))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (b, K, T, head_dim) -> (b, H, T, head_dim)
        scores = (q[:, :, -1:] @ k.transpose(2, 3)).float() * head_dim**-0.5  # (b, H, 1, T)
        weights.append(scores.softmax(dim=-1)[:, :, 0].cpu())

    handles = [layer.register_forward_pre_hook(watch) for layer in run.model.language_model.layers]
    try:
        parts = []
        for part in features.split(batch_size):
            weights.clear()
            run.model(ids.expand(len(part), -1), image_features=part)
            parts.append(torch.stack(weights, dim=1))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts)


def attention(run: Run, items: list[Item], chosen: list[list[int]] | None = None, shown: int = 3) -> dict:
    """Where the summary position looks. For each layer and head, means over the images: "mass", the share of attention
    that falls on image tokens, and "density", the entropy of how it is spread over them (nats, at most log N). "maps":
    of the first `shown` images the weights over the N image tokens, for the `chosen` heads (layer, head); where none
    are given, the 4 that look at the image most."""
    weights = summary_attention(run, pictures(run, items))
    is_image = torch.tensor(run.layout.image_side()) == run.layout.image_id
    on_image = weights[..., is_image]  # (B, L, H, N)
    mass = on_image.sum(dim=-1)
    spread = on_image / mass[..., None].clamp(min=1e-12)
    density, mean_mass = torch.special.entr(spread).sum(dim=-1).mean(dim=0), mass.mean(dim=0)  # (L, H)
    if chosen is None:
        best = mean_mass.flatten().topk(min(4, mean_mass.numel())).indices.tolist()
        chosen = sorted(list(divmod(index, mean_mass.shape[1])) for index in best)
    L, H = mean_mass.shape
    if wrong := [f"{layer}.{head}" for layer, head in chosen if not (0 <= layer < L and 0 <= head < H)]:
        raise DataError(f"no head {', '.join(wrong)}: there are layers 0 to {L - 1} with heads 0 to {H - 1}")
    return {
        "items": len(items),
        "image_tokens": int(is_image.sum()),
        "density": density.tolist(),
        "mass": mean_mass.tolist(),
        "mean_density": density.mean().item(),
        "mean_mass": mean_mass.mean().item(),
        "chosen": [list(each) for each in chosen],
        "maps": [
            {"picture": as_seen(run, item), "weights": [each[layer, head].tolist() for layer, head in chosen]}
            for item, each in zip(items[:shown], on_image)
        ],
    }


def say_attention(found: Compared) -> str:
    sentences = []
    for name in trained(found):
        direction, density = trend(found, name, lambda each: each["mean_density"])
        _, mass = trend(found, name, lambda each: 100 * each["mean_mass"], ".1f")
        most, old = math.log(found[BEFORE][0]["image_tokens"]), np.array(found[BEFORE][0]["density"])
        rises = [(np.array(each["density"]) > old).sum() for each in found[name]]
        sentences.append(
            f"{name}: the paper's trend (attention to the image gets dense) {verdict([direction])}: entropy over the "
            f"image tokens {density} nats of at most {most:.2f}, higher in {np.mean(rises):.0f} of {old.size} heads; "
            f"share of attention on the image {mass} %."
        )
    return "\n".join(sentences) or nothing_trained(found)


# ---- Figure 7: captions


def captions(run: Run, items: list[Item], score: Callable | None = None, max_new_tokens: int = 128) -> dict:
    """Greedy captions of the model as it is: "prompted" behind the image prompt that it was trained with (the base
    model: behind a plain question), "described" behind a plain question; words a caption, and `score`, a function of
    captions and references (default: CIDEr-D)."""
    items = [item for item in items if item.long or item.short]
    references, result = [item.long or item.short for item in items], {"items": len(items)}
    question = "Describe the image in detail."
    for kind, asked in {"prompted": None, "described": question}.items():
        texts = []
        if kind == "described" and not run.is_adapted:
            result[kind] = result["prompted"]  # it was asked this question already
            break
        for start in range(0, len(items), 32):
            images = [item.open() for item in items[start : start + 32]]
            texts += caption(run, images, asked, max_new_tokens)
        scores = (score or cider_d)(texts, references)
        result[kind] = {"words": sum(len(text.split()) for text in texts) / len(texts)} | scores | {"texts": texts}
    result["references"] = [texts[0] for texts in references]
    result["pictures"] = [as_seen(run, item) for item in items[:4]]
    return result


def say_captions(found: Compared) -> str:
    sentences = []
    first = found[BEFORE][0]["prompted"]
    key = next(key for key in first if key not in ("words", "texts"))
    for name in trained(found):
        told = []
        for kind, label in (("prompted", "behind the image prompt"), ("described", "behind a plain question")):
            _, numbers = trend(found, name, lambda each, kind=kind: each[kind][key], ".1f")
            _, words = trend(found, name, lambda each, kind=kind: each[kind]["words"], ".0f")
            told.append(f"{key} {numbers} {label}, words a caption {words}")
        values = [each["prompted"][key] for each in found[name]]
        survives = "survives" if min(values) > 0.9 * first[key] else "does not survive"
        sentences.append(f"{name}: captioning {survives}: {'; '.join(told)}.")
    return "\n".join(sentences) or nothing_trained(found)


def false_sentences(text: str, reference: str) -> list[tuple[str, bool | None]]:
    """A caption of the toy world, sentence by sentence: is it true of the scene that the long caption `reference`
    tells all about? None where it is no sentence of that world's language."""
    pattern = rf"{world.PLACE.pattern} there is an? (small|large) ([a-z]+) ([a-z]+)"
    objects = {place: world.Thing(*thing) for place, *thing in re.findall(pattern, reference.lower())}
    background = world.BACKGROUND.search(reference.lower())
    if not background or not objects:
        raise DataError(f"not a long caption of the toy world: {reference!r}")
    scene = world.SceneTable([world.Scene(background[0], tuple(objects.get(place) for place in world.PLACES))])
    result = []
    for sentence in re.findall(r"[^.]*\.|[^.]+$", text):
        try:
            result.append((sentence.strip(), bool(world.truth(sentence.strip(), scene)[0])))
        except ValueError:
            result.append((sentence.strip(), None))
    return result


# ---- What the soft prompts became


@torch.no_grad()
def soft(run: Run) -> dict:
    """Of each position of both soft prompts: the token it began as; how far it went, as L2 distance over the length of
    the start, and over the start's distance to its nearest other token ("gaps": from 0.5 on it may have left its cell);
    the nearest vocabulary tokens by cosine and by L2. Raises DataError for a run without soft prompts."""
    embedding = run.model.language_model.embed_tokens
    if not isinstance(embedding, SoftPrompt):
        raise DataError("this model has no soft prompts")
    vocabulary = embedding.weight.float()
    starts = embedding.prompt_ids.split([len(embedding.image), len(embedding.text)])
    result = {}
    for kind, ids, vectors in zip(("image", "text"), starts, (embedding.image, embedding.text)):
        rows = []
        for start, vector in zip(ids.tolist(), vectors.float()):
            origin, distance = vocabulary[start], (vocabulary - vector).norm(dim=-1)
            cosine = F.cosine_similarity(vocabulary, vector[None])
            gap = (vocabulary - origin).norm(dim=-1).scatter(0, torch.tensor(start, device=vector.device), torch.inf)
            near, alike = int(distance.argmin()), int(cosine.argmax())
            rows.append(
                {
                    "start": word(run, start),
                    "moved": (distance[start] / origin.norm().clamp(min=1e-12)).item(),
                    "gaps": (distance[start] / gap.min().clamp(min=1e-12)).item(),
                    "cosine_to_start": cosine[start].item(),
                    "nearest_cosine": word(run, alike),
                    "cosine": cosine[alike].item(),
                    "nearest_l2": word(run, near),
                    "l2": distance[near].item(),
                    "stayed": start in (near, alike),
                }
            )
        result[kind] = rows
    return result


def say_soft(found: Compared) -> str:
    sentences = []
    for name in trained(found):
        told, ratios, shares = [], [], []
        for kind in ("image", "text"):
            runs = [each[kind] for each in found[name]]
            edge = np.mean([[rows[0]["moved"], rows[-1]["moved"]] for rows in runs])
            inner = np.mean([[row["moved"] for row in rows[1:-1]] for rows in runs])
            stayed = np.mean([[row["stayed"] for row in rows] for rows in runs])
            ratios.append(edge / max(inner, 1e-12))
            shares.append(stayed)
            told.append(
                f"{kind} prompt: first and last token moved {edge:.2f} of their length, those between {inner:.2f}; "
                f"{100 * stayed:.0f} % are still nearest to the token they began as"
            )
        directions = ["up" if ratio > 1.2 and share >= 0.5 else "down" for ratio, share in zip(ratios, shares)]
        sentences.append(
            f"{name}, {len(found[name])} run(s): the paper's trend (prompts stay what they say, only boundary tokens "
            f"change) {verdict(directions)}: {'; '.join(told)}."
        )
    return "\n".join(sentences)


# ---- Retrieval before and after


def gallery(run: Run, items: list[Item], k: int = 5) -> dict:
    """Each item's first short caption as a query over all items' pictures: the k nearest pictures (their number among
    the items) and cosine similarities, and R@1. The picture that a caption was written for is the only right one."""
    items = with_short(items)
    states = (
        summaries(run, [run.layout.text_side(item.short[0]) for item in items]),
        summaries(run, [run.layout.image_side()] * len(items), pictures(run, items)),
    )
    texts, images = (F.normalize(each.float().cpu(), dim=-1) for each in states)
    scores = texts @ images.T
    top = scores.topk(min(k, len(items)))
    return {
        "items": len(items),
        "t2i_r1": recall_at_k(scores, torch.arange(len(items)), ks=(1,))["t2i_r1"],
        "queries": [item.short[0] for item in items],
        "images": [[str(item.image), item.part] for item in items],
        "found": top.indices.tolist(),
        "scores": [[round(score, 4) for score in row] for row in top.values.tolist()],
    }


def interesting(before: dict, after: dict, number: int) -> list[int]:
    """Queries to draw: the first ones, in the file's order, that one of the two models answers with a wrong picture;
    where these do not suffice, the first of the others."""
    wrong = [any(model["found"][i][0] != i for model in (before, after)) for i in range(before["items"])]
    return sorted(sorted(range(before["items"]), key=lambda i: not wrong[i])[:number])


def say_gallery(found: Compared) -> str:
    sentences = []
    for name in trained(found):
        direction, numbers = trend(found, name, lambda each: each["t2i_r1"], ".1f")
        pairs = [(found[BEFORE][0]["found"], each["found"]) for each in found[name]]
        right = np.array([[[row[0] == i for i, row in enumerate(found)] for found in pair] for pair in pairs])
        mended, broken = ((right[:, 0] < right[:, 1]).sum(1).mean(), (right[:, 0] > right[:, 1]).sum(1).mean())
        sentences.append(
            f"{name}: better retrieval {verdict([direction])}: text-to-image R@1 {numbers} % of "
            f"{found[BEFORE][0]['items']} queries; {mended:.0f} mended, {broken:.0f} broken."
        )
    return "\n".join(sentences) or nothing_trained(found)


# ---- Curves of training


def curves(recipes: dict[str, list[Path]]) -> dict[str, list[dict]]:
    """Of each run folder: "log", its log.jsonl as columns (an unfinished last line is left out), and "before" and
    "after", the columns of its tables, where there are any. Runs of one name are seeds of one recipe."""
    return {name: [read_curve(folder) for folder in folders] for name, folders in recipes.items()}


def read_curve(folder: Path) -> dict:
    path, log = folder / "log.jsonl", {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); is this a run?") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            log[int(row["step"])] = row  # of a step that was done twice, after a resume, the last counts
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise DataError(f"{path}: line {number} is not a step of training") from None
    if not log:
        raise DataError(f"{path}: holds no step yet")
    names = ("step", "contrastive", "chance", "autoregressive", "temperature")
    entry = {"log": {name: [log[step].get(name, math.nan) for step in sorted(log)] for name in names}}
    if (folder / "results.json").exists():
        tables = read_json(folder / "results.json")
        entry |= {when: summary(tables.get(when, {})) for when in (BEFORE, "after")}
    return entry


def say_curves(found: dict[str, list[dict]]) -> str:
    sentences = []
    for name, runs in found.items():
        logs, told = [entry["log"] for entry in runs], []
        for key in ("contrastive", "autoregressive"):
            if any(logs[0][key]):
                chance = f" (chance {logs[0]['chance'][-1]:.2f})" if key == "contrastive" else ""
                ends = [np.mean([np.mean(log[key][part]) for log in logs]) for part in (slice(1), slice(-10, None))]
                told.append(f"{key} loss {ends[0]:.3f} -> {ends[1]:.3f}{chance}")
        ends = [np.mean([log["temperature"][place] for log in logs]) for place in (0, -1)]
        told.append(f"temperature {ends[0]:.3f} -> {ends[1]:.3f}")
        for column in ("T2I@1", "I2T@1"):
            if all(column in entry.get("after", {}) for entry in runs):
                ends = [np.mean([entry[when][column] for entry in runs]) for when in (BEFORE, "after")]
                told.append(f"{column} {ends[0]:.1f} -> {ends[1]:.1f}")
        sentences.append(f"{name}, {len(runs)} run(s) of {len(logs[0]['step'])} steps: {', '.join(told)}.")
    return "\n".join(sentences)


# ---- Pictures

GRAY, BLUE, ORANGE, GREEN, PURPLE, SKY = "#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, GREEN, PURPLE, SKY, "#000000")  # Okabe and Ito's, told apart by colour-blind eyes; orange is for wrong
OFFSET = dict(textcoords="offset points", fontsize=11)  # of annotations
METRICS = ("T2I@1", "I2T@1", "replace", "swap", "add", "wino text", "wino group", "attributes", "described")
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def drawing(draw: Callable) -> Callable:
    """The function gets matplotlib's class Figure, draws into one and returns it; matplotlib is loaded only then."""

    @functools.wraps(draw)
    def drawn(*args, **settings):
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError:
            raise DataError('pictures need matplotlib: pip install -e ".[workshop]"') from None
        with matplotlib.rc_context(STYLE):
            return draw(Figure, *args, **settings)

    return drawn


def color_of(found: Compared) -> dict[str, str]:
    return {BEFORE: GRAY} | dict(zip(trained(found), CYCLE * (1 + len(found) // len(CYCLE))))


def show(axes, pixels: np.ndarray) -> None:
    """A picture, (height, width, 3) uint8, enlarged without smoothing."""
    axes.imshow(pixels, interpolation="nearest" if len(pixels) < 100 else "auto")
    axes.set(xticks=[], yticks=[])


def wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for each in text.split():
        longer = f"{lines[-1]} {each}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= width or not lines[-1] else [*lines, each]
    return lines


@drawing
def draw_prompts(Figure, numbers: dict):
    """Each prompt a dot or a line, the lighter the higher its entropy. Left: entropy and R@1; middle: cumulative PCA
    variance; right: effective rank and R@1. The star is the paper's pair, the first of the list."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    rows, found = numbers["prompts"], numbers["correlations"]
    figure = Figure(figsize=(13, 4.4))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.12])
    scale = Normalize(min(row["entropy"] for row in rows), max(row["entropy"] for row in rows))
    colors = ScalarMappable(scale, ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256))))
    dots = colors.to_rgba([row["entropy"] for row in rows])
    for axes, x, label in ((left, "entropy", "entropy of the next token, nats"), (right, "rank", "effective rank")):
        values, recalls = [row[x] for row in rows], [row["r1"] for row in rows]
        axes.scatter(values, recalls, c=dots, s=42, edgecolor="white", linewidth=0.6)
        axes.scatter(values[:1], recalls[:1], marker="*", s=260, c=dots[:1], edgecolor="black")
        axes.set(xlabel=label, ylabel="zero-shot R@1, %")
        axes.set_title(f"{x} and retrieval: Spearman {found[f'{x} ~ r1']['rho']:.2f}")
        axes.set_ylim(-4, 1.12 * max(recalls))
    first = rows[0]
    alike = sum(abs(row["entropy"] - first["entropy"]) < 0.1 and abs(row["r1"] - first["r1"]) < 2 for row in rows) - 1
    note = f"the paper's, and {alike} much alike"
    left.annotate(note, (first["entropy"], first["r1"]), (14, 15), ha="right", va="center", **OFFSET)
    for row in rows:
        if row["image_prompt"].startswith("Describe the image in detail"):
            line = dict(arrowstyle="-", color=GRAY)
            place = row["entropy"], row["r1"]
            left.annotate("Describe ... in detail.", place, (66, 3), va="center", arrowprops=line, **OFFSET)
    for row, color in sorted(zip(rows, dots), key=lambda pair: pair[0]["entropy"]):
        variance = np.mean([row["image_variance"], row["text_variance"]], axis=0)
        middle.plot(range(1, len(variance) + 1), variance, color=color, linewidth=1.2)
    middle.set(xscale="log", xlabel="principal components", ylabel="variance explained, %", ylim=(0, 103))
    middle.set(xticks=[1, 2, 5, 10, 20, 50], xticklabels=[1, 2, 5, 10, 20, 50], title="embeddings, prompt by prompt")
    figure.colorbar(colors, ax=right, pad=0.02).set_label("entropy, nats")
    return figure


@drawing
def draw_tokens(Figure, found: Compared):
    """A row for each example: the picture, and the likeliest next tokens behind it, before and after each recipe (its
    first seed); a row for the first example's caption; below, the mean distribution, likeliest token first."""
    names, colors = list(found), color_of(found)
    examples = [(i, "images") for i in range(len(found[BEFORE][0]["examples"]))] + [(0, "captions")]
    shown, heights = 6, [1.0] * len(examples) + [1.6]
    figure = Figure(figsize=(3.0 + 3.4 * len(names), 1.75 * sum(heights)))
    grid = figure.add_gridspec(
        len(heights), 1 + len(names), height_ratios=heights, width_ratios=[0.75] + [1] * len(names)
    )
    for row, (index, kind) in enumerate(examples):
        axes, example = figure.add_subplot(grid[row, 0]), found[BEFORE][0]["examples"][index]
        if kind == "images":
            show(axes, decode_picture(example["picture"]))
        else:
            axes.text(0, 0.5, "\n".join(wrapped(example["caption"], 20)), va="center", style="italic")
            axes.axis("off")
        for column, name in enumerate(names, 1):
            axes = figure.add_subplot(grid[row, column])
            top = found[name][0]["examples"][index][f"{kind}_top"][:shown]
            axes.barh(range(len(top)), [p for _, p in top], color=colors[name], height=0.75)
            for place, (token, p) in enumerate(top):
                inside_bar = p > 0.5
                axes.text(
                    p - 0.02 if inside_bar else p + 0.02, place, token, va="center", fontsize=11,
                    ha="right" if inside_bar else "left", color="white" if inside_bar else "black",
                )  # fmt: skip
            axes.set(xlim=(0, 1), ylim=(shown - 0.4, -0.6), yticks=[], xticks=[0, 0.5, 1])
            axes.tick_params(labelbottom=row == len(examples) - 1)
            if row == 0:
                axes.set_title(f"{name}" + (" training" if name == BEFORE else ""), color=colors[name], weight="bold")
    below = figure.add_subfigure(grid[-1, :]).subplots(1, 2, sharey=True)
    for axes, kind in zip(below, ("images", "captions")):
        for name in names:
            for seed, each in enumerate(found[name]):
                curve, bits = each[kind]["sorted"], np.mean([one[kind]["entropy"] for one in found[name]])
                label = None if seed else f"{name}: entropy {bits:.2f}"
                axes.plot(range(1, len(curve) + 1), curve, color=colors[name], label=label, alpha=0.85, linewidth=1.6)
        axes.set(xscale="log", yscale="log", ylim=(1e-5, 1.5), xlabel="rank of the token")
        axes.set_title(f"mean over {found[BEFORE][0]['items']} {kind}")
        axes.legend(fontsize=11, loc="lower left")
    below[0].set_ylabel("probability")
    return figure


@drawing
def draw_attention(Figure, found: Compared, name: str | None = None):
    """Above: density (entropy over the image tokens) and share of attention on the image, layer by layer, thin lines
    are seeds. Below: attention of the chosen heads laid over the pictures, before and after (`name`'s first seed); each
    map is scaled to its own largest weight, and the number is its entropy."""
    colors, before = color_of(found), found[BEFORE][0]
    name = name or (trained(found) or [BEFORE])[-1]
    maps = {BEFORE: before["maps"]} | {name: found[name][0]["maps"]}
    chosen, N = before["chosen"], before["image_tokens"]
    side, columns = math.isqrt(N), len(before["chosen"])
    widths = [1.0] + ([0.18] + [1.0] * columns) * len(maps)
    figure = Figure(figsize=(0.6 + 1.35 * sum(widths), 3.3 + 1.5 * len(before["maps"])))
    above, below = figure.subfigures(2, 1, height_ratios=[3.1, 0.35 + 1.4 * len(before["maps"])])
    density, mass = above.subplots(1, 2)
    for each_name, runs in found.items():
        for axes, key in ((density, "density"), (mass, "mass")):
            lines = [np.mean(each[key], axis=1) for each in runs]
            for line in lines if len(lines) > 1 else []:
                axes.plot(line, color=colors[each_name], linewidth=0.8, alpha=0.6)
            axes.plot(np.mean(lines, axis=0), color=colors[each_name], label=each_name, marker="o", markersize=4)
    density.axhline(math.log(N), color="black", linewidth=1, linestyle=":")
    density.annotate("all image tokens alike", (0, math.log(N)), (2, 3), textcoords="offset points", fontsize=10)
    density.set(xlabel="layer", ylabel="entropy, nats", title="density of attention to the image")
    density.set_ylim(0, math.log(N) * 1.15)
    mass.set(xlabel="layer", ylabel="share", title="attention that falls on the image", ylim=(0, 1.03))
    density.legend(loc="best", fontsize=11)
    for axes in (density, mass):
        axes.set_xticks(range(0, len(before["density"]), 1 + len(before["density"]) // 9))
    grid = below.add_gridspec(len(before["maps"]), 1 + (columns + 1) * len(maps), width_ratios=widths)
    for row, picture in enumerate(before["maps"]):
        seen = decode_picture(picture["picture"])
        show(below.add_subplot(grid[row, 0]), seen)
        for group, (when, shown) in enumerate(maps.items()):
            for column, weights in enumerate(shown[row]["weights"]):
                axes = below.add_subplot(grid[row, 2 + group * (columns + 1) + column])
                heat = np.array(weights[N - side * side :]).reshape(side, side)  # without CLIP's class token
                settings = dict(extent=(0, side, side, 0), interpolation="nearest")
                axes.imshow(seen.mean(axis=-1), cmap="gray", vmin=0, vmax=255, **settings)
                axes.imshow(heat, cmap="viridis", alpha=0.55, vmin=0, **settings)
                spread = heat[heat > 0] / heat.sum()
                axes.set(xticks=[], yticks=[])
                axes.set_xlabel(f"{-(spread * np.log(spread)).sum():.2f}", fontsize=11, labelpad=1)
                if row == 0:
                    title = "{}.{}".format(*chosen[column])
                    if column == 0:
                        title = f"{when}: {title}"
                    axes.set_title(title, fontsize=11, color=colors[when], loc="center", weight="bold")
    below.suptitle("attention of single heads (layer.head); below each map its entropy", fontsize=12)
    return figure


@drawing
def draw_captions(Figure, found: Compared, key: str | None = None, shown: int = 2):
    """Pictures with what the base model says, and each recipe's first seed, behind the image prompt; sentences that
    are false of the picture in orange, words that are no sentence in gray (toy world only). Below: the score behind
    the image prompt and behind a plain question, every dot a seed."""
    before, colors, names = found[BEFORE][0], color_of(found), list(found)
    key = key or next(key for key in before["prompted"] if key not in ("words", "texts"))
    shown = min(shown, len(before["pictures"]))
    cells = [(i, name) for i in range(shown) for name in names]
    width, line_height = 98, 0.19  # characters, inches
    texts = {(i, name): caption_lines(found[name][0], i, width, key == "attributes") for i, name in cells}
    heights = [max(1.35, sum(1.5 + len(texts[i, name]) for name in names) * line_height) for i in range(shown)]
    heights[0] += 0.35  # the title
    figure = Figure(figsize=(11, sum(heights) + 3.1))
    parts = figure.subfigures(len(heights) + 1, 1, height_ratios=[*heights, 3.0])
    if key == "attributes":
        note = "captions behind the image prompt (before training: behind a question)"
        parts[0].suptitle(f"{note}; orange: false of the picture, gray: no sentences", fontsize=12)
    for i, part in enumerate(parts[:-1]):
        picture, axes = part.subplots(1, 2, width_ratios=[1, 6.4])
        show(picture, decode_picture(before["pictures"][i]))
        picture.set_anchor("N")
        rows, y = (heights[i] - 0.35 * (i == 0)) / line_height, 0.0
        axes.set(xlim=(0, width + 1), ylim=(rows, 0))
        axes.axis("off")
        for name in names:
            title = "before training" if name == BEFORE else name
            axes.text(0, y, title, color=colors[name], weight="bold", va="top", fontsize=11)
            y += 1.1
            for line in texts[i, name]:
                column = 0
                for each, is_true in line:
                    color, weight = {True: ("black", None), False: (ORANGE, "bold"), None: (GRAY, None)}[is_true]
                    style = dict(family="monospace", fontsize=10.5, va="top", color=color, weight=weight)
                    axes.text(column, y, each, **style)
                    column += len(each) + 1
                y += 1
            y += 0.4
    axes, kinds = parts[-1].subplots(), ("prompted", "described")
    for place, kind in enumerate(kinds):
        for number, name in enumerate(names):
            values = [each[kind][key] for each in found[name]]
            x = place + 0.8 * (number + 0.5) / len(names) - 0.4
            label = ("before training" if name == BEFORE else name) if place == 0 else None
            axes.bar(x, np.mean(values), 0.72 / len(names), color=colors[name], label=label)
            axes.annotate(f"{np.mean(values):.1f}", (x, max(values)), (0, 5), ha="center", **OFFSET)
            if len(values) > 1:
                axes.plot([x] * len(values), values, "o", color="white", markeredgecolor="black", markersize=5)
    axes.set(xticks=[0, 1], xticklabels=["behind the image prompt", 'behind "Describe the image in detail."'])
    label = "attributes right, %" if key == "attributes" else key
    axes.set(ylabel=label, title=f"captions of {before['items']} pictures (dots: seeds)")
    axes.set_ylim(0, 1.15 * max(each[kind][key] for runs in found.values() for each in runs for kind in kinds))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def caption_lines(numbers: dict, index: int, width: int, is_toy: bool, most: int = 5) -> list[list[tuple]]:
    """A caption as at most `most` lines of (word, is its sentence true?)."""
    text = numbers["prompted"]["texts"][index]
    sentences = false_sentences(text, numbers["references"][index]) if is_toy else [(text, True)]
    lines, column = [[]], 0
    for each, is_true in [(w, is_true) for sentence, is_true in sentences for w in sentence.split()]:
        each = each if len(each) < width else each[: width - 2] + "…"
        if column + len(each) > width:
            if len(lines) == most:
                lines[-1].append(("…", None))
                break
            lines, column = [*lines, []], 0
        lines[-1].append((each, is_true))
        column += len(each) + 1
    return lines if lines[0] else [[("(nothing)", None)]]


@drawing
def draw_soft(Figure, found: Compared, name: str | None = None):
    """Each position of both prompts: how far it moved (bar: mean, dots: seeds), in lengths of the token that it began
    as; beside it the vocabulary's nearest tokens by cosine and by L2 (first seed), bold where they changed."""
    name = name or trained(found)[0]
    runs = found[name]
    rows = max(len(runs[0][kind]) for kind in ("image", "text"))
    figure = Figure(figsize=(12, 1.3 + 0.42 * rows))
    for axes, kind in zip(figure.subplots(1, 2, sharex=True), ("image", "text")):
        prompt = runs[0][kind]
        moved = np.array([[row["moved"] for row in each[kind]] for each in runs])  # (seeds, positions)
        edge = [0, len(prompt) - 1]
        axes.barh(range(len(prompt)), moved.mean(0), color=[ORANGE if i in edge else SKY for i in range(len(prompt))])
        for each in moved if len(moved) > 1 else []:
            axes.plot(each, range(len(prompt)), "o", color="white", markeredgecolor="black", markersize=4)
        for i, row in enumerate(prompt):
            near = " | ".join(dict.fromkeys((row["nearest_cosine"], row["nearest_l2"])))
            weight = "normal" if near == row["start"] else "bold"
            axes.annotate(near, (moved[:, i].max(), i), (7, 0), va="center", weight=weight, **OFFSET)
        axes.set(yticks=range(len(prompt)), yticklabels=[row["start"] for row in prompt], ylim=(rows - 0.4, -0.6))
        axes.set(xlim=(0, 1.75 * max(row["moved"] for each in runs for k in ("image", "text") for row in each[k])))
        axes.set(xlabel="distance from the start / length of the start", title=f"soft {kind} prompt ({name})")
    note = "beside the bars: the nearest token now (by cosine | by L2, where they differ), bold where it is another"
    figure.supxlabel(f"{note}; orange: boundary tokens", fontsize=11)
    return figure


@drawing
def draw_gallery(Figure, found: Compared, name: str | None = None, number: int = 5):
    """Queries and the pictures they find, best first, before and after (`name`'s first seed): a check mark and a blue
    frame where it is the picture that the caption was written for, a cross and an orange frame where it is not."""
    before, name = found[BEFORE][0], name or (trained(found) or [BEFORE])[-1]
    after, k = found[name][0], len(before["found"][0])
    chosen = interesting(before, after, number)
    models = [("before training", before), (name, after)]
    figure = Figure(figsize=(3.0 + 2 * k * 0.98, 0.5 + 1.28 * len(chosen)), layout="none")
    cell, text, gap = 0.98 / figure.get_figwidth(), 2.6 / figure.get_figwidth(), 0.35 / figure.get_figwidth()
    height = figure.get_figheight()
    for row, query in enumerate(chosen):
        y = 1 - (0.45 + 1.28 * (row + 1)) / height
        lines = "\n".join(wrapped(before["queries"][query], 26))
        figure.text(0.01, y + 0.75 / height, lines, va="center", fontsize=11, style="italic")
        for group, (title, model) in enumerate(models):
            for place, (index, score) in enumerate(zip(model["found"][query], model["scores"][query])):
                x = text + group * (k * cell + gap) + place * cell
                axes = figure.add_axes((x, y + 0.27 / height, 0.9 * cell, 0.9 / height))
                right = index == query
                show(axes, np.asarray(open_image(*before["images"][index])))
                for spine in axes.spines.values():
                    spine.set(visible=True, color=BLUE if right else ORANGE, linewidth=4 if right else 1.5)
                mark = f"{'✓' if right else '✗'} {score:.2f}"
                axes.set_xlabel(mark, color=BLUE if right else ORANGE, fontsize=11, labelpad=5)
            if row == 0:
                label = f"{title}: R@1 {model['t2i_r1']:.1f} % of {model['items']} queries"
                figure.text(text + group * (k * cell + gap), 1 - 0.33 / height, label, fontsize=12, weight="bold")
    return figure


@drawing
def draw_curves(Figure, found: dict[str, list[dict]]):
    """Losses and temperature by step (thin: as logged; thick: running mean, every run), and the tables before and
    after: hollow and full dots, a full one for each run."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(12, 7.4))
    panels = figure.subplots(2, 2)
    colors = dict(zip(found, CYCLE * (1 + len(found) // len(CYCLE))))
    keys = {"contrastive": "contrastive loss", "autoregressive": "autoregressive loss", "temperature": "temperature"}
    for axes, (key, title) in zip(panels.flat, keys.items()):
        for name, entry in [(name, entry) for name, runs in found.items() for entry in runs]:
            steps, values = (np.array(entry["log"][column], float) for column in ("step", key))
            if not np.nan_to_num(values).any():  # a loss that was switched off
                continue
            half = max(1, len(values) // 30) if key != "temperature" else 0
            smooth = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
            axes.plot(steps, values, color=colors[name], linewidth=0.6, alpha=0.3)
            axes.plot(steps, smooth, color=colors[name], linewidth=1.6, alpha=0.9)
        axes.set(xlabel="step", title=title)
        if key == "temperature":
            axes.set_ylim(bottom=0)
            continue
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    logs = [entry["log"] for runs in found.values() for entry in runs]
    contrastive, log = panels[0, 0], max(logs, key=lambda log: len(log["step"]))
    contrastive.plot(log["step"], log["chance"], color="black", linestyle=":", linewidth=1.4)
    text = f"chance: log B = {log['chance'][-1]:.2f}"
    contrastive.annotate(text, (log["step"][-1], log["chance"][-1]), (0, -5), ha="right", va="top", **OFFSET)
    for name, runs in found.items():
        contrastive.plot([], [], color=colors[name], label=name + (f", {len(runs)} seeds" if len(runs) > 1 else ""))
    contrastive.legend(fontsize=11, loc="center right")
    axes, tested = panels[1, 1], {name: [e for e in runs if e.get("after")] for name, runs in found.items()}
    tested = {name: runs for name, runs in tested.items() if runs}
    columns = [c for c in METRICS if any(c in entry["after"] for runs in tested.values() for entry in runs)]
    for number, (name, runs) in enumerate(tested.items()):
        for place, column in enumerate(columns):
            x = place + 0.7 * (number + 0.5) / len(tested) - 0.35
            ends = [[entry[when].get(column, math.nan) for entry in runs] for when in (BEFORE, "after")]
            axes.plot([x, x], [np.mean(ends[0]), np.mean(ends[1])], color=colors[name], linewidth=1.3)
            axes.plot([x] * len(runs), ends[0], "o", color="white", markeredgecolor=colors[name], markersize=5)
            axes.plot([x] * len(runs), ends[1], "o", color=colors[name], markersize=5)
    axes.set(title="tables, %: before (hollow), after (full)", ylim=(-3, 103))
    axes.set_xticks(range(len(columns)), columns, fontsize=11, rotation=35, ha="right", rotation_mode="anchor")
    return figure


# ---- Commands


def recipes_of(arguments: list[str], named: bool = False) -> dict[str, list[Path]]:
    """["both=runs/toy", "both=runs/seed-1", "runs/x"] -> {"both": [...], "trained": [runs/x]}; or, `named`, by the
    folder's own name."""
    recipes: dict[str, list[Path]] = {}
    for argument in arguments:
        name, _, folder = argument.rpartition("=")
        if not Path(folder).is_dir():
            advice = "train it first: python train.py" if folder == "runs/toy" else "give a run or a LLaVA folder"
            raise DataError(f"{folder}: no such folder; {advice}")
        if name == BEFORE:
            raise DataError(f"{BEFORE!r} is the name of the base model; call the run something else")
        recipes.setdefault(name or (Path(folder).name if named else "trained"), []).append(Path(folder))
    return recipes


def analyse(args) -> tuple[dict, str, Callable]:
    """One command -> its numbers, its sentence, and what draws them."""
    if args.command == "curves":
        numbers = curves(recipes_of(args.runs, named=True))
        return numbers, say_curves(numbers), draw_curves
    recipes = recipes_of(args.runs)
    if args.command == "soft":
        numbers = compare(recipes, soft, args.device)
        numbers.pop(BEFORE)  # prompts are compared with the tokens that they began as
        return numbers, say_soft(numbers), draw_soft
    first = load_run(next(iter(recipes.values()))[0], args.device)
    file = Path(args.data) if args.data else world.build(ROOT / "toy" / "data") / "test.jsonl"
    items = read_items(file, first, args.images, args.split, args.limit)
    if args.command == "prompts":
        pairs = read_json(args.prompts, list)
        if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(text, str) for text in p) for p in pairs):
            raise DataError(f"{args.prompts}: not a list of pairs [image prompt, text prompt]")
        numbers = prompts(first, items, pairs)
        return numbers, say_prompts(numbers), draw_prompts
    del first
    chosen = args.heads if args.command == "attention" else None

    def look(run: Run) -> dict:
        nonlocal chosen
        numbers = attention(run, items, chosen or None)
        chosen = numbers["chosen"]
        return numbers

    score = None if args.data else world.score_captions
    measure, say, draw = {
        "tokens": (lambda run: tokens(run, items, args.k if "k" in args else 10), say_tokens, draw_tokens),
        "attention": (look, say_attention, draw_attention),
        "captions": (lambda run: captions(run, items, score), say_captions, draw_captions),
        "gallery": (lambda run: gallery(run, items), say_gallery, draw_gallery),
    }[args.command]
    numbers = compare(recipes, measure, args.device)
    return numbers, say(numbers), draw


COMMANDS = {  # what it shows, and of how many records
    "prompts": ("figures 2, 3, 5: entropy, rank and zero-shot retrieval of many prompts", 500),
    "tokens": ("figure 4: next tokens at the summary position, before and after", 500),
    "attention": ("figure 6: attention from the summary token to the image, before and after", 200),
    "captions": ("figure 7: captions before and after, recipe by recipe", 100),
    "soft": ("what the soft prompts became", 0),
    "gallery": ("queries with the five nearest pictures, before and after", 1000),
    "curves": ("losses and metrics of several runs", 0),
}


def head(text: str) -> list[int]:
    """An argument LAYER.HEAD."""
    layer, number = text.split(".")
    return [int(layer), int(number)]


def parse(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m workshop.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help, limit) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        add = command.add_argument
        add("--out", type=Path, default=Path("runs/figures"), metavar="DIR", help="for NAME.json, NAME.png")
        add("--name", default=name, help=f"of both files ({name})")
        if name == "curves":
            add("runs", nargs="+", metavar="[NAME=]RUN", help="folders of train.py's runs; one NAME, one colour")
            continue
        group = command.add_mutually_exclusive_group()
        group.add_argument("--runs", nargs="+", default=["runs/toy"], metavar="[NAME=]DIR", help="(runs/toy)")
        group.add_argument("--model", dest="runs", nargs=1, metavar="DIR", help="one run, or LLaVA folder")
        add("--device", help="cpu, cuda, cuda:1, mps (the best one here)")
        if name == "soft":
            continue
        add("--data", metavar="FILE", help="captioned images (.jsonl) or a retrieval test (.json) (the toy's test set)")
        add("--images", type=Path, metavar="DIR", help="where its pictures are (beside the file)")
        add("--split", default="test", help="of a retrieval test by Karpathy (test)")
        add("--limit", type=positive, default=limit, metavar="N", help=f"records, from the first on ({limit})")
        if name == "prompts":
            add("--prompts", default=PROMPTS, metavar="FILE", help="JSON list of [image prompt, text prompt]")
        if name == "tokens":
            add("-k", type=positive, default=10, help="length of the lists of top tokens (10)")
        if name == "attention":
            add(
                "--heads",
                nargs="+",
                type=head,
                default=[],
                metavar="LAYER.HEAD",
                help="to draw (the 4 that see the image most)",
            )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        numbers, sentence, draw = analyse(args)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.name}.json").write_text(json.dumps(numbers) + "\n")
        draw(numbers).savefig(args.out / f"{args.name}.png", dpi=90, pil_kwargs={"optimize": True})
        print(f"{sentence}\nin {args.out}: {args.name}.json, {args.name}.png")
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
