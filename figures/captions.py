"""Figure 7: what the model says about pictures, before and after training, recipe by recipe.

    python -m figures captions --runs contrastive=runs/contrastive-0 both=runs/toy

In the toy world it is known which sentences are true: there the captions are scored and coloured
by that, elsewhere scored by CIDEr-D.
"""

import re
from collections.abc import Callable

import numpy as np

from eval import DESCRIBE, Embedder, caption, cider_d
from figures.common import (
    BEFORE,
    Compared,
    Item,
    as_seen,
    decode_picture,
    nothing_trained,
    trained,
    trend,
)
from figures.style import GRAY, OFFSET, ORANGE, SEED, color_of, drawing, new_figure, show, title_of
from formats.files import InputError
from toy import world

# A word, and whether its sentence is true; None where it is no sentence.
Word = tuple[str, bool | None]


def measure(
    embedder: Embedder,
    items: list[Item],
    score: Callable | None = None,
    max_new_tokens: int = 128,
) -> dict:
    """Greedy captions of the model as it is, with their length in words and their `score`, a
    function of captions and references (default: CIDEr-D):

    prompted     behind the image prompt that it was trained with; the base model knows none, and
                 is asked a plain question
    described    behind a plain question"""
    items = [item for item in items if item.long or item.short]
    references = [item.long or item.short for item in items]

    def ask(question: str | None) -> dict:
        texts = []
        for start in range(0, len(items), 32):
            images = [item.open() for item in items[start : start + 32]]
            texts += caption(embedder, images, question, max_new_tokens)
        words = sum(len(text.split()) for text in texts) / len(texts)
        scores = (score or cider_d)(texts, references)
        return {"words": words, **scores, "texts": texts}

    # Without a question, an adapted model is asked through its image prompt (eval.caption).
    prompted = ask(None)
    described = ask(DESCRIBE) if embedder.is_adapted else prompted  # it was asked this already
    return {
        "items": len(items),
        "prompted": prompted,
        "described": described,
        "references": [texts[0] for texts in references],
        "pictures": [as_seen(embedder, item) for item in items[:4]],
    }


def first_score(numbers: dict) -> str:
    """The name of the first score that the captions have."""
    return next(key for key in numbers["prompted"] if key not in ("words", "texts"))


def say(found: Compared) -> str:
    before = found[BEFORE][0]
    key = first_score(before)
    sentences = []
    for name in trained(found):
        seeds = found[name]
        told = []
        places = {"prompted": "behind the image prompt", "described": "behind a plain question"}
        for kind, place in places.items():
            _, score = trend(before[kind][key], [seed[kind][key] for seed in seeds], ".1f")
            _, words = trend(before[kind]["words"], [seed[kind]["words"] for seed in seeds], ".0f")
            told.append(f"{key} {score} {place}, words a caption {words}")
        worst = min(seed["prompted"][key] for seed in seeds)
        # Our reading of "captioning survives": nine tenths of it, in every seed.
        survives = worst > 0.9 * before["prompted"][key]
        word = "survives" if survives else "does not survive"
        sentences.append(f"{name}: captioning {word}: {'; '.join(told)}.")
    return "\n".join(sentences) or nothing_trained(found)


# ---- Sentence by sentence, in the toy world


def false_sentences(text: str, reference: str) -> list[tuple[str, bool | None]]:
    """A caption of the toy world, sentence by sentence: is it true of the scene that the long
    caption `reference` tells all about? None where it is no sentence of that world's language."""
    scene = world.SceneTable([scene_of(reference)])
    result = []
    for sentence in re.findall(r"[^.]*\.|[^.]+$", text):
        sentence = sentence.strip()
        try:
            is_true = bool(world.truth(sentence, scene)[0])
        except ValueError:  # not of that language
            is_true = None
        result.append((sentence, is_true))
    return result


def scene_of(reference: str) -> world.Scene:
    """The scene that a long caption describes. Raises InputError where it is none."""
    reference = reference.lower()
    pattern = rf"{world.PLACE.pattern} there is an? (small|large) ([a-z]+) ([a-z]+)"
    things = {}
    for place, size, color, shape in re.findall(pattern, reference):
        things[place] = world.Thing(size, color, shape)
    background = world.BACKGROUND.search(reference)
    if not background or not things:
        raise InputError(f"not a long caption of the toy world: {reference!r}")
    return world.Scene(background[0], tuple(things.get(place) for place in world.PLACES))


