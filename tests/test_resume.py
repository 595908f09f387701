"""Runs that are stopped, killed, or meet a full disk go on from their newest checkpoint as if
nothing had happened.
"""

import json
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

import train
from runtime import checkpoints

TIMED = ("seconds", "pairs_per_second", "tokens_per_second", "memory")  # of a line of the log


def run(small_world, out, *flags):
    settings = ["--steps", "6", "--batch_size", "8", "--lora_dropout", "0.2", "--device", "cpu"]
    train.main(["--data", str(small_world / "train.jsonl"), "--out", str(out), *settings, *flags])


def resume(out, *flags):
    train.main(["--resume", "--out", str(out), *flags])


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def state(out, step=6):
    """All that a checkpoint holds, bit for bit (the order of safetensors' metadata is not
    fixed).
    """
    files = (out / f"checkpoints/step-{step}").iterdir()
    return {
        path.name: {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        if path.suffix == ".safetensors"
        else path.read_bytes()
        for path in files
    }


def signal_at(monkeypatch, steps, number=signal.SIGTERM):
    """From now on a signal arrives in the middle of each of these steps."""
    whole, count = train.training_step, iter(range(1000))

    def step(*args):
        if next(count) in steps:
            os.kill(os.getpid(), number)
        return whole(*args)

    monkeypatch.setattr(train, "training_step", step)


@pytest.fixture(scope="module")
def undisturbed(small_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(small_world, out)
    return out


@pytest.mark.parametrize(
    "number,code,workers", [(signal.SIGTERM, 143, "0"), (signal.SIGINT, 130, "2")]
)
def test_stopped_and_resumed_is_undisturbed(
    small_world, tmp_path, monkeypatch, capsys, undisturbed, number, code, workers
):
    """Stopped twice, with dropout: the same parameters, optimizer, random numbers and log, bit for
    bit.
    """
    out = tmp_path / "run"
    signal_at(monkeypatch, (1, 3), number)
    for start in (lambda: run(small_world, out, "--workers", workers), lambda: resume(out)):
        with pytest.raises(SystemExit) as stop:
            start()
        assert stop.value.code == code
        assert f"python train.py --resume --out {out}" in capsys.readouterr().out
    assert (out / "checkpoints/latest").read_text() == "step-4\n"
    with (out / "log.jsonl").open("a") as file:
        # Of a step behind the checkpoint, cut by a power failure.
        file.write('{"step": 4, "loss": 1.0, "skip')
    resume(out)
    assert state(out) == state(undisturbed) and log(out) == log(undisturbed)
    assert json.loads((out / "results.json").read_text()).keys() >= {
        "before",
        "after",
        "seconds",
        "seed",
    }


def test_the_table_before_survives(small_world, tmp_path, monkeypatch):
    """The untrained model is measured once; the final table has it, though another process began
    the run.
    """
    tests = {"retrieval": {"file": "test/karpathy.json", "images": "images"}}
    (small_world / "retrieval.json").write_text(json.dumps(tests))
    flags = ["--tests", str(small_world / "retrieval.json"), "--steps", "2"]
    run(small_world, tmp_path / "whole", *flags)
    signal_at(monkeypatch, (0,))
    with pytest.raises(SystemExit):
        run(small_world, tmp_path / "run", *flags)
    measured, measure = [], train.measure
    monkeypatch.setattr(train, "measure", lambda *args: measured.append(1) or measure(*args))
    resume(tmp_path / "run")
    whole, resumed = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "run")
    )
    assert len(measured) == 1 and whole["before"]["retrieval"]
    assert (resumed["before"], resumed["after"]) == (whole["before"], whole["after"])
    pictures = [(tmp_path / name / "retrieval.png").read_bytes() for name in ("whole", "run")]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("place", ["save_file", "save_adapter", "replace", "rmtree"])
