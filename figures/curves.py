"""Losses of the training, and tables before and after, of several runs.

    python -m figures curves runs/toy runs/seed-1
    python -m figures curves both=runs/toy both=runs/seed-1        one name, one colour

Everything is in the runs' folders: no model is loaded.
"""

import json
import math
from pathlib import Path

import numpy as np

from eval import table_columns
from figures.common import BEFORE
from figures.style import OFFSET, cycle_of, drawing, new_figure
from formats.files import InputError, read_json

LOGGED = ("step", "contrastive", "chance", "autoregressive", "temperature")
COLUMNS = (  # of eval.py's table, those that are drawn
    "T2I@1",
    "I2T@1",
    "replace",
    "swap",
    "add",
    "wino text",
    "wino group",
    "attributes",
    "described",
)


def measure(recipes: dict[str, list[Path]]) -> dict[str, list[dict]]:
    """Of each run folder, see `read_curve`. Runs of one name are seeds of one recipe."""
    found = {}
    for name, folders in recipes.items():
        found[name] = [read_curve(folder) for folder in folders]
    return found


def read_curve(folder: Path) -> dict:
    """As "log", log.jsonl in columns; as "before" and "after", the columns of the run's tables, in
    percent, where there are any. Raises InputError."""
    log = read_log(folder / "log.jsonl")
    columns = {}
    # A log of an older run may lack a column: there it has holes.
    for name in LOGGED:
        columns[name] = [log[step].get(name, math.nan) for step in sorted(log)]
    curve = {"log": columns}
    if (folder / "results.json").exists():
        tables = read_json(folder / "results.json")
        curve[BEFORE] = table_columns(tables.get(BEFORE, {}))
        curve["after"] = table_columns(tables.get("after", {}))
    return curve


