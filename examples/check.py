"""Is everything here that `python train.py` needs? What to run the day before a class.

    python -m examples.check

Looks at Python, packages, disk, the toy checkpoint, device and memory, trains two steps and writes
one caption. Ends with "ready", or with what to do and exit code 1. Nothing that may be missing is
imported before it has been looked for, so this file starts in any Python.
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# As train.py does, or a busy machine would look many times slower than it is in training.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "toy" / "tiny-llava"
SUMS = ROOT / "toy" / "tiny-llava.sha256"

# GB that the toy job needs, generously: it was seen to take 0.8 of memory and 0.1 of disk.
MEMORY = 1.5
DISK = 0.5


class Problem(Exception):
    """What is wrong, and what to do."""


# ---- The checks. Each yields what it found to be right, and raises Problem for what is not.


def python() -> Iterator[str]:
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    found = ".".join(str(number) for number in sys.version_info[:3])
    if version_numbers(found) < version_numbers(needed):
        raise Problem(f"Python {found}: install Python {needed} or newer")
    yield f"Python {found}"


def packages() -> Iterator[str]:
    """Those of pyproject.toml: there, importable, and of a version in its range."""
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"dependencies = \[(.*?)\]", project, re.DOTALL)[1]
    requirements = (ROOT / "requirements.txt").read_text()
    tested = re.findall(r"^(\w+)==([\w.]+)", requirements, re.MULTILINE)  # (name, version)
    found = []
    faults = []
    for name, bounds in re.findall(r'"(\w+)([^"]*)"', dependencies):  # "torch>=2.11,<2.14"
        try:
            importlib.import_module("PIL" if name == "pillow" else name)
            version = importlib.metadata.version(name)
        except (ImportError, OSError) as error:  # OSError: a library that torch needs is missing
            faults.append(f"{name} cannot be imported ({error})")
            continue
        if not is_within(version, bounds):
            faults.append(f"{name} is {version}, needed is {bounds}")
        if (name, version.split("+")[0]) in tested:  # 2.11.0+cpu is 2.11.0
            found.append(f"{name} {version}")
        else:
            found.append(f"{name} {version} (not the one tested)")
    if faults:
        raise Problem("; ".join(faults) + ": run `pip install -r requirements.txt`")
    yield ", ".join(found)


def version_numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cpu -> (2, 11, 0): tuples compare as versions do, strings do not."""
    release = version.split("+")[0]
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


def is_within(version: str, bounds: str) -> bool:
    """Is a version within bounds such as ">=2.11,<2.14"?"""
    found = version_numbers(version)
    low = re.search(r">=([\d.]+)", bounds)
    high = re.search(r"<([\d.]+)", bounds)
    if low and found < version_numbers(low[1]):
        return False
    return not (high and found >= version_numbers(high[1]))


def disk() -> Iterator[str]:
    """Room, and leave to write, where the run and temporary files go."""
    for folder in (ROOT, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free / 1e9
        if free < DISK:
            needed = f"{DISK} are needed: delete something"
            raise Problem(f"disk: {free:.2f} GB free at {folder}, {needed}")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            advice = "copy the project elsewhere"
            raise Problem(
                f"disk: {folder} cannot be written ({error.strerror}): {advice}"
            ) from None
        yield f"disk {free:.1f} GB free at {folder}"


def checkpoint() -> Iterator[str]:
    """Every file of the toy model has the hash that was committed."""
    lines = SUMS.read_text().splitlines()
    wrong = []
    for line in lines:
        expected, name = line.split()
        path = CHECKPOINT / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            wrong.append(f"{name} is changed or damaged")
    if wrong:
        advice = "get it back with `git checkout toy/tiny-llava`"
        raise Problem(f"{CHECKPOINT}: {'; '.join(wrong)}: {advice}")
    yield f"checkpoint {CHECKPOINT.name}: {len(lines)} files as committed"


def device() -> Iterator[str]:
    import torch

    from eval import pick_device
    from runtime.memory import held_and_free

    where, dtype = pick_device()
    name = f"{torch.get_num_threads()} threads"
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
    precision = str(dtype).removeprefix("torch.")
    yield f"device {where}: {name}, the fastest precision is {precision}"

    _, free = held_and_free(where)
    if free < MEMORY:
        needed = f"{MEMORY} are needed: close other programs"
        raise Problem(f"memory: {free:.1f} GB free on {where}, {needed}")
    yield f"memory {free:.1f} GB free"


def step_and_caption() -> Iterator[str]:
    """Two steps of the default job on a few scenes, and a caption of one of them."""
    import torch

    from data import open_image
    from eval import caption, load_base
    from toy import world
    from train import TrainConfig

    with tempfile.TemporaryDirectory() as temporary:
        with quiet():
            folder = world.build(Path(temporary) / "data", train_scenes=32, test_scenes=4)
        embedder = load_base(CHECKPOINT, dtype=torch.float32)
        picture = next((folder / "images" / "test").glob("*.png"))
        words = caption(embedder, [open_image(picture)])[0]
        losses, seconds = train_two_steps(embedder, folder / "train.jsonl", size=16)

    before, after = losses
    if not after < before:
        advice = "please report it, with this output"
        raise Problem(f"step: the loss went from {before} to {after}: {advice}")
    yield f"step: the loss fell from {before:.3f} to {after:.3f}"

    seconds *= TrainConfig.batch_size / 16  # of one step of the real job
    minutes = seconds * TrainConfig.steps / 60
    yield (
        f"at this pace `python train.py` trains for {minutes:.0f} minutes, "
        "its tables take half of that again"
    )
    if "there are" not in words:
        advice = "please report it, with this output"
        raise Problem(f"caption: {words!r} is no description: {advice}")
    yield f"caption: {words}"


def train_two_steps(embedder, file: Path, size: int) -> tuple[list[float], float]:
    """The losses of two steps on the first `size` records, and the seconds of the second."""
    import fast
    import train
    from data import CaptionDataset, collate

    config = train.TrainConfig(batch_size=size)
    model = embedder.model
    train.add_adapters(embedder, config)
    fast.install(model)
    optimizer = train.make_optimizer(model, config)
    dataset = CaptionDataset(file, embedder.layout, embedder.processor)
    samples = [dataset[index, 0] for index in range(size)]
    batch = collate(samples, embedder.layout, config.micro_batch, config.caption_share)
    losses = []
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        losses.append(train.training_step(model, batch, config)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
    return losses, seconds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- The command


def main(arguments: list[str] | None = None) -> int:
    """Run all checks. Returns the exit code: 0 where everything is there, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)  # there are none but --help
    sys.path.insert(0, str(ROOT))
    problems: list[str] = []
    for check in (python, packages, disk, checkpoint):
        run(check, problems)
    for check in (device, step_and_caption):
        if problems:  # what is missing would only be reported twice
            print(f"  --  {name_of(check)}: not tried")
        else:
            run(check, problems)
    if problems:
        print("not ready:")
        for problem in problems:
            print(f"  {problem}")
        return 1
    print("ready: python train.py")
    return 0


def run(check: Callable[[], Iterator[str]], problems: list[str]) -> None:
    """Print what a check finds. What is wrong is added to the problems."""
    try:
        for line in check():
            print(f"  ok  {line}", flush=True)
        return
    except Problem as problem:
        problems.append(str(problem))
    except Exception as error:  # whatever else goes wrong here is a finding too
        problems.append(f"{name_of(check)}: {type(error).__name__}: {error}")
    print(f"  NO  {problems[-1]}", flush=True)


def name_of(check: Callable) -> str:
    return check.__name__.replace("_", " ")


if __name__ == "__main__":
    sys.exit(main())