def test_a_failure_inside_of_a_save_costs_nothing(
    small_world, tmp_path, monkeypatch, undisturbed, place
):
    """Wherever a save breaks off, `latest` names a complete checkpoint, and what was left lying
    about is removed.
    """
    out = tmp_path / "run"
    owners = {"save_adapter": train.lora, "replace": os, "rmtree": shutil, "save_file": checkpoints}
    owner = owners[place]
    whole, count = getattr(owner, place), iter(range(1000))

    def broken(*args, **kwargs):
        path = str(next((arg for arg in args[::-1] if str(out) in str(arg)), ""))
        is_checkpoint = "checkpoints" in path and "step-" in path
        if place == "replace":  # the folder's renaming, not that of a file inside of it
            is_checkpoint = path.split("step-")[-1].isdecimal()
        if is_checkpoint and next(count) == {"rmtree": 2}.get(place, 1):
            raise OSError(28, "No space left on device")
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left"):
        patch.setattr(owner, place, broken)
        run(small_world, out, "--save_every", "2", "--keep", "1")
    latest = (out / "checkpoints/latest").read_text().strip()
    assert checkpoints.newest(out).name == latest and len(state(out, latest[5:])) == 5
    resume(out)
    assert state(out) == state(undisturbed) and log(out) == log(undisturbed)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", "step-6"]


def test_a_full_disk_is_reported_before_anything_is_touched(small_world, tmp_path, monkeypatch):
    out, usage = tmp_path / "run", shutil.disk_usage
    run(small_world, out, "--steps", "2")
    before = {
        path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()
    }
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**6))
    with pytest.raises(
        SystemExit, match=r"1.0 MB are free, .* needed.*last good checkpoint.*step-2"
    ):
        resume(out, "--steps", "4")
    assert before == {
        path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()
    }


def test_keep_prunes_the_oldest(small_world, tmp_path):
    """By number, not by name: step-10 is newer than step-8."""
    run(small_world, tmp_path / "run", "--steps", "12", "--save_every", "2", "--keep", "2")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "latest",
        "step-10",
        "step-12",
    ]


def test_keep_never_deletes_what_was_just_saved(small_world, tmp_path):
    """Killed between a rename and `latest`, step-6 lies behind the newest checkpoint; and someone
    keeps a copy.
    """
    out = tmp_path / "run"
    run(small_world, out, "--save_every", "3")
    (out / "checkpoints/latest").write_text("step-3\n")
    shutil.copytree(out / "checkpoints/step-3", out / "checkpoints/step-3-good")
    resume(out, "--steps", "5", "--keep", "1")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "latest",
        "step-3-good",
        "step-5",
    ]
    assert checkpoints.newest(out).name == "step-5"


def test_a_loss_that_is_not_finite_names_step_records_and_checkpoint(
    small_world, tmp_path, monkeypatch
):
    out, whole = tmp_path / "run", train.training_step

    def broken(*args):
        losses = whole(*args)
        return losses | {"loss": float("nan")} if checkpoints.newest(out) else losses

    monkeypatch.setattr(train, "training_step", broken)
    with pytest.raises(SystemExit) as stop:
        run(small_world, out, "--save_every", "2")
    dataset = train.data.CaptionDataset(
        small_world / "train.jsonl", train.eval.load_base(train.eval.TOY_MODEL, "cpu").layout, None
    )
    batch = list(train.data.ResumableSampler(range(len(dataset)), 8, 6))[2]
    message = str(stop.value.code)
    assert (
        "loss nan" in message and "step 2" in message and str(out / "checkpoints/step-2") in message
    )
    assert str(sorted(record for record, _ in batch)) in message
    assert checkpoints.newest(out).name == "step-2"


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--lr", "0.5"], rf"--lr is 0.5, the run in .* has {train.TrainConfig.lr}"),
        (
            ["--batch_size", "4", "--seed", "3"],
            r"--batch_size is 4.*has 8.*--seed is 3|--seed is 3.*--batch_size is 4",
        ),
        (["--no-soft_prompts"], "--soft_prompts is False, the run in .* has True"),
    ],
)
def test_flags_that_contradict_the_run_are_refused(undisturbed, flags, message):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=message):
        resume(undisturbed, *flags)
    assert before == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}


