"""All that needs a GPU in one run of eight minutes, the most important parts first.

    bash benchmarks/gpu.sh --json gpu.json          on a GPU of 80 GB or more; no network, no files
    bash benchmarks/gpu.sh --json dry.json --dry    every part to its end, tiny, on the CPU

Each part runs in a process of its own with a time limit, so that what runs out of memory, hangs or
fails costs only itself. Every finding is printed and in the JSON file as soon as it is there; a
table of all of them comes last.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import DEVICE, write_json

ROOT = Path(__file__).resolve().parents[1]


class Report:
    """What a part has found so far, in a file from which the parent reads it whatever happens."""

    def __init__(self, path: Path):
        self.path = path
        self.content = {"lines": [], "figures": {}}

    def line(self, what: str, text: str) -> None:
        """A finding in words, for the table."""
        print(f"  {what}: {text}", file=sys.__stdout__, flush=True)
        self.content["lines"].append([what, text])
        self.write()

    def figures(self, name: str, figures) -> None:
        """The same in numbers."""
        self.content["figures"][name] = figures
        self.write()

    def write(self) -> None:
        # Replaced as a whole: the parent may kill this process at any moment.
        temporary = self.path.with_suffix(".tmp")
        write_json(temporary, self.content)
        os.replace(temporary, self.path)


@dataclass
class Setting:
    """What a part needs to know."""

    dry: bool
    folder: Path  # for this run alone
    limit: float  # seconds that the part has

    @property
    def gigabytes(self) -> float:
        """Free memory of the GPU."""
        if DEVICE.type != "cuda":
            return 0.0
        free, _ = torch.cuda.mem_get_info()
        return free / 1e9

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

    def world(self) -> Path:
        """A small toy world, drawn once."""
        from toy import world

        return world.build(self.folder / "world", train_scenes=16, test_scenes=6)


# ---- The parts. What they print besides goes into a log, see `child`.
def correctness(report: Report, setting: Setting) -> None:
    from benchmarks.correctness import run

    def note(name: str, text: str, figures: dict) -> None:
        report.figures(name, figures)
        report.line(name, text)

    run(setting.world(), note)


def step_of(size: str, report: Report, setting: Setting) -> None:
    """Our training step beside P0, P1 and P2."""
    from benchmarks.step import SIZES, compare, print_result

    pairs = SIZES[size][1]
    if size == "0.9B" and setting.gigabytes < 100:
        pairs = 16  # P1 would be near the end of the memory with 32, and that makes it slow
    if setting.dry:
        size = "smallest"
        pairs = 2
    fewer = {}
    if size != "7B":
        fewer["P0"] = max(2, pairs // 2)  # with 32 its logits are too much for 141 GB
    told = set()

    def note(result: dict) -> None:
        report.figures("step", result)
        for name, row in result["rows"].items():
            if name in told:
                continue
            told.add(name)
            report.line(f"{name} / ours", rung_in_words(row))
        for number, own in result["ours"].items():
            if number in told:
                continue
            told.add(number)
            report.line(f"ours, {number} pairs", ours_in_words(own, int(number)))

    # P2 and P1 first: what P0 takes is known best, and most.
    rounds = 2 if setting.dry else 7
    rungs = ["P2", "P1", "P0"]
    result = compare(size, setting.dtype, pairs, rungs, rounds, report=note, fewer=fewer)
    print_result(result)


def rung_in_words(row: dict) -> str:
    if not row["pairs"]:
        return "out of memory even with 2 pairs"
    text = f"{row['pairs']} pairs: time {row['ratio']:.2f} ({row['low']:.2f} - {row['high']:.2f})"
    if "peak_gb" in row:
        text += f", memory {row['peak_gb / ours']:.2f} ({row['peak_gb']:.1f} GB)"
    text += f", FLOPs {row['flops / ours']:.2f}"
    return text + f", gradients differ by {row['gradient_difference']:.1e}"


def ours_in_words(own: dict, pairs: int) -> str:
    text = f"{own['pairs_per_second']:.2f} pairs/s, {own['floor_flops'] / pairs / 1e12:.2f} needed"
    text += f" TFLOP a pair, useful MFU {100 * own['useful_mfu']:.1f} %"
    if "peak_gb" in own:
        text += f", memory {own['peak_gb']:.1f} GB"
    return text


def largest_batch(report: Report, setting: Setting) -> None:
    """Without the gradient cache by doubling; with it as far as the time goes."""
    from benchmarks.step import what_fits

    size = "7B"
    batches = {False: [8, 16, 32, 64], True: [64, 256, 1024]}
    if setting.dry:
        size = "smallest"
        batches = {False: [2, 4], True: [2, 4]}
    began = time.perf_counter()
    for cache, sizes in batches.items():
        name = "with the gradient cache" if cache else "held as a whole"
        told = []

        def note(rows: list[dict], name=name, told=told) -> None:
            report.figures(name, rows)
            row = rows[-1]
            if row["peak_gb"] is None:
                text = "out of memory"
            else:
                text = f"{row['peak_gb']:.1f} GB, {1000 * row['seconds_a_pair']:.0f} ms a pair"
            report.line(f"{name}, {row['pairs']} pairs", text)
            told.append(row)

        # A part is ended at its limit: what would not be done by then is not begun.
        left = 0.9 * setting.limit - (time.perf_counter() - began)
        what_fits(size, setting.dtype, sizes, (cache,), time_limit=left, report=note)
        held = [row for row in told if row["peak_gb"] is not None]
        if cache and len(held) > 1 and DEVICE.type == "cuda":
            a = held[-2]
            b = held[-1]
            a_pair = (b["peak_gb"] - a["peak_gb"]) / (b["pairs"] - a["pairs"])
            free = setting.gigabytes - b["peak_gb"]
            pairs = b["pairs"] + int(free / max(a_pair, 1e-6))
            report.line(f"{name}, computed", f"{1000 * a_pair:.1f} MB a pair, so {pairs} would fit")


def losses(report: Report, setting: Setting) -> None:
    """Chunked cross-entropy, LoRA, tiled InfoNCE at full size; the slow one last."""
    from benchmarks import losses

    sizes = {"ce": losses.CROSS_ENTROPY_SIZES, "lora": losses.LORA_SIZES}
    sizes["infonce"] = losses.CONTRASTIVE_SIZES
    if setting.dry:
        sizes = {"ce": [(300, 16, 100)], "lora": [(64, 16, 32)], "infonce": [(64, 16)]}
    # A round of InfoNCE with 32,768 pairs takes some seconds, as it is in fp32.
    rounds = {"ce": 7, "lora": 5, "infonce": 5}
    for name, of_table in sizes.items():
        for one in of_table:
            rows = losses.TABLES[name](2 if setting.dry else rounds[name], [one])
            report.figures(f"{name} {one}", rows)
            for row in rows:
                text = f"time {row['ratio']:.2f} ({row['low']:.2f} - {row['high']:.2f})"
                if "their_peak_mb" in row:
                    text += f", {row['our_peak_mb']:.0f} MB instead of {row['their_peak_mb']:.0f}"
                    text += f", gradients differ by {row['gradients']:.1e}"
                if "share_of_medians" in row:
                    text += f", overhead {row['share_of_medians']:.2f} of peft's"
                report.line(f"{name} {one}, {row['peer']} / ours", text)


def encoding(report: Report, setting: Setting) -> None:
    from benchmarks.encoding import run

    size = "smallest" if setting.dry else "7B"
    pictures = 2 if setting.dry else 32
    rows = []

    def note(row: dict) -> None:
        rows.append(row)
        report.figures("encoding", rows)
        text = f"time {row['ratio']:.2f} ({row['low']:.2f} - {row['high']:.2f})"
        text += f", ours {row['per_second']:.1f} a second, differ by {row['differ_by']:.1e}"
        report.line(f"{row['what']}, {row['against']} / ours", text)

    run(size, pictures, 8 * pictures, min(pictures, 16), 2 if setting.dry else 5, note)


def int8(report: Report, setting: Setting) -> None:
    from benchmarks.int8 import compare_steps

    size = "smallest" if setting.dry else "7B"
    result = compare_steps(size, 2 if setting.dry else 4, 2 if setting.dry else 5)
    report.figures("int8", result)
    whole, small = result["weights"]
    row = result["time"]
    text = f"time {row['ratio']:.2f} ({row['low']:.2f} - {row['high']:.2f})"
    text += f", weights {small / 1e9:.2f} GB instead of {whole / 1e9:.2f}"
    text += f", error of LoRA's gradient {result['gradient_error']['.lora_']:.3f}"
    report.line(f"int8 / {result['dtype']}", text)


def toy(report: Report, setting: Setting) -> None:
    """The default job, beside the CPU's table in docs/main.json."""
    import eval
    import train

    out = setting.folder / "run"
    command = ["--out", str(out)]
    if setting.dry:
        data = str(setting.world() / "train.jsonl")
        command += ["--data", data, "--tests", "none", "--steps", "2", "--batch_size", "4"]
    began = time.perf_counter()
    train.main(command)
    report.line("python train.py", f"{time.perf_counter() - began:.0f} s")
    results = json.loads((out / "results.json").read_text())
    report.figures("results", {"before": results["before"], "after": results["after"]})
    on_cpu = json.loads((ROOT / "docs" / "main.json").read_text())
    for when in ("before", "after"):
        expected = eval.table_columns(on_cpu[when])
        found = eval.table_columns(results[when])
        listed = [f"{name} {found[name]:.1f} ({expected[name]:.1f})" for name in found]
        report.line(f"{when} (on the CPU)", ", ".join(listed) or "not tested")


