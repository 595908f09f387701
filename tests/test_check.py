"""`python -m examples.check`: what it says when all is there, and when something is not."""

import shutil
import subprocess
import sys

import pytest

from examples import check


def test_ready():
    """The whole command: no line says NO, the last one says ready, exit code 0."""
    command = [sys.executable, "-m", "examples.check"]
    done = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1] == "ready: python train.py"
    assert all(line.startswith(("  ok  ", "  !!  ")) for line in lines[:-1])
    shown = "\n".join(lines)
    for word in (
        "notebooks:",
        "cores:",
        "busy:",
        "small files",
        "Python",
        "torch",
        "safetensors",
        "device",
        "memory",
        "disk",
        "checkpoint",
    ):
        assert word in shown
    assert "the loss fell" in shown and "there are" in shown


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_package_is_missing(package):
    """In a Python that cannot import it: train.py could not start, the check says what to do."""
    code = f"import runpy, sys; sys.modules[{package!r}] = None; "
    code += "runpy.run_module('examples.check', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"NO  {package} cannot be imported" in done.stdout
    assert "pip install -r requirements.txt" in done.stdout
    assert "step and caption: not tried" in done.stdout
    assert "ready: " not in done.stdout


@pytest.fixture
def quick(monkeypatch, capsys):
    """`main` without its last, slow part, in a room where all is well; returns exit code and
    output."""

    def step_and_caption():
        yield "step"

    monkeypatch.setattr(check, "step_and_caption", step_and_caption)
    monkeypatch.setattr(check, "seconds_of_small_files", lambda folder, number: 0.1)
    monkeypatch.setattr(check, "seconds_of_a_large_file", lambda path, megabytes: 0.1)
    monkeypatch.setattr(check, "usable_cores", lambda: 4)
    monkeypatch.setattr(check, "usable_by_affinity", lambda: 4)
    monkeypatch.setattr(check, "free_cores", lambda number: 3.9)
    monkeypatch.setattr(check, "free_memory", lambda: 8.0)
    monkeypatch.setattr("runtime.memory.held_and_free", lambda device: (0.0, 8.0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run():
        code = check.main([])
        return code, capsys.readouterr().out

    return run


def test_versions_out_of_range(quick, monkeypatch):
    def version(name):
        return "1.0.0" if name == "numpy" else "999.0"

    monkeypatch.setattr("importlib.metadata.version", version)
    code, shown = quick()
    assert code == 1
    assert "numpy is 1.0.0, needed is >=2.0" in shown
    assert "torch is 999.0, needed is >=2" in shown
    assert "pillow is" not in shown  # it has no upper bound


def test_no_disk_space(quick, monkeypatch):
    def disk_usage(folder):
        return shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    code, shown = quick()
    assert code == 1
    assert "NO  disk: 0.00 GB free" in shown and "delete something" in shown


def test_too_little_memory(quick, monkeypatch):
    monkeypatch.setattr("runtime.memory.held_and_free", lambda device: (0.0, 0.3))
    code, shown = quick()
    assert code == 1
    assert "memory: 0.3 GB free on" in shown and "close other programs" in shown


@pytest.mark.parametrize("damage", ["a bit", "cut off", "a file missing"])
def test_a_damaged_checkpoint(quick, monkeypatch, tmp_path, damage):
    """One flipped bit, a truncated download, a file that is not there: named, with the way to get
    it back."""
    folder = tmp_path / "tiny-llava"
    shutil.copytree(check.CHECKPOINT, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "a bit":
        content[-1000] ^= 1
        weights.write_bytes(content)
    elif damage == "cut off":
        weights.write_bytes(content[:-1000])
    else:
        weights.unlink()
    monkeypatch.setattr(check, "CHECKPOINT", folder)
    code, shown = quick()
    assert code == 1 and "git checkout toy/tiny-llava" in shown
    found = "missing" if damage == "a file missing" else "changed or damaged"
    assert f"model.safetensors is {found}" in shown


def test_whatever_else_goes_wrong_is_reported(quick, monkeypatch):
    def pick_device():
        raise RuntimeError("driver too old")

    monkeypatch.setattr("eval.pick_device", pick_device)
    code, shown = quick()
    assert code == 1
    assert "device: RuntimeError: driver too old" in shown and "not ready" in shown


# What is slow or small in a room, what is said of it, what to do; none of it ends in "not ready".
ROOMS = [
    ("seconds_of_small_files", lambda folder, number: 9.0, "slow disk: 200 small", "virus scanner"),
    ("seconds_of_a_large_file", lambda path, megabytes: 9.0, "slow disk: 8 MB", "local disk"),
    ("free_cores", lambda number: 0.2, "0.20 of 4 cores are free, all takes 5.0", "SHARE = 0.2"),
    ("free_cores", lambda number: 0.01, "0.01 of 4 cores", "SHARE = 0.1"),
    ("free_cores", lambda number: 1.2, "1.20 of 4 cores", "before `python train.py`"),
    ("usable_cores", lambda: 1.5, "4 would start on 1.5 cores", "OMP_NUM_THREADS=1"),
    ("usable_cores", lambda: 1, "cores: 1 for this process", "nothing else computes"),
    ("free_memory", lambda: 2.0, "2.0 GB free, enough for one", "close other programs"),
]


@pytest.mark.parametrize(("name", "found", "problem", "advice"), ROOMS)
def test_a_slow_room_is_told_in_one_line_and_is_no_failure(
    name, found, problem, advice, quick, monkeypatch
):
    assert "  !!  " not in quick()[1]
    monkeypatch.setattr(check, name, found)
    code, shown = quick()
    assert code == 0 and shown.endswith("ready: python train.py\n")
    told = [line for line in shown.splitlines() if line.startswith("  !!  ")]
    assert any(problem in line and advice in line for line in told), shown


def test_too_many_threads_are_told(quick, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert "16 would start on 4 cores" in quick()[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "  !!  " not in quick()[1]


def test_packages_of_the_notebooks(quick, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, shown = quick()
    assert code == 0
    assert "!!  notebooks: no matplotlib and no ipykernel" in shown and "jupyter>=1.0" in shown


def test_a_system_that_tells_nothing_of_its_memory(quick, monkeypatch):
    monkeypatch.setattr(check, "free_memory", lambda: float("inf"))
    monkeypatch.setattr("runtime.memory.held_and_free", lambda device: (0.0, float("inf")))
    code, shown = quick()
    assert code == 0
    assert "does not tell what is free" in shown or "device cpu" not in shown


def test_what_is_measured_has_a_size():
    """The real measurements, on any system: a share of the cores, seconds, GB."""
    assert 0 <= check.free_cores(1, seconds=0.1) < 1.5
    assert 0 < check.usable_cores() <= check.usable_by_affinity()
    assert check.free_memory() > 0.01
    assert len(list(check.disk_speed())) == 1
    assert not list(check.ROOT.glob(".check-*"))


@pytest.mark.parametrize(
    ("system", "machine", "error", "advice"),
    [
        ("darwin", "x86_64", ImportError(), "JupyterHub"),
        ("win32", "AMD64", OSError("WinError 126"), "Visual C++"),
        ("linux", "x86_64", ImportError(), ""),
    ],
)
def test_why_there_is_no_torch(system, machine, error, advice, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert advice in check.why_no_torch(error)
    assert bool(check.why_no_torch(error)) == bool(advice)
