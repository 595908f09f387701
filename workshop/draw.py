"""The figures of the notebooks: plain matplotlib, one function a kind of picture. Each one shows its figure."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch, Rectangle

BLUE, ORANGE, GREEN, GRAY, PURPLE = "#4c78a8", "#f58518", "#54a24b", "#9d9d9d", "#b279a2"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, GRAY)


def wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= width else [*lines, word]
    return "\n".join(lines)


def pictures(images, titles=(), columns: int = 6, width: int = 24, side: float = 1.7, frames=()) -> None:
    """A sheet of small pictures, pixel by pixel. `frames`: True draws a green frame, False a red one."""
    rows = -(-len(images) // columns)
    lines = max([wrapped(title, width).count("\n") + 1 for title in titles], default=0)
    size = (side * min(columns, len(images)), rows * (side + 0.16 * lines))
    figure, axes = plt.subplots(rows, min(columns, len(images)), figsize=size, squeeze=False, layout="constrained")
    for index, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if index < len(images):
            axis.imshow(np.asarray(images[index]), interpolation="nearest")
        if index < len(titles):
            axis.set_xlabel(wrapped(titles[index], width), fontsize=7)
        if index < len(frames) and frames[index] is not None:
            axis.spines[:].set(visible=True, color="limegreen" if frames[index] else "crimson", linewidth=3)
    plt.show()


def flow(*rows: list[tuple[str, str, str]], title: str = "") -> None:
    """A slide of boxes, left to right, one row below another. A box is (name, what it gives, color)."""
    longest = max(map(len, rows))
    figure, axis = plt.subplots(figsize=(min(12, 2.1 * longest), 1.05 * len(rows) + 0.3), layout="constrained")
    axis.set(xlim=(-0.1, longest + 0.05), ylim=(0.9 - len(rows), 0.7))
    axis.axis("off")
    for row, boxes in enumerate(rows):
        for column, (name, shape, color) in enumerate(boxes):
            place = (column, -row)
            style = dict(boxstyle="round,pad=0.02", facecolor=color, edgecolor="none", alpha=0.25)
            axis.add_patch(FancyBboxPatch(place, 0.78, 0.55, **style))
            axis.text(column + 0.39, 0.36 - row, name, ha="center", va="center", fontsize=9, weight="bold")
            axis.text(column + 0.39, 0.14 - row, shape, ha="center", va="center", fontsize=8, family="monospace")
            if column:
                arrow = dict(arrowstyle="->", color="black", lw=1.3)
                axis.annotate("", (column - 0.03, 0.28 - row), (column - 0.19, 0.28 - row), arrowprops=arrow)
    axis.set_title(title, fontsize=11, loc="left")
    plt.show()


def tokens(*rows: tuple[str, list[tuple[str, str]]], title: str = "", marked=()) -> None:
    """Sequences as strips of tokens: a row is (label, [(word, color), ...]); `marked` are (row, token) places."""
    longest = max(len(words) for _, words in rows)
    figure, axis = plt.subplots(figsize=(12, 0.8 * len(rows) + 0.4), layout="constrained")
    axis.set(xlim=(-0.2, longest + 0.2), ylim=(1.1 - 1.25 * len(rows), 1.0))
    axis.axis("off")
    size = min(8, 420 / longest)
    for row, (label, words) in enumerate(rows):
        top = -1.25 * row
        axis.text(0, top + 0.72, label, fontsize=9)
        for column, (word, color) in enumerate(words):
            edge = "black" if (row, column) in marked else "white"
            box = Rectangle((column + 0.03, top), 0.94, 0.6, facecolor=color, alpha=0.35, edgecolor="none")
            axis.add_patch(box)
            if edge == "black":
                outline = Rectangle((column + 0.03, top), 0.94, 0.6, fill=False, edgecolor="black", linewidth=2)
                axis.add_patch(outline)
            turn = dict(rotation=60) if longest > 16 else {}
            axis.text(column + 0.5, top + 0.3, word, ha="center", va="center", fontsize=size, **turn)
    axis.set_title(title, fontsize=11, loc="left")
    plt.show()


def bars(*groups: tuple[str, list[str], list[float]], xlabel: str = "", colors=COLORS) -> None:
    """Groups of horizontal bars beside each other: (title, words, numbers)."""
    height = 0.26 * max(len(words) for _, words, _ in groups) + 0.8
    size = (min(12, 4.2 * len(groups)), height)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, words, numbers), color in zip(axes[0], groups, colors):
        axis.barh(range(len(words)), numbers, color=color)
        axis.set_yticks(range(len(words)), words, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(wrapped(title, 44), fontsize=9)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.spines[["top", "right"]].set_visible(False)
    plt.show()


def matrices(*parts: tuple[str, np.ndarray], rows=(), columns=(), numbers: bool = False, **limits) -> None:
    """Heat maps beside each other: (title, matrix)."""
    size = (min(13, 4.3 * len(parts) + 0.5), 3.6)
    figure, axes = plt.subplots(1, len(parts), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, matrix) in zip(axes[0], parts):
        matrix = np.asarray(matrix)
        image = axis.imshow(matrix, cmap="viridis", **limits)
        if numbers:
            for (i, j), value in np.ndenumerate(matrix):
                dark = value < (np.nanmin(matrix) + np.nanmax(matrix)) / 2
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
        if rows:
            axis.set_yticks(range(len(rows)), [wrapped(text, 34) for text in rows], fontsize=7)
        if columns:
            axis.set_xticks(range(len(columns)), columns, fontsize=7)
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axis, shrink=0.8)
    plt.show()


def attention_over(image, maps: dict[str, np.ndarray], side: int = 4) -> None:
    """A picture, and over it how much attention each of its `side` x `side` patches gets."""
    figure, axes = plt.subplots(1, len(maps) + 1, figsize=(2.1 * (len(maps) + 1), 2.4), layout="constrained")
    pixels = np.asarray(image)
    axes[0].imshow(pixels, interpolation="nearest")
    axes[0].set_title("picture", fontsize=9)
    for axis, (title, weights) in zip(axes[1:], maps.items()):
        axis.imshow(pixels.mean(-1), cmap="gray", interpolation="nearest")
        grid = np.asarray(weights).reshape(side, side)
        axis.imshow(grid, cmap="magma", alpha=0.65, extent=(-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5))
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    plt.show()


def patch_grid(image, patch: int) -> None:
    """A picture, cut into the patches that become tokens, with their numbers."""
    pixels = np.asarray(image)
    count = pixels.shape[0] // patch
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.8), layout="constrained")
    left.imshow(pixels, interpolation="nearest")
    for line in range(1, count):
        left.axhline(line * patch - 0.5, color="white", linewidth=1)
        left.axvline(line * patch - 0.5, color="white", linewidth=1)
    for index in range(count * count):
        row, column = divmod(index, count)
        x, y = column * patch + patch / 2 - 0.5, row * patch + patch / 2 - 0.5
        left.text(x, y, str(index), color="white", ha="center", va="center", fontsize=9, weight="bold")
    left.set_title(f"{pixels.shape[1]} x {pixels.shape[0]} pixels, patches of {patch} x {patch}", fontsize=9)
    strip = [
        pixels[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] for r in range(count) for c in range(count)
    ]
    gap = np.full((patch, 2, 3), 255, np.uint8)
    half = len(strip) // 2
    lines = [np.concatenate([part for each in strip[i : i + half] for part in (each, gap)], 1) for i in (0, half)]
    right.imshow(np.concatenate([lines[0], np.full((4, lines[0].shape[1], 3), 255, np.uint8), lines[1]]))
    right.set_title("the same as a sequence, row by row", fontsize=9)
    for axis in (left, right):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    plt.show()


def curves(*panels: tuple[str, dict[str, list[float]]], xlabel: str = "step", log: bool = False) -> None:
    """Lines: a panel is (title, {label: values})."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 2.9), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels):
        for (label, values), color in zip(lines.items(), COLORS):
            x, y = values if isinstance(values, tuple) else (range(len(values)), values)
            axis.plot(x, y, color=color, label=label)
        axis.set(xlabel=xlabel, title=title, yscale="log" if log else "linear")
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    plt.show()


