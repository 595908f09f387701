"""The figures of the notebooks: plain matplotlib, one function a kind of picture.

Each one shows its figure and returns nothing, so that a cell can end with it.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch, Rectangle

BLUE = "#4c78a8"
ORANGE = "#f58518"
GREEN = "#54a24b"
GRAY = "#9d9d9d"
PURPLE = "#b279a2"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, GRAY)

# ---- What the figures share


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` characters, longer words aside."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def side_by_side(number: int, width: float, height: float):
    """A row of axes in a figure of a size in inches -> figure, list of axes."""
    size = (width, height)
    figure, axes = plt.subplots(1, number, figsize=size, squeeze=False, layout="constrained")
    return figure, list(axes[0])


def without_box(axis) -> None:
    """Leave the lines at the left and below, which carry numbers."""
    axis.spines[["top", "right"]].set_visible(False)


# ---- Pictures


def pictures(
    images, titles=(), columns: int = 6, width: int = 24, side: float = 1.7, frames=()
) -> None:
    """A sheet of small pictures, pixel by pixel. `frames`: True draws a green frame, False a red
    one, None none."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)  # rounded up
    titles = [wrapped(title, width) for title in titles]
    most_lines = max([title.count("\n") + 1 for title in titles], default=0)
    size = (side * columns, rows * (side + 0.16 * most_lines))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for index, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if index < len(images):
            axis.imshow(np.asarray(images[index]), interpolation="nearest")
        if index < len(titles):
            axis.set_xlabel(titles[index], fontsize=7)
        if index < len(frames) and frames[index] is not None:
            color = "limegreen" if frames[index] else "crimson"
            axis.spines[:].set(visible=True, color=color, linewidth=3)
    plt.show()


