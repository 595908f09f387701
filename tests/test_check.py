"""`python train.py check`: what it says when all is there, and when something is not."""

import shutil
import subprocess
import sys

import pytest

from toy import check


def test_ready():
    """The whole command: every line says ok, the last one ready, exit code 0."""
    done = subprocess.run([sys.executable, "train.py", "check"], cwd=check.ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "ready: python train.py", done.stdout + done.stderr
    shown = "\n".join(line for line in lines if line.startswith("  ok  "))
    for word in ("Python", "torch", "safetensors", "device", "memory", "disk", "checkpoint", "loss fell", "there are"):
        assert word in shown


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_package_is_missing(package):
    """In a Python that cannot import it: train.py itself could not start, its check says what to install."""
    code = f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv = ['train.py', 'check']; "
    code += "sys.path.insert(0, '.'); runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=check.ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"NO  {package} cannot be imported" in done.stdout and "pip install -r requirements.txt" in done.stdout
    assert "step and caption: not tried" in done.stdout and "ready: " not in done.stdout


@pytest.fixture
def quick(monkeypatch, capsys):
    """`main` without its last, slow part; returns exit code and output."""
    monkeypatch.setattr(check, "step_and_caption", lambda: iter(["step"]))

    def run():
        code = check.main()
        return code, capsys.readouterr().out

    return run


def test_versions_out_of_range(quick, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0.0" if name == "numpy" else "999.0")
    code, shown = quick()
    assert code == 1 and "numpy is 1.0.0, needed is >=2.0" in shown and "torch is 999.0, needed is >=2" in shown
    assert "pillow is" not in shown  # it has no upper bound


def test_no_disk_space(quick, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    code, shown = quick()
    assert code == 1 and "NO  disk: 0.00 GB free" in shown and "delete something" in shown


def test_too_little_memory(quick, monkeypatch):
    monkeypatch.setattr("train.memory", lambda device: (0.0, 0.3))
    code, shown = quick()
    assert code == 1 and "memory: 0.3 GB free on" in shown and "close other programs" in shown


@pytest.mark.parametrize("damage", ["a bit", "cut off", "a file missing"])
def test_a_damaged_checkpoint(quick, monkeypatch, tmp_path, damage):
    """One flipped bit, a truncated download, a file that is not there: named, with the way to get it back."""
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
    assert f"model.safetensors is {'missing' if damage == 'a file missing' else 'changed or damaged'}" in shown


def test_whatever_else_goes_wrong_is_reported(quick, monkeypatch):
    monkeypatch.setattr("eval.pick_device", lambda: (_ for _ in ()).throw(RuntimeError("driver too old")))
    code, shown = quick()
    assert code == 1 and "device: RuntimeError: driver too old" in shown and "not ready" in shown
