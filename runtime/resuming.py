"""A run that is used, or that goes on: what its folder says, checked.

A run that goes on must be the same run: the same settings, the same data, the same tests. What
differs is refused, with what to do; what was measured of the untrained model is used again.
"""

import hashlib
import os
from pathlib import Path

from formats.files import InputError, find_folder, read_json
from runtime.checkpoints import newest, notes

# Settings that name files. They may be others where the old ones are gone: fingerprints tell
# whether what is there now is what was there.
PATHS = ("model", "data", "image_root", "tests")


def read_run(run: Path) -> tuple[dict, Path]:
    """A run that is to be used -> what says how its model is built, and its newest checkpoint.

    The former holds "model", "image_prompt", "text_prompt", "int8" and "max_pixels".
    Raises InputError."""
    path = run / "config.json"
    settings = read_json(path)
    model = settings.get("model")
    if isinstance(model, str) and find_folder(model) is None:
        advice = 'if it has moved, write its new place under "model" in there'
        raise InputError(f"{path}: the base model {model} is gone; {advice}")
    checkpoint = newest(run)
    found = {}
    for name in ("model", "image_prompt", "text_prompt"):
        found[name] = settings.get(name)
    if checkpoint is None or not all(isinstance(text, str) for text in found.values()):
        needed = "config.json, checkpoints/latest"
        raise InputError(f"{run}: not a complete run of train.py ({needed})")
    found["int8"] = settings.get("int8") is True
    found["max_pixels"] = settings.get("max_pixels", 0)  # absent in older runs
    if type(found["max_pixels"]) is not int:
        raise InputError(f"{path}: max_pixels is {found['max_pixels']!r}")
    return found, checkpoint


def is_gone(path: str, root: Path) -> bool:
    """Whether a path leads nowhere, from here and from `root`."""
    if path in ("", "none"):
        return False
    # os.path: it takes any text, such as a name that is too long.
    return not os.path.exists(path) and not os.path.exists(os.path.join(root, path))


def read_settings(
    path: Path, types: dict[str, type], given: dict, may_change: set[str], root: Path
) -> dict:
    """A run's settings, from its config.json. Raises InputError where `given` contradicts them.

    Args:
        types: of each setting, by name.
        given: the flags of the command that goes on.
        may_change: settings that may be others than the run's.
        root: where relative paths are looked for, beside the current folder."""
    saved = read_json(path)
    if "steps" not in saved:
        raise InputError(f"{path}: has no steps, so it is not a run's config.json")
    faults = []
    for name, value in saved.items():
        is_whole_number = types.get(name) is float and type(value) is int
        if type(value) is not types.get(name) and not is_whole_number:
            faults.append(f"{path} has {name} = {value!r}, which is not a setting")
        elif name in PATHS and is_gone(value, root):
            if name not in given:
                faults.append(f"{name} {value} is gone; if it has moved, say --{name} NEW_PLACE")
        elif name in given and name not in may_change and given[name] != value:
            faults.append(f"--{name} is {given[name]!r}, the run in {path.parent} has {value!r}")
    for name in types.keys() - saved.keys():
        # What its default does now, that run did not do.
        faults.append(f"{path} lacks {name}, which this version of train.py has; set it there")
    if faults:
        found = "; ".join(faults)
        advice = "or choose another --out"
        if any(name not in may_change for name in given):
            advice = f"leave these flags out, {advice}"
        raise InputError(f"--resume: {found}; {advice}")
    saved.pop("changed_data", None)  # said once, it holds for that one time
    return saved


def refuse_changed_data(checkpoint: Path, path: str, now: dict, is_wanted: bool) -> None:
    """Raise InputError where a run would go on with other data than it began with.

    (Another base model, or other prompts, are refused when the adapters are loaded.)

    Args:
        path, now: the data and its fingerprint.
        is_wanted: say it, and go on."""
    before = notes(checkpoint).get("data")
    if not isinstance(before, dict) or before == now:
        return  # checkpoints of old have no fingerprint
    changed = [name for name in now if before.get(name) != now[name]]
    found = f"{path}: its {' and '.join(changed)} have changed since {checkpoint}"
    if is_wanted:
        print(f"--changed_data: {found}; batches are others from here on")
        return
    advice = "get the old ones back, or go on with the new ones: --changed_data"
    raise InputError(f"--resume: {found}; {advice}")


def measured_before(out: Path, digest: str) -> dict | None:
    """What an earlier process has measured of the untrained model, if it has, on the same tests."""
    path = out / "results.json"
    if not path.exists():
        return None
    results = read_json(path)
    before = results.get("untrained")
    # Two tables of different tests have no difference.
    if not isinstance(before, dict) or results.get("tests", digest) != digest:
        return None
    return before


def digest_of_tests(tests: str) -> str:
    """SHA-256 of a tests.json and of the files that it names; "" where there is none."""
    if not tests:
        return ""
    files = [Path(tests)]
    for settings in read_json(tests).values():
        if isinstance(settings, dict) and isinstance(settings.get("file"), str):
            file = Path(tests).parent / settings["file"]
            files += sorted(file.glob("*.json")) if file.is_dir() else [file]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():  # who reads it says what is missing
            digest.update(file.read_bytes())
    return digest.hexdigest()
