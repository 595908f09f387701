"""Is everything here that `python train.py` needs? What to run the day before a class.

    python -m examples.check

Looks at Python, packages, the toy checkpoint, the room (cores, how busy they are, disk), device and
memory, trains two steps and writes one caption. Each line is one finding:

    ok    as it should be
    !!    it works, but something will be slow or is missing for the notebooks, and what to do
    NO    it does not work, and what to do

Ends with "ready", or with all that says NO and exit code 1. Nothing that may be missing is imported
before it has been looked for, so this file starts in any Python. On Linux, macOS and Windows: what
a system does not tell is left out.
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# As train.py does, or a busy machine would look many times slower than it is in training.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "toy" / "tiny-llava"
SUMS = ROOT / "toy" / "tiny-llava.sha256"

# GB that the toy job needs, generously: it was seen to take 0.8 of memory and 0.1 of disk.
MEMORY = 1.5
DISK = 0.5

# From where on the room is told to be slow. The notebooks are made for one core of one's own, and
# below 0.8 of one a cell's wait is felt. A local disk writes and reads the files in 0.1 s, and the
# megabytes as well; 20 times as long is a virus scanner or a network folder.
FREE_CORE = 0.8
SMALL_FILES = 200
LARGE_FILE = 8  # MB
SLOW_DISK = 2.0  # seconds, for either
TOY_FILES = 3600  # pictures that `python train.py` draws at its first start, about


class Problem(Exception):
    """What is wrong, and what to do."""


class Slow(str):
    """A finding that is no reason to stop, with what to do about it."""


# ---- The checks. Each yields what it found to be right, or a Slow; it raises Problem for what does
# not work.


def python() -> Iterator[str]:
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    found = ".".join(str(number) for number in sys.version_info[:3])
    if version_numbers(found) < version_numbers(needed):
        raise Problem(f"Python {found}: install Python {needed} or newer")
    if sys.maxsize < 2**32:
        raise Problem(f"Python {found} is the 32-bit one, which PyTorch does not serve: install 64")
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
            fault = f"{name} cannot be imported ({error})"
            if name == "torch":
                fault += why_no_torch(error)
            faults.append(fault)
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


def why_no_torch(error: Exception) -> str:
    """What is known of machines on which torch cannot be there, or cannot start."""
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        return " (PyTorch makes no builds for Macs with Intel processors: use a JupyterHub)"
    if sys.platform == "win32" and isinstance(error, OSError):
        return " (install Microsoft's Visual C++ Redistributable, x64)"
    return ""


def notebooks() -> Iterator[str]:
    """What the workshop needs on top."""
    missing = []
    for name in ("matplotlib", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    if missing:
        advice = '`python -m pip install "matplotlib>=3.9" "jupyter>=1.0"`'
        yield Slow(f"notebooks: no {' and no '.join(missing)} here, which they need: {advice}")
    else:
        yield "notebooks: matplotlib and ipykernel are there"


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
    """Room, leave to write, and speed, where the run and temporary files go."""
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
    yield from disk_speed()


def disk_speed() -> Iterator[str]:
    """Many small files, as the toy world is, and a large one, as a model is."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".check-") as folder:
        small = seconds_of_small_files(Path(folder), SMALL_FILES)
        large = seconds_of_a_large_file(Path(folder) / "large", LARGE_FILE)
    advice = "copy the project to a local disk, or let the virus scanner leave its folder out"
    found = f"disk: {SMALL_FILES} small files in {small:.1f} s"
    if small > SLOW_DISK:
        minutes = TOY_FILES / SMALL_FILES * small / 60
        later = f"`python train.py` draws {TOY_FILES}, for {minutes:.0f} minutes, once"
        yield Slow(f"slow {found} ({later}): {advice}")
    elif large > SLOW_DISK:
        yield Slow(f"slow disk: {LARGE_FILE} MB in {large:.1f} s: {advice}")
    else:
        yield f"{found}, {LARGE_FILE} MB in {large:.1f} s"


def seconds_of_small_files(folder: Path, number: int) -> float:
    """How long so many files of the size of a toy picture take, written and read."""
    content = os.urandom(600)
    started = time.perf_counter()
    for index in range(number):
        (folder / f"{index}.png").write_bytes(content)
    for index in range(number):
        (folder / f"{index}.png").read_bytes()
    return time.perf_counter() - started