def test_a_run_of_before_a_new_setting_is_refused(undisturbed, tmp_path):
    """A setting that its config.json lacks, such as the weight of a new loss, is not made up."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    config.pop("autoregressive_weight")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="config.json lacks autoregressive_weight"):
        resume(out, "--steps", "8")


def test_resume_without_a_run_starts_one(small_world, tmp_path, undisturbed):
    """The same command, as a queue repeats it: without a folder, without a checkpoint, and when all
    is done.
    """
    out = tmp_path / "run"
    run(small_world, out, "--resume")
    assert state(out) == state(undisturbed)
    results = json.loads((out / "results.json").read_text())
    run(small_world, out, "--resume")
    assert state(out) == state(undisturbed) and log(out) == log(undisturbed)
    assert json.loads((out / "results.json").read_text())["after"] == results["after"]
    shutil.rmtree(out / "checkpoints")
    run(small_world, out, "--resume")
    assert state(out) == state(undisturbed)
    (out / "config.json").unlink()
    before = state(out)
    # It has a checkpoint: not to be replaced.
    with pytest.raises(SystemExit, match="config.json: no such file"):
        run(small_world, out, "--resume")
    assert state(out) == before
    (out / "checkpoints/latest").unlink()  # killed while the folder was made
    run(small_world, out, "--resume")
    assert state(out) == state(undisturbed) and log(out) == log(undisturbed)


@pytest.mark.parametrize(
    "file,content",
    [
        ("config.json", b"{"),
        ("config.json", b'{"lr": "fast"}'),
        ("config.json", b'{"learning_rate": 1.0}'),
        ("checkpoints/latest", b"../../somewhere"),
        ("checkpoints/latest", b"step-7"),
        ("checkpoints/latest", b"\xff\x00"),
        ("checkpoints/step-6/training_state.safetensors", b"\x80\x02}q\x00."),
        ("checkpoints/step-6/training_state.safetensors", None),
        ("checkpoints/step-6/adapter_model.safetensors", b""),
        ("checkpoints/step-6/adapter_config.json", None),
        ("checkpoints/step-6/soft_prompts.safetensors", None),
        ("log.jsonl", b"{\n" * 6),
        ("log.jsonl", b"[1]\n" * 6),
        ("log.jsonl", b'{"skipped": 5, "seconds": 0.0}\n' * 6),
        ("results.json", b"[1]"),
    ],
)
def test_a_damaged_run_is_refused_with_one_line(undisturbed, tmp_path, file, content):
    """What a run folder holds is data as well: one clear error that names the file or its folder,
    nothing changed.
    """
    out = shutil.copytree(undisturbed, tmp_path / "run")
    (out / file).unlink() if content is None else (out / file).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        resume(out, "--steps", "8")
    message = str(stop.value.code)
    assert message.startswith("error: ") and str(out) in message
    assert not (out / "checkpoints/step-8").exists()


def test_what_desktops_leave_in_a_folder_does_not_stop_a_run(undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    (out / ".DS_Store").write_bytes(b"Bud1")
    resume(out, "--steps", "7")
    assert checkpoints.newest(out).name == "step-7" and (out / ".DS_Store").exists()


def test_a_training_state_of_another_model_is_refused(undisturbed, tmp_path):
    """Moments of another shape, random numbers that are none, a temperature that is not one
    number.
    """
    out = shutil.copytree(undisturbed, tmp_path / "run")
    path = out / "checkpoints/step-6/training_state.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".exp_avg"))
    changes = [
        {name: tensors[name][:1]},
        {"rng": tensors["rng"][:, :100]},
        {"log_scale": tensors["rng"]},
    ]
    for change in changes:
        save_file(
            {key: value.clone().contiguous() for key, value in (tensors | change).items()}, path
        )
        with pytest.raises(SystemExit, match="step-6: cannot go on from it"):
            resume(out, "--steps", "8")
