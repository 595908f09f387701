"""`python -m examples.check`: what it says when all is there, and when something is not."""

import shutil
import subprocess
import sys

import pytest

from examples import check


def test_ready():
    """The whole command: every line says ok, the last one ready, exit code 0."""
    command = [sys.executable, "-m", "examples.check"]
    done = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1] == "ready: python train.py"
    shown = "\n".join(line for line in lines if line.startswith("  ok  "))
    for word in ("Python", "torch", "safetensors", "device", "memory", "disk", "checkpoint"):
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
    """`main` without its last, slow part; returns exit code and output."""

    def step_and_caption():
        yield "step"

    monkeypatch.setattr(check, "step_and_caption", step_and_caption)

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