@dataclass
class Part:
    function: Callable[[Report, Setting], None]
    expected: int  # seconds on an H200
    limit: int


# Measured on an H200, but for three that are estimates: of both steps, which have been made shorter
# since (they were 120 and more, and 112), and of the toy, which was ended after 60. In all 430.
PARTS = {
    "correctness": Part(correctness, 35, 100),
    "step 0.9B": Part(lambda report, setting: step_of("0.9B", report, setting), 75, 130),
    "step 7B": Part(lambda report, setting: step_of("7B", report, setting), 80, 130),
    "largest batch, 7B": Part(largest_batch, 45, 70),
    "losses": Part(losses, 40, 70),
    "encoding, 7B": Part(encoding, 40, 70),
    "int8, 7B": Part(int8, 20, 50),
    "toy": Part(toy, 95, 150),
}


# ---- A part in its process
def child(name: str, path: Path, setting: Setting) -> None:
    """Run a part. Its findings go to stdout, all else to stderr, which is a log."""
    report = Report(path)
    report.write()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            PARTS[name].function(report, setting)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        report.content["error"] = f"{type(error).__name__}: {lines[0][:200]}"
        report.write()
        sys.exit(1)


def run_part(name: str, limit: float, dry: bool, folder: Path) -> dict:
    """Start a part, wait for it no longer than `limit`, and return what it has found."""
    path = folder / "part.json"
    path.unlink(missing_ok=True)
    log = folder / "log.txt"
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--json", str(path)]
    command += ["--folder", str(folder), "--limit", str(limit)]
    if dry:
        command.append("--dry")
    started = time.perf_counter()
    status = "ok"
    with log.open("w") as stderr:
        # In a session of its own, so that what it starts can be ended with it.
        process = subprocess.Popen(command, stderr=stderr, cwd=ROOT, start_new_session=True)
        try:
            if process.wait(limit):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result = {"lines": [], "figures": {}}
    if path.exists():
        result = json.loads(path.read_text())
    output = log.read_text(errors="replace")
    if status == "failed" and "error" not in result:
        lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
        result["error"] = lines[-1][:200]
    result["status"] = status
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["log"] = output[-4000:]
    return result