def caption_lines(
    numbers: dict, index: int, width: int, is_toy: bool, most: int = 5
) -> list[list[Word]]:
    """A caption as at most `most` lines of words, each line at most `width` characters."""
    text = numbers["prompted"]["texts"][index]
    sentences = [(text, True)]  # elsewhere nothing is known to be false
    if is_toy:
        sentences = false_sentences(text, numbers["references"][index])
    lines: list[list[Word]] = [[]]
    column = 0
    for sentence, is_true in sentences:
        for word in sentence.split():
            if len(word) >= width:
                word = word[: width - 2] + "…"
            if column + len(word) > width:
                if len(lines) == most:
                    lines[-1].append(("…", None))
                    return lines
                lines.append([])
                column = 0
            lines[-1].append((word, is_true))
            column += len(word) + 1
    return lines if lines[0] else [[("(nothing)", None)]]


# ---- The picture

WIDTH = 98  # characters in a line
LINE = 0.19  # inches from one line to the next


@drawing
def draw(found: Compared, key: str | None = None, shown: int = 2):
    """Pictures with what the base model says, and each recipe's first seed, behind the image
    prompt; sentences that are false of the picture in orange, words that are no sentence in gray
    (toy world only). Below: the score behind the image prompt and behind a plain question, every
    dot a seed."""
    before = found[BEFORE][0]
    key = key or first_score(before)
    is_toy = key == "attributes"
    shown = min(shown, len(before["pictures"]))
    texts = []  # of each picture, {name: lines}
    heights = []
    # The captions' lengths decide how high each picture's part of the figure is.
    for index in range(shown):
        lines = {}
        for name, seeds in found.items():
            lines[name] = caption_lines(seeds[0], index, WIDTH, is_toy)
        texts.append(lines)
        needed = sum(1.5 + len(each) for each in lines.values()) * LINE
        heights.append(max(1.35, needed))
    heights[0] += 0.35  # the title

    figure = new_figure(11, sum(heights) + 3.1)
    parts = figure.subfigures(shown + 1, 1, height_ratios=[*heights, 3.0])
    if is_toy:
        note = (
            "captions behind the image prompt (before training: behind a question); "
            "orange: false of the picture, gray: no sentences"
        )
        parts[0].suptitle(note, fontsize=12)
    for index in range(shown):
        picture, axes = parts[index].subplots(1, 2, width_ratios=[1, 6.4])
        show(picture, decode_picture(before["pictures"][index]))
        picture.set_anchor("N")
        room = heights[index] - (0.35 if index == 0 else 0)  # without the title
        axes.set(xlim=(0, WIDTH + 1), ylim=(room / LINE, 0))
        axes.axis("off")
        write(axes, texts[index], color_of(found))
    draw_scores(parts[-1].subplots(), found, key)
    return figure


def write(axes, texts: dict[str, list[list[Word]]], colors: dict[str, str]) -> None:
    """Captions below each other, a letter and a line being the axes' units."""
    looks = {
        True: dict(color="black"),
        False: dict(color=ORANGE, weight="bold"),
        None: dict(color=GRAY),
    }
    y = 0.0
    for name, lines in texts.items():
        style = dict(color=colors[name], weight="bold", va="top", fontsize=11)
        axes.text(0, y, title_of(name), **style)
        y += 1.1
        for line in lines:
            x = 0
            for word, is_true in line:
                style = dict(family="monospace", fontsize=10.5, va="top", **looks[is_true])
                axes.text(x, y, word, **style)
                x += len(word) + 1
            y += 1
        y += 0.4


def draw_scores(axes, found: Compared, key: str) -> None:
    """Bars: the mean of a recipe's seeds, behind both prompts."""
    colors = color_of(found)
    highest = 0.0
    for place, kind in enumerate(("prompted", "described")):
        for number, (name, seeds) in enumerate(found.items()):
            values = [seed[kind][key] for seed in seeds]
            mean = np.mean(values)
            highest = max(highest, *values)
            x = place + 0.8 * (number + 0.5) / len(found) - 0.4
            label = title_of(name) if place == 0 else None  # the legend names it once
            axes.bar(x, mean, 0.72 / len(found), color=colors[name], label=label)
            axes.annotate(f"{mean:.1f}", (x, max(values)), (0, 5), ha="center", **OFFSET)
            if len(values) > 1:
                axes.plot([x] * len(values), values, "o", markersize=5, **SEED)
    labels = ["behind the image prompt", f'behind "{DESCRIBE}"']
    axes.set(xticks=[0, 1], xticklabels=labels)
    axes.set_ylabel("attributes right, %" if key == "attributes" else key)
    axes.set_title(f"captions of {found[BEFORE][0]['items']} pictures (dots: seeds)")
    axes.set_ylim(0, 1.15 * highest)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