def patch_grid(image, patch: int) -> None:
    """A picture, cut into the patches that become tokens, with their numbers."""
    pixels = np.asarray(image)
    size = f"{pixels.shape[1]} x {pixels.shape[0]}"
    _, (left, right) = side_by_side(2, 6, 2.8)
    left.imshow(pixels, interpolation="nearest")
    left.set_title(f"{size} pixels, patches of {patch} x {patch}", fontsize=9)
    number_patches(left, pixels.shape[0] // patch, patch)
    right.imshow(strip_of_patches(pixels, patch))
    right.set_title("the same as a sequence, row by row", fontsize=9)
    for axis in (left, right):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    plt.show()


def number_patches(axis, count: int, patch: int) -> None:
    """Lines between `count` x `count` patches, and each one's place in the sequence."""
    for line in range(1, count):
        # Pixel 0 reaches from -0.5 to 0.5.
        axis.axhline(line * patch - 0.5, color="white", linewidth=1)
        axis.axvline(line * patch - 0.5, color="white", linewidth=1)
    for index in range(count * count):
        row = index // count
        column = index % count
        x = column * patch + patch / 2 - 0.5
        y = row * patch + patch / 2 - 0.5
        style = dict(color="white", ha="center", va="center", fontsize=9, weight="bold")
        axis.text(x, y, str(index), **style)


def strip_of_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """All patches, row by row, with white between them, in two lines."""
    count = pixels.shape[0] // patch
    gap = np.full((patch, 2, 3), 255, np.uint8)
    parts = []
    for row in range(count):
        for column in range(count):
            down = slice(row * patch, (row + 1) * patch)
            across = slice(column * patch, (column + 1) * patch)
            parts += [pixels[down, across], gap]
    if count % 2:  # of an odd number, the second line gets a white patch
        parts += [np.full((patch, patch, 3), 255, np.uint8), gap]
    half = len(parts) // 2
    first = np.concatenate(parts[:half], axis=1)
    second = np.concatenate(parts[half:], axis=1)
    between = np.full((4, first.shape[1], 3), 255, np.uint8)
    return np.concatenate([first, between, second])


def attention_over(image, maps: dict[str, np.ndarray]) -> None:
    """A picture, and over it how much attention each of its patches gets, (N,) row by row."""
    number = len(maps) + 1
    _, axes = side_by_side(number, 2.1 * number, 2.4)
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    axes[0].imshow(pixels, interpolation="nearest")
    axes[0].set_title("picture", fontsize=9)
    for axis, (title, weights) in zip(axes[1:], maps.items()):
        axis.imshow(pixels.mean(-1), cmap="gray", interpolation="nearest")
        side = math.isqrt(len(weights))
        grid = np.asarray(weights).reshape(side, side)
        # Stretched over the whole picture, whose first pixel begins at -0.5.
        whole = (-0.5, width - 0.5, height - 0.5, -0.5)
        axis.imshow(grid, cmap="magma", alpha=0.65, extent=whole)
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    plt.show()


# ---- Diagrams


def flow(*rows: list[tuple[str, str, str]], title: str = "") -> None:
    """Boxes, left to right, one row below another. A box is (name, what it gives, color)."""
    longest = max(len(boxes) for boxes in rows)
    width = min(12, 2.1 * longest)
    _, (axis,) = side_by_side(1, width, 1.05 * len(rows) + 0.3)
    axis.set(xlim=(-0.1, longest + 0.05), ylim=(0.9 - len(rows), 0.7))
    axis.axis("off")
    for row, boxes in enumerate(rows):
        for column, (name, gives, color) in enumerate(boxes):
            style = dict(boxstyle="round,pad=0.02", facecolor=color, edgecolor="none", alpha=0.25)
            axis.add_patch(FancyBboxPatch((column, -row), 0.78, 0.55, **style))
            middle = dict(ha="center", va="center")
            axis.text(column + 0.39, 0.36 - row, name, fontsize=9, weight="bold", **middle)
            axis.text(column + 0.39, 0.14 - row, gives, fontsize=8, family="monospace", **middle)
            if column > 0:
                arrow = dict(arrowstyle="->", color="black", lw=1.3)
                end = (column - 0.03, 0.28 - row)
                start = (column - 0.19, 0.28 - row)
                axis.annotate("", end, start, arrowprops=arrow)
    axis.set_title(title, fontsize=11, loc="left")
    plt.show()


def tokens(*rows: tuple[str, list[tuple[str, str]]], title: str = "", marked=()) -> None:
    """Sequences as strips of tokens: a row is (label, [(word, color), ...]); `marked` are the
    places (row, token) that get an outline."""
    longest = max(len(words) for _, words in rows)
    _, (axis,) = side_by_side(1, 12, 0.8 * len(rows) + 0.4)
    axis.set(xlim=(-0.2, longest + 0.2), ylim=(1.1 - 1.25 * len(rows), 1.0))
    axis.axis("off")
    text = dict(ha="center", va="center", fontsize=min(8, 420 / longest))
    if longest > 16:
        text["rotation"] = 60  # else neighbours would write over each other
    for row, (label, words) in enumerate(rows):
        bottom = -1.25 * row
        axis.text(0, bottom + 0.72, label, fontsize=9)
        for column, (word, color) in enumerate(words):
            place = (column + 0.03, bottom)
            box = dict(facecolor=color, alpha=0.35, edgecolor="none")
            axis.add_patch(Rectangle(place, 0.94, 0.6, **box))
            if (row, column) in marked:
                outline = dict(fill=False, edgecolor="black", linewidth=2)
                axis.add_patch(Rectangle(place, 0.94, 0.6, **outline))
            axis.text(column + 0.5, bottom + 0.3, word, **text)
    axis.set_title(title, fontsize=11, loc="left")
    plt.show()


def blocks(*parts: tuple[str, int, int, str], title: str = "") -> None:
    """Matrices as rectangles to scale: (name, rows, columns, color), in a row."""
    largest = 0
    for _, rows, columns, _ in parts:
        largest = max(largest, rows, columns)
    scale = 2 / largest  # the longest side is 2 units
    gap = 0.9
    width = sum(scale * columns + gap for _, _, columns, _ in parts)
    _, (axis,) = side_by_side(1, 1.2 * width + 0.4, 3.6)
    x = 0.0
    for name, rows, columns, color in parts:
        w = scale * columns
        h = scale * rows
        style = dict(facecolor=color, alpha=0.4, edgecolor=color)
        axis.add_patch(Rectangle((x, -h / 2), w, h, **style))
        label = f"{name}\n{rows} x {columns}"
        axis.text(x + w / 2, -1.25, label, ha="center", va="top", fontsize=8)
        x += w + gap
    axis.set(xlim=(-0.3, x), ylim=(-1.8, 1.1), aspect="equal")
    axis.axis("off")
    axis.set_title(wrapped(title, 52), fontsize=9, loc="left")
    plt.show()


# ---- Numbers


def bars(*groups: tuple[str, list[str], list[float]], xlabel: str = "", colors=COLORS) -> None:
    """Groups of horizontal bars beside each other: (title, words, numbers)."""
    most = max(len(words) for _, words, _ in groups)
    width = min(12, 4.2 * len(groups))
    _, axes = side_by_side(len(groups), width, 0.26 * most + 0.8)
    for axis, (title, words, numbers), color in zip(axes, groups, colors):
        axis.barh(range(len(words)), numbers, color=color)
        axis.set_yticks(range(len(words)), words, fontsize=8)
        axis.invert_yaxis()  # the first one on top
        axis.set_title(wrapped(title, 44), fontsize=9)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        without_box(axis)
    plt.show()


def matrices(
    *parts: tuple[str, np.ndarray], rows=(), columns=(), numbers: int = 0, **limits
) -> None:
    """Heat maps beside each other: (title, matrix). `numbers` writes each value into its cell, with
    so many decimals."""
    width = min(13, 4.3 * len(parts) + 0.5)
    figure, axes = side_by_side(len(parts), width, 3.6)
    for axis, (title, matrix) in zip(axes, parts):
        matrix = np.asarray(matrix)
        image = axis.imshow(matrix, cmap="viridis", **limits)
        if numbers:
            write_numbers(axis, matrix, numbers)
        if rows:
            axis.set_yticks(range(len(rows)), [wrapped(text, 34) for text in rows], fontsize=7)
        if columns:
            axis.set_xticks(range(len(columns)), columns, fontsize=7)
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axis, shrink=0.8)
    plt.show()


