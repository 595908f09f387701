"""A run's folder and its checkpoints: at every moment the one that `latest` names is complete.

    runs/NAME/config.json  log.jsonl  results.json  retrieval.png
    runs/NAME/checkpoints/step-N/       the adapters, and all that it takes to go on exactly
    runs/NAME/checkpoints/latest        the name of the newest, replaced last

A killed process leaves at most a folder that ends in .tmp, which the next one removes.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from formats.files import InputError, read_json, sync, write_whole
from runtime.processes import everyone, rank, world_size

# All that a run may consist of: whatever else is in a folder is not ours to remove.
RUN_FILES = (
    "config.json",
    "log.jsonl",
    "results.json",
    "retrieval.png",
    "checkpoints",
    "embeddings",
)

# ---- The run's folder


def check_run_folder(out: Path) -> None:
    """Before anything is computed: may `out` be written, without touching what is not a run's?

    Raises InputError where it may not."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out}: is not a folder")
    foreign = []
    for path in out.glob("[!.]*"):
        name = re.sub(r"(\.\d+)?\.tmp$", "", path.name)  # half-written files of a run are a run's
        if name not in RUN_FILES:
            foreign.append(path.name)
    if (out / "checkpoints").is_symlink():
        raise InputError(f"--out {out}: holds a link, not a run of train.py; choose another folder")
    if foreign:
        found = sorted(foreign)[:3]
        raise InputError(
            f"--out {out}: holds {found}, not a run of train.py; choose another folder"
        )
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)


def start_run_folder(out: Path, config: dict, goes_on: bool) -> None:
    """Write config.json. Remove what was not finished; a former run too, unless it `goes_on`."""
    unfinished = [*out.glob("*.tmp"), *out.glob("checkpoints/*.tmp")]
    former = []
    if not goes_on:
        # config.json and `latest` first: half a run must not look like a whole one.
        former = [out / "config.json", out / "checkpoints" / "latest"]
        former += [out / name for name in RUN_FILES]
    for path in (*former, *unfinished):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / "checkpoints").mkdir(exist_ok=True)
    write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")


def newest(out: Path) -> Path | None:
    """The checkpoint that `latest` names, None before the first. Raises InputError."""
    latest = out / "checkpoints" / "latest"
    if not latest.exists():
        return None
    name = latest.read_bytes().decode("ascii", "replace").strip()
    if not name:
        return None
    if not re.fullmatch(r"step-\d+", name) or not (latest.parent / name).is_dir():
        raise InputError(f"{latest}: names {name[:50]!r}, which is not a checkpoint beside it")
    return latest.parent / name


def to_go_on_from(out: Path) -> Path | None:
    """The newest checkpoint, in every process the same; None before the first.

    Raises InputError where processes see different ones."""
    checkpoint = newest(out)
    names = everyone(checkpoint.name if checkpoint else None)
    if len(set(names)) > 1:
        raise InputError(
            f"--resume: not every process finds the same checkpoint in {out}; "
            "it must be a shared folder"
        )
    return checkpoint


# ---- Saving


def save(
    out: Path,
    step: int,
    learning: dict[str, nn.Parameter],
    loss_parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    write_adapter: Callable[[Path], None],
    notes: dict,
    keep: int,
) -> None:
    """Write checkpoints/step-N: first under another name, then renamed, then named by `latest`.

    Only then are older ones deleted, all but the newest `keep` (0: none is).

    Args:
        learning: all that is trained, by name; the optimizer's state of it is kept.
        loss_parameters: those of them that are in no adapter file, such as the temperature; their
            values are kept, too.
        write_adapter: writes the adapters into the folder that it is given.
        notes: what else is to be known of the checkpoint, see `notes`.
    Raises:
        InputError: where the disk has no room, before anything is touched."""
    # Every process takes part in this; the generators of GPUs start from the CPU's.
    states = everyone(torch.get_rng_state().tolist())
    if rank() > 0:
        return
    tensors = {"rng": torch.tensor(states).byte()}  # (processes, bytes)
    for name, parameter in loss_parameters.items():
        tensors[name] = parameter.detach().cpu()
    for name, parameter in learning.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value
    folder = out / "checkpoints" / f"step-{step}"
    temporary = out / "checkpoints" / f"step-{step}.tmp"
    free = shutil.disk_usage(out).free / 1e6
    needed = 1 + 2e-6 * sum(tensor.nbytes for tensor in tensors.values())
    if free < needed:
        last_good = newest(out)
        raise InputError(
            f"{folder}: {free:.1f} MB are free, {needed:.1f} needed; "
            f"last good checkpoint: {last_good}"
        )
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before `latest` named it
    write_adapter(temporary)
    save_file(tensors, temporary / "training_state.safetensors")
    state = {"step": step, "processes": world_size(), "torch": torch.__version__, **notes}
    (temporary / "training_state.json").write_text(json.dumps(state) + "\n")
    # Everything has reached the disk before the name says that it is there.
    for path in (*temporary.iterdir(), temporary, out / "log.jsonl"):
        sync(path)
    os.replace(temporary, folder)
    write_whole(folder.parent / "latest", folder.name + "\n")
    if keep:
        delete_all_but(keep, folder.parent, step)


def delete_all_but(keep: int, checkpoints: Path, step: int) -> None:
    """Delete old checkpoints, never the one of `step`, which was just saved."""
    steps = []
    for path in checkpoints.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            steps.append(int(number))
    # First go those BEHIND this step: an earlier run left them, and `latest` never named them.
    behind = sorted(number for number in steps if number > step)
    before = sorted(number for number in steps if number <= step)
    for old in (behind + before)[:-keep]:
        shutil.rmtree(checkpoints / f"step-{old}")


# ---- Going on


def notes(folder: Path) -> dict:
    """What `save` noted beside the tensors: the step, the seed, a fingerprint of the data, ..."""
    path = folder / "training_state.json"
    return read_json(path) if path.exists() else {}


def load(
    folder: Path,
    learning: dict[str, nn.Parameter],
    loss_parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Set the optimizer, the losses' parameters and the random numbers as they were.

    The adapters themselves are loaded before (lora.load_adapter). Returns the number of steps that
    were done. Raises InputError."""
    try:
        tensors = load_file(folder / "training_state.safetensors")
        for name, parameter in loss_parameters.items():
            if name not in tensors:
                raise ValueError(f"it holds no {name}; another loss made it")
            parameter.data.copy_(tensors[name])
        for name, parameter in learning.items():
            if f"{name}.step" in tensors:  # else it never had a gradient
                optimizer.state[parameter] = optimizer_state(name, parameter, tensors)
        states = tensors["rng"]
        if len(states) == world_size():  # another number of processes draws anew
            # A copy: torch would read a view from the start of its storage.
            torch.set_rng_state(states[rank()].clone())
        return int(folder.name.removeprefix("step-"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        kind = type(error).__name__
        raise InputError(f"{folder}: cannot go on from it ({kind}: {error})") from None


def optimizer_state(name: str, parameter: nn.Parameter, tensors: dict) -> dict:
    """AdamW's state of one parameter. Raises ValueError where it is of another shape."""
    step = tensors[f"{name}.step"]  # stays on the CPU, as AdamW keeps it
    mean = tensors[f"{name}.exp_avg"]
    square = tensors[f"{name}.exp_avg_sq"]
    if step.shape != () or mean.shape != parameter.shape or square.shape != parameter.shape:
        raise ValueError(f"{name} has another shape")
    device = parameter.device
    return {"step": step, "exp_avg": mean.to(device), "exp_avg_sq": square.to(device)}
