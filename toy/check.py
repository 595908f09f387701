"""Is everything here that `python train.py` needs? What to run the day before a class.

    python train.py check

Looks at Python, packages, device, memory, disk and the toy checkpoint, trains one step and writes one caption. Ends
with "ready", or with what to do and exit code 1. Imports nothing that may be missing before it has looked for it.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKPOINT, SUMS = ROOT / "toy" / "tiny-llava", ROOT / "toy" / "tiny-llava.sha256"
INSTALL = "pip install -r requirements.txt"
MEMORY, DISK = 1.5, 0.5  # GB that the toy job needs, generously: it was seen to take 0.8 and 0.1


class Problem(Exception):
    """What is wrong, and what to do."""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def python() -> Iterator[str]:
    wanted = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    found = ".".join(map(str, sys.version_info[:3]))
    if numbers(found) < numbers(wanted):
        raise Problem(f"Python {found}: install Python {wanted} or newer")
    yield f"Python {found}"


def packages() -> Iterator[str]:
    """Those of pyproject.toml: there, importable, and of a version in its range."""
    listed = re.search(r"dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    tested = re.findall(r"^(\w+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    found, faults = [], []
    for name, bounds in re.findall(r'"(\w+)([^"]*)"', listed):
        try:
            importlib.import_module({"pillow": "PIL"}.get(name, name))
            version = importlib.metadata.version(name)
        except (ImportError, OSError) as error:  # OSError: a library that torch was built against is not here
            faults.append(f"{name} cannot be imported ({error})")
            continue
        low, high = re.search(r">=([\d.]+)", bounds), re.search(r"<([\d.]+)", bounds)
        if (low and numbers(version) < numbers(low[1])) or (high and numbers(version) >= numbers(high[1])):
            faults.append(f"{name} is {version}, needed is {bounds}")
        is_tested = (name, version.split("+")[0]) in tested
        found.append(f"{name} {version}" + ("" if is_tested else " (not the one tested)"))
    if faults:
        raise Problem("; ".join(faults) + f": run `{INSTALL}`")
    yield ", ".join(found)


def device() -> Iterator[str]:
    import torch

    from eval import pick_device
    from train import memory

    where, dtype = pick_device()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{torch.get_num_threads()} threads"
    yield f"device {where}: {name}, the fastest precision is {str(dtype)[6:]}"
    free = memory(where)[1]
    if free < MEMORY:
        raise Problem(f"memory: {free:.1f} GB free on {where}, {MEMORY} are needed: close other programs")
    yield f"memory {free:.1f} GB free"


def disk() -> Iterator[str]:
    for folder in (ROOT, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free / 1e9
        if free < DISK:
            raise Problem(f"disk: {free:.2f} GB free at {folder}, {DISK} are needed: delete something")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise Problem(f"disk: {folder} cannot be written ({error.strerror}): copy the project elsewhere") from None
        yield f"disk {free:.1f} GB free at {folder}"


def checkpoint() -> Iterator[str]:
    """Every file of toy/tiny-llava has the hash that was committed."""
    lines = [line.split() for line in SUMS.read_text().splitlines()]
    wrong = []
    for expected, name in lines:
        path = CHECKPOINT / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            wrong.append(f"{name} is {'changed or damaged' if path.exists() else 'missing'}")
    if wrong:
        raise Problem(f"{CHECKPOINT}: {'; '.join(wrong)}: get it back with `git checkout toy/tiny-llava`")
    yield f"checkpoint {CHECKPOINT.name}: {len(lines)} files as committed"


def step_and_caption() -> Iterator[str]:
    """A step of the default job on a few scenes, and a caption of one."""
    import torch
    from torch import nn

    import train
    from data import CaptionDataset, collate
    from eval import caption, load_base, open_image
    from toy import world

    with tempfile.TemporaryDirectory() as temporary:
        config = train.TrainConfig(batch_size=16)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            folder = world.build(Path(temporary) / "data", train_scenes=32, test_scenes=4)
        run = load_base(CHECKPOINT, None, dtype=torch.float32)
        words = caption(run, [open_image(next((folder / "images" / "test").glob("*.png")))])[0]
        train.add_adapters(run, config)
        dataset = CaptionDataset(folder / "train.jsonl", run.layout, run.processor)
        samples = [dataset[index, 0] for index in range(16)]
        batch = collate(samples, run.layout, config.micro_batch, config.caption_share)
        log_scale = nn.Parameter(torch.zeros((), device=run.model.device))
        optimizer = train.make_optimizer(run.model, log_scale, config)
        losses = [0.0, 0.0]
        for step in range(2):  # the first one warms up
            started = time.perf_counter()
            losses[step] = train.training_step(run.model, batch, log_scale, config)["loss"]
            optimizer.step()
            optimizer.zero_grad()
        seconds = (time.perf_counter() - started) * train.TrainConfig.batch_size / 16
    if not losses[1] < losses[0]:
        raise Problem(f"step: the loss went from {losses[0]} to {losses[1]}: please report it, with this output")
    minutes = seconds * train.TrainConfig.steps / 60
    yield f"step: the loss fell from {losses[0]:.3f} to {losses[1]:.3f}"
    yield f"at this pace `python train.py` trains for {minutes:.0f} minutes, its tables take half of that again"
    if "there are" not in words:
        raise Problem(f"caption: {words!r} is no description: please report it, with this output")
    yield f"caption: {words}"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    checks: list[Callable] = [python, packages, disk, checkpoint, device, step_and_caption]
    problems: list[str] = []
    for check in checks:
        if check in (device, step_and_caption) and problems:
            print(f"  --  {check.__name__.replace('_', ' ')}: not tried")
            continue
        try:
            for line in check():
                print(f"  ok  {line}", flush=True)
        except Problem as problem:
            problems.append(str(problem))
        except Exception as error:  # whatever else goes wrong here is a finding too
            problems.append(f"{check.__name__.replace('_', ' ')}: {type(error).__name__}: {error}")
        else:
            continue
        print(f"  NO  {problems[-1]}", flush=True)
    print("not ready:\n  " + "\n  ".join(problems) if problems else "ready: python train.py")
    return bool(problems)