def write_numbers(axis, matrix: np.ndarray, decimals: int) -> None:
    middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
    for (row, column), value in np.ndenumerate(matrix):
        color = "white" if value < middle else "black"  # low values are drawn dark
        axis.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", color=color)


def curves(
    *panels: tuple[str, dict[str, list[float]]],
    xlabel: str = "step",
    log: bool = False,
    start: int = 0,
) -> None:
    """Lines, from step 0 on (or another start): a panel is (title, {label: values})."""
    _, axes = side_by_side(len(panels), 4.6 * len(panels), 2.9)
    for axis, (title, lines) in zip(axes, panels):
        for (label, values), color in zip(lines.items(), COLORS):
            axis.plot(range(start, start + len(values)), values, color=color, label=label)
        axis.set(xlabel=xlabel, yscale="log" if log else "linear")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=8)
        without_box(axis)
    plt.show()


def scatter(x, y, names, xlabel: str, ylabel: str) -> None:
    """Dots with their names."""
    _, (axis,) = side_by_side(1, 6.5, 3.6)
    axis.scatter(x, y, color=BLUE)
    for number, (left, bottom, name) in enumerate(sorted(zip(x, y, names))):
        # Neighbours do not write over each other: in turns left below and right above.
        shift, side = ((-5, -9), "right") if number % 2 == 0 else ((5, 4), "left")
        style = dict(xytext=shift, textcoords="offset points", fontsize=7, ha=side)
        axis.annotate(name, (left, bottom), **style)
    axis.margins(x=0.25, y=0.12)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    without_box(axis)
    plt.show()


def dots(groups: dict[str, np.ndarray], title: str) -> None:
    """Points of a plane in groups: {label: (number, 2)}, one color a group."""
    _, (axis,) = side_by_side(1, 5.5, 3.2)
    for (label, places), color in zip(groups.items(), COLORS):
        places = np.asarray(places)
        axis.scatter(places[:, 0], places[:, 1], s=14, color=color, label=label)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    without_box(axis)
    plt.show()


def grouped_bars(
    columns: list[str], rows: dict[str, list[float]], ylabel: str = "%", title: str = ""
) -> None:
    """Bars that stand in groups: one group a column, one color a row."""
    _, (axis,) = side_by_side(1, 1.6 * len(columns) + 2.5, 3.1)
    width = 0.8 / len(rows)
    for number, (label, values) in enumerate(rows.items()):
        shift = number - (len(rows) - 1) / 2  # the group stands in the middle of its place
        places = np.arange(len(columns)) + shift * width
        drawn = axis.bar(places, values, 0.92 * width, label=label, color=COLORS[number])
        axis.bar_label(drawn, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=9)
    above = dict(loc="lower center", bbox_to_anchor=(0.5, 1.08))
    axis.legend(fontsize=8, ncols=len(rows), **above)
    without_box(axis)
    plt.show()


def intervals(rows: dict[str, tuple[float, float]], xlabel: str) -> None:
    """Means with the half-widths of their intervals; what does not hold zero is in color."""
    _, (axis,) = side_by_side(1, 7.5, 0.42 * len(rows) + 0.9)
    for place, (mean, half) in enumerate(rows.values()):
        color = GRAY if abs(mean) <= half else BLUE
        axis.errorbar(mean, place, xerr=half, fmt="o", capsize=4, color=color)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(xlabel, fontsize=8)
    without_box(axis)
    plt.show()
