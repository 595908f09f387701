"""How all figures look: one style, one set of colours. Matplotlib is loaded only to draw."""

import functools
from collections.abc import Callable

import numpy as np

from figures.common import BEFORE, Compared, trained
from formats.files import InputError

# Okabe and Ito's colours, which colour-blind eyes tell apart. Orange is for what is wrong.
GRAY = "#666666"
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
CYCLE = (BLUE, GREEN, PURPLE, SKY, "#000000")

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
OFFSET = dict(textcoords="offset points", fontsize=11)  # of annotations
SEED = dict(color="white", markeredgecolor="black")  # a dot for each seed


def drawing(draw: Callable) -> Callable:
    """A decorator of functions that draw: inside, matplotlib has this style, and no other figure
    of the same program is changed. Raises InputError where matplotlib is not installed."""

    @functools.wraps(draw)
    def draw_in_style(*args, **settings):
        try:
            import matplotlib
        except ImportError:
            advice = 'pip install -e ".[workshop]"'
            raise InputError(f"pictures need matplotlib: {advice}") from None
        with matplotlib.rc_context(STYLE):
            return draw(*args, **settings)

    return draw_in_style


def new_figure(width: float, height: float, **settings):
    """A figure of a size in inches. It belongs to no window, so that it draws anywhere."""
    # Not pyplot, which would open a display, and keep every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **settings)


def cycle_of(names: list[str]) -> dict[str, str]:
    """A colour for each name; from the sixth on they repeat."""
    return {name: CYCLE[number % len(CYCLE)] for number, name in enumerate(names)}


def color_of(found: Compared) -> dict[str, str]:
    """A colour for each recipe, gray for the base model."""
    colors = {BEFORE: GRAY}
    colors.update(cycle_of(trained(found)))
    return colors


def title_of(name: str) -> str:
    return "before training" if name == BEFORE else name


def show(axes, pixels: np.ndarray) -> None:
    """A picture, (height, width, 3) uint8; a small one is enlarged without smoothing."""
    axes.imshow(pixels, interpolation="nearest" if len(pixels) < 100 else "auto")
    axes.set(xticks=[], yticks=[])


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` characters; a longer word has a line of its own."""
    lines = [""]
    for each in text.split():
        longer = f"{lines[-1]} {each}".strip()
        if len(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(each)
    return "\n".join(lines)