def read_log(path: Path) -> dict[int, dict]:
    """Steps of a log.jsonl by their number; a last line that is not complete is left out.

    Raises InputError for a file without steps, or with a line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror
        raise InputError(f"{path}: cannot be read ({reason}); is this a run?") from None
    log = {}
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            log[int(step["step"])] = step  # of a step done twice, after a resume, the last counts
        except (ValueError, TypeError, KeyError, RecursionError):
            # The last line may be half written: the run is going on, or was killed.
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not a step of training") from None
    if not log:
        raise InputError(f"{path}: holds no step yet")
    return log


def say(found: dict[str, list[dict]]) -> str:
    sentences = []
    for name, curves in found.items():
        logs = [curve["log"] for curve in curves]
        told = []
        for key in ("contrastive", "autoregressive"):
            if any(logs[0][key]):  # else it was switched off
                first = np.mean([log[key][0] for log in logs])
                # Losses of single batches differ much: the mean of the last ten.
                last = np.mean([np.mean(log[key][-10:]) for log in logs])
                told.append(f"{key} loss {first:.3f} -> {last:.3f}")
            if key == "contrastive" and told:
                told[-1] += f" (chance {logs[0]['chance'][-1]:.2f})"
        first = np.mean([log["temperature"][0] for log in logs])
        last = np.mean([log["temperature"][-1] for log in logs])
        told.append(f"temperature {first:.3f} -> {last:.3f}")
        for column in ("T2I@1", "I2T@1"):
            if all(column in curve.get("after", {}) for curve in curves):
                before = np.mean([curve[BEFORE][column] for curve in curves])
                after = np.mean([curve["after"][column] for curve in curves])
                told.append(f"{column} {before:.1f} -> {after:.1f}")
        steps = len(logs[0]["step"])
        sentences.append(f"{name}, {len(curves)} run(s) of {steps} steps: {', '.join(told)}.")
    return "\n".join(sentences)


@drawing
def draw(found: dict[str, list[dict]]):
    """Losses and temperature by step (thin: as logged; thick: running mean, every run), and the
    tables before and after: hollow and full dots, a full one for each run."""
    figure = new_figure(12, 7.4)
    panels = figure.subplots(2, 2)
    draw_column(panels[0, 0], found, "contrastive", "contrastive loss")
    draw_column(panels[0, 1], found, "autoregressive", "autoregressive loss")
    draw_column(panels[1, 0], found, "temperature", "temperature")
    for axes in panels[0]:
        set_log_scale(axes)
    panels[1, 0].set_ylim(bottom=0)

    draw_chance(panels[0, 0], found)
    # One entry of the legend for each recipe, where a line for each run would give one a run.
    colors = cycle_of(list(found))
    for name, curves in found.items():
        seeds = f", {len(curves)} seeds" if len(curves) > 1 else ""
        panels[0, 0].plot([], [], color=colors[name], label=name + seeds)
    panels[0, 0].legend(fontsize=11, loc="center right")
    draw_tables(panels[1, 1], found)
    return figure


def draw_column(axes, found: dict[str, list[dict]], key: str, title: str) -> None:
    """One column of every run's log."""
    colors = cycle_of(list(found))
    for name, curves in found.items():
        for curve in curves:
            steps = np.array(curve["log"]["step"], float)
            values = np.array(curve["log"][key], float)
            if not np.nan_to_num(values).any():  # a loss that was switched off
                continue
            # A fifteenth of the run, so that long and short runs look alike smooth. The
            # temperature has no noise.
            half = 0 if key == "temperature" else max(1, len(values) // 30)
            axes.plot(steps, values, color=colors[name], linewidth=0.6, alpha=0.3)
            axes.plot(steps, smooth(values, half), color=colors[name], linewidth=1.6, alpha=0.9)
    axes.set(xlabel="step", title=title)


def smooth(values: np.ndarray, half: int) -> list[float]:
    """The mean of each value and `half` neighbours on both sides, as far as there are any."""
    result = []
    for index in range(len(values)):
        window = values[max(0, index - half) : index + half + 1]
        result.append(np.mean(window))
    return result


def set_log_scale(axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    # Losses fall to a tenth and less; a linear axis would show only how they began.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def draw_chance(axes, found: dict[str, list[dict]]) -> None:
    """Where the contrastive loss is when nothing is learned, as long as the longest run."""
    longest = {"step": []}
    for curves in found.values():
        for curve in curves:
            if len(curve["log"]["step"]) > len(longest["step"]):
                longest = curve["log"]
    axes.plot(longest["step"], longest["chance"], color="black", linestyle=":", linewidth=1.4)
    end = (longest["step"][-1], longest["chance"][-1])
    axes.annotate(f"chance: log B = {end[1]:.2f}", end, (0, -5), ha="right", va="top", **OFFSET)


def draw_tables(axes, found: dict[str, list[dict]]) -> None:
    colors = cycle_of(list(found))
    tested = {}
    for name, curves in found.items():
        with_tables = [curve for curve in curves if curve.get("after")]
        if with_tables:
            tested[name] = with_tables
    measured = set()
    for curves in tested.values():
        for curve in curves:
            measured.update(curve["after"])
    columns = [column for column in COLUMNS if column in measured]
    for number, (name, curves) in enumerate(tested.items()):
        color = colors[name]
        for place, column in enumerate(columns):
            # The recipes side by side, in the middle of the column's place.
            x = place + 0.7 * (number + 0.5) / len(tested) - 0.35
            before = [curve[BEFORE].get(column, math.nan) for curve in curves]
            after = [curve["after"].get(column, math.nan) for curve in curves]
            axes.plot([x, x], [np.mean(before), np.mean(after)], color=color, linewidth=1.3)
            hollow = dict(color="white", markeredgecolor=color, markersize=5)
            axes.plot([x] * len(curves), before, "o", **hollow)
            axes.plot([x] * len(curves), after, "o", color=color, markersize=5)
    axes.set(title="tables, %: before (hollow), after (full)", ylim=(-3, 103))
    style = dict(fontsize=11, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xticks(range(len(columns)), columns, **style)