def scatter(x, y, names, xlabel: str, ylabel: str) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    axis.scatter(x, y, color=BLUE)
    for number, (*place, name) in enumerate(sorted(zip(x, y, names))):
        shift = (4, -9 if number % 2 else 4)  # neighbours do not write over each other
        axis.annotate(name, place, xytext=shift, textcoords="offset points", fontsize=7)
    axis.margins(x=0.25, y=0.12)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.spines[["top", "right"]].set_visible(False)
    plt.show()


def grouped_bars(columns: list[str], rows: dict[str, list[float]], ylabel: str = "%", title: str = "") -> None:
    """Bars that stand in groups: one group a column, one color a row."""
    figure, axis = plt.subplots(figsize=(1.6 * len(columns) + 2.5, 3.1), layout="constrained")
    width = 0.8 / len(rows)
    for number, ((label, values), color) in enumerate(zip(rows.items(), COLORS)):
        places = np.arange(len(columns)) + (number - (len(rows) - 1) / 2) * width
        drawn = axis.bar(places, values, 0.92 * width, label=label, color=color)
        axis.bar_label(drawn, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8, ncols=len(rows), loc="lower center", bbox_to_anchor=(0.5, 1.08))
    axis.spines[["top", "right"]].set_visible(False)
    plt.show()


def intervals(rows: dict[str, tuple[float, float]], xlabel: str) -> None:
    """Means with the half-widths of their intervals; what does not hold zero is drawn in color."""
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 0.9), layout="constrained")
    for place, (mean, half) in enumerate(rows.values()):
        axis.errorbar(mean, place, xerr=half, fmt="o", capsize=4, color=GRAY if abs(mean) <= half else BLUE)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(xlabel, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    plt.show()


def blocks(*parts: tuple[str, int, int, str], title: str = "") -> None:
    """Matrices as rectangles to scale: (name, rows, columns, color), in a row."""
    largest = max(max(rows, columns) for _, rows, columns, _ in parts)
    width = sum(2 * columns / largest + 0.9 for _, _, columns, _ in parts)
    figure, axis = plt.subplots(figsize=(1.2 * width + 0.4, 3.6), layout="constrained")
    x = 0.0
    for name, rows, columns, color in parts:
        w, h = 2 * columns / largest, 2 * rows / largest
        axis.add_patch(Rectangle((x, -h / 2), w, h, facecolor=color, alpha=0.4, edgecolor=color))
        axis.text(x + w / 2, -1.25, f"{name}\n{rows} x {columns}", ha="center", va="top", fontsize=8)
        x += w + 0.9
    axis.set(xlim=(-0.3, x), ylim=(-1.8, 1.1), aspect="equal")
    axis.axis("off")
    axis.set_title(wrapped(title, 52), fontsize=9, loc="left")
    plt.show()
