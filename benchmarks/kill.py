"""Kill a run that saves at every step, at random moments, and see that it always goes on: python -m
benchmarks.kill

SIGKILL, which nothing can catch, hits the whole run after a random time, so inside of a step, of a
save, of the pruning of old checkpoints, of a start. Then every checkpoint that `latest` names must
be complete, the next start must go on from it, and the last one must end with the parameters, the
optimizer and the log of a run that nobody disturbed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from toy import world  # noqa: E402

FILES = {"adapter_config.json", "adapter_model.safetensors", "soft_prompts.safetensors"}
FILES |= {"training_state.json", "training_state.safetensors"}


def command(folder: Path, out: Path, steps: int) -> list[str]:
    files = ["--data", str(folder / "train.jsonl"), "--out", str(out)]
    settings = f"--steps {steps} --batch_size 8 --micro_batch 4 --save_every 1 --keep 2"
    settings += " --lora_dropout 0.1 --device cpu"
    return [sys.executable, "train.py", "--resume", *files, *settings.split()]


def start(arguments: list[str]) -> subprocess.Popen:
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=nowhere, stderr=nowhere, start_new_session=True
    )


def end_state(out: Path, steps: int) -> tuple:
    """What must not depend on the kills."""
    folder = out / "checkpoints" / f"step-{steps}"
    tensors = {
        f"{path.name}: {name}": tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return tensors, [
        (line["step"], line["loss"], line["gradient_norm"], line["temperature"]) for line in log
    ]


def newest_step(out: Path) -> int:
    """The step of the checkpoint that `latest` names, -1 before the first; it must be complete."""
    latest = out / "checkpoints" / "latest"
    if not latest.exists():
        return -1
    folder = latest.parent / latest.read_text().strip()
    assert {path.name for path in folder.iterdir()} == FILES, f"{folder} is not complete"
    for path in folder.glob("*.safetensors"):
        load_file(path)
    return int(folder.name[5:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill"), help="is emptied")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    folder = world.build(args.folder.resolve() / "world", train_scenes=48, test_scenes=4)
    out, undisturbed, chance = (
        args.folder / "killed",
        args.folder / "undisturbed",
        random.Random(args.seed),
    )

    began = time.perf_counter()
    start(command(folder, undisturbed.resolve(), args.steps)).wait()
    whole = time.perf_counter() - began
    kills, resumed, inside, steps_seen = 0, 0, 0, []
    arguments = command(folder, out.resolve(), args.steps)
    while kills < args.kills:
        before = newest_step(out) if out.exists() else -1
        process = start(arguments)
        # Long enough to start (about as long as to load torch), then any moment of some twenty
        # steps.
        if before == -1 and not steps_seen:
            while not (out / "checkpoints" / "latest").exists() and process.poll() is None:
                time.sleep(0.01)
        else:
            mark = (out / "log.jsonl").stat().st_mtime_ns
            patience = time.perf_counter() + chance.choice(
                [0.3, 60, 60, 60]
            )  # one in four while it starts
            while (out / "log.jsonl").stat().st_mtime_ns == mark and time.perf_counter() < patience:
                time.sleep(0.002)
        time.sleep(chance.random() * 20 * whole / args.steps)
        if process.poll() is not None:
            assert process.returncode == 0, "a start failed"
            print(f"the run ended after {kills} kills; raise --steps")
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        inside += bool(list((out / "checkpoints").glob("*.tmp")))
        after = newest_step(out)
        assert after >= before, f"step {after} after step {before}"
        resumed += after > before
        steps_seen.append(after)
        print(f"kill {kills:3d}: the newest checkpoint is of step {after}, complete", flush=True)
    returncode = start(arguments).wait()
    assert returncode == 0, "the last start failed"
    tensors, log = end_state(out, args.steps)
    expected, expected_log = end_state(undisturbed, args.steps)
    same = tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )
    print(
        f"{kills} kills, {inside} of them inside of a save; "
        "after each the newest checkpoint was complete, and"
    )
    print(
        f"{resumed} runs had got further than the one before; "
        "the end equals the undisturbed run's bit for bit: ",
        end="",
    )
    print(f"tensors {same}, log {log == expected_log}")
    sys.exit(not (same and log == expected_log))


if __name__ == "__main__":
    main()