def seconds_of_a_large_file(path: Path, megabytes: int) -> float:
    content = os.urandom(megabytes * 10**6)
    started = time.perf_counter()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else it is only on its way
    path.read_bytes()
    return time.perf_counter() - started


def cores() -> Iterator[str]:
    """How many this process may use, how many threads it will start, how many are free now."""
    number = usable_cores()
    if number < 2:
        advice = "it is enough for the notebooks if nothing else computes"
        yield Slow(f"cores: {number:g} for this process: {advice}")
    else:
        yield f"cores: {number:g} for this process"

    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() else usable_by_affinity()
    if threads > math.ceil(number):
        advice = "set OMP_NUM_THREADS=1 before Python or jupyter starts"
        why = "those without a core keep the others waiting"
        yield Slow(f"threads: {threads} would start on {number:g} cores, {why}: {advice}")

    free = free_cores(max(1, round(number)))
    found = f"{free:.2f} of {number:g} cores are free"
    if free < FREE_CORE:
        times = 1 / max(free, 0.01)
        share = f"set SHARE = {max(free, 0.1):.1f} in the notebooks"
        advice = f"close other programs, or {share} and start jupyter with OMP_NUM_THREADS=1"
        yield Slow(f"busy: {found}, all takes {times:.1f} times as long: {advice}")
    elif free < 0.6 * number:
        advice = (
            "in the notebooks keep SHARE = 1.0, start jupyter with OMP_NUM_THREADS=1, and expect "
            "up to twice the time; close other programs before `python train.py`"
        )
        yield Slow(f"busy: {found}: {advice}")
    else:
        yield f"busy: no, {found}"


def usable_by_affinity() -> int:
    """The cores that this process may run on; torch starts a thread for each."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> float:
    """The same, or fewer where a container has a limit, of which torch knows nothing."""
    number = usable_by_affinity()
    try:  # "200000 100000" is two cores, "max 100000" all of them
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(number, int(quota) / int(period))
    except (OSError, ValueError):
        return number


def free_cores(number: int, seconds: float = 0.5) -> float:
    """How many of so many cores this process gets: it computes on all, and compares the time that
    it computed with the time that went by.

    A hash of a large piece lets go of Python's lock, so that the threads run at once, and needs
    nothing that may be missing."""
    content = bytes(2**20)

    def compute(end: float) -> None:
        while time.perf_counter() < end:
            hashlib.sha256(content)

    started = time.perf_counter()
    computed = time.process_time()
    with ThreadPoolExecutor(number) as threads:
        list(threads.map(compute, [started + seconds] * number))
    computed = time.process_time() - computed
    return computed / (time.perf_counter() - started)


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
    if where.type == "cpu":
        free = min(free, free_memory())
    if free < MEMORY:
        needed = f"{MEMORY} are needed: close other programs"
        raise Problem(f"memory: {free:.1f} GB free on {where}, {needed}")
    if math.isinf(free):
        yield f"memory: this system does not tell what is free; {MEMORY} GB are needed"
    elif free < 2 * MEMORY:
        advice = "close other programs, and a notebook's kernel before the next one"
        yield Slow(f"memory: {free:.1f} GB free, enough for one notebook at a time: {advice}")
    else:
        yield f"memory {free:.1f} GB free"


def free_memory() -> float:
    """GB, by what tells it: psutil, which comes with jupyter, on all systems; and the limit of a
    container, which may be far below what its machine has. Infinite where nothing tells."""
    free = math.inf
    with contextlib.suppress(ImportError, OSError):
        import psutil

        free = psutil.virtual_memory().available / 1e9
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        statistics = Path("/sys/fs/cgroup/memory.stat").read_text()
        files = re.search(r"^inactive_file (\d+)", statistics, re.MULTILINE)
        if files:  # files that were read and are kept as long as nobody needs the room
            used -= int(files[1])
        free = min(free, (limit - used) / 1e9)
    return free


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
    for check in (python, packages, notebooks, disk, cores, checkpoint):
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
            mark = "!!" if isinstance(line, Slow) else "ok"
            print(f"  {mark}  {line}", flush=True)
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