def draw_toy_world() -> subprocess.Popen:
    """On one core, meanwhile: it takes a minute, and the last part needs it."""
    code = "import train; train.draw_toy_world()"
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True
    )


def table(results: dict) -> str:
    """All findings in Markdown."""
    rows = [f"{results['device']}, torch {results['torch']}", "", "| part | what | found |"]
    rows.append("|---|---|---|")
    for name, part in results["parts"].items():
        for what, text in part["lines"]:
            rows.append(f"| {name} | {what} | {text} |")
        status = part["status"]
        if "error" in part:
            status += f": {part['error']}"
        rows.append(f"| {name} | {part['seconds']:.0f} s | {status} |")
    return "\n".join(rows)


def run_all(path: Path, minutes: float, dry: bool) -> dict:
    from benchmarks.measure import device_name

    end = time.perf_counter() + 60 * minutes
    results = {"device": device_name(), "torch": torch.__version__, "parts": {}}
    drawing = None if dry else draw_toy_world()
    with tempfile.TemporaryDirectory() as place:
        for name, part in PARTS.items():
            left = end - time.perf_counter()
            # Half of a part would say little, and what follows may be shorter.
            if not dry and left < part.expected / 2:
                found = {"lines": [], "figures": {}, "status": "left out", "seconds": 0.0}
            else:
                print(f"{name}", flush=True)
                if name == "toy" and drawing:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        drawing.wait(left)
                # What runs dry is to end, on however busy a machine.
                limit = 600 if dry else min(part.limit, left)
                found = run_part(name, limit, dry, Path(place))
            print(f"  {found['status']} {found.get('error', '')}", flush=True)
            results["parts"][name] = found
            write_json(path, results)
    if drawing and drawing.poll() is None:
        os.killpg(drawing.pid, signal.SIGKILL)
    print(table(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="write the findings here")
    parser.add_argument("--minutes", type=float, default=8, help="no part goes on after them (8)")
    parser.add_argument("--dry", action="store_true", help="all parts, tiny, to see that they run")
    for internal in ("--part", "--folder", "--limit"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        setting = Setting(args.dry, Path(args.folder), float(args.limit))
        child(args.part, args.json, setting)
        return
    if DEVICE.type != "cuda" and not args.dry:
        sys.exit("error: no CUDA GPU here; --dry runs all parts, tiny, on the CPU")
    run_all(args.json.resolve(), args.minutes, args.dry)


if __name__ == "__main__":
    main()
