"""Adapter files in PEFT's layout, in and out: adapter_config.json and adapter_model.safetensors.

    settings = read_config(folder / "adapter_config.json")             # rank, alpha, dropout, ...
    tensors = read_tensors(folder / "adapter_model.safetensors", notes)    # under our names
    check_tensors(path, tensors, shapes)                               # all faults in one message
    refuse_adapter(folder)                     # where a whole model is wanted
    write_config(path, settings)
    write_tensors(path, tensors, notes)

The layout is that of github.com/huggingface/peft (`LoraConfig`, `PeftModel.save_pretrained`).
Here are only dictionaries, tensors and paths; lora.py puts them into a model.

Axes: R rank.
"""

import json
import math
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from formats.files import InputError, read_json, write_whole

# Keys of adapter_config.json that may hold anything: we read them, or they say nothing about what
# a loaded LoRA computes.
HARMLESS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",  # the names of the tensors tell
    "exclude_modules",
    "layers_pattern",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
}

# Keys that may hold only these values. Any other key has to be absent, null, false or empty: a
# feature that we do not know could change what the adapter computes.
ALLOWED = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    # Other ways to start, such as PiSSA, change the base model too. PEFT can convert such a LoRA
    # to a plain one.
    "init_lora_weights": [True, "gaussian", "orthogonal", "eva"],
}

# The module's path inside PEFT's wrapper is that of new or old transformers, or of a bare language
# model:   model.language_model.layers.0   language_model.model.layers.0   model.layers.0
# SmolVLM's is model.text_model.layers.0.
# Some files also name the adapter: lora_A.default.weight.
STORED_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?(?:language_model\.|text_model\.)?(?:model\.)?"
    r"(layers\.\d+\.\w+\.\w+\.lora_[AB])"
    r"(?:\.default)?\.weight"
)


def our_name(stored: str) -> str:
    """PEFT's name of a LoRA tensor -> ours; a name that is none of PEFT's stays as it is."""
    match = STORED_NAME.fullmatch(stored)
    if match is None:
        return stored
    return f"language_model.{match[1]}.weight"


def peft_name(name: str, language_model: str = "language_model") -> str:
    """Our name of a LoRA tensor -> PEFT's, for the model of today's transformers.

    language_model: what that calls its language model."""
    return f"base_model.model.model.{language_model}." + name.removeprefix("language_model.")


# ---- adapter_config.json
def read_config(path: Path) -> dict:
    """The settings of a LoRA: {"rank": int, "alpha": float, "dropout": float, "use_rslora": bool}.

    Which layers have LoRA is told by the names of the tensors, not by this file.
    Raises InputError, with all faults in one message."""
    raw = {"peft_type": "missing"}
    raw.update(read_json(path))
    try:
        settings = {
            "rank": int(raw.get("r", 8)),
            "alpha": float(raw.get("lora_alpha", 8)),
            "dropout": float(raw.get("lora_dropout", 0)),
            "use_rslora": raw.get("use_rslora") is True,
        }
    except (ValueError, TypeError, OverflowError) as error:
        kind = type(error).__name__
        raise InputError(f"{path}: cannot be used ({kind}: {error})") from None
    faults = not_implemented(raw) + not_a_lora(settings)
    if faults:
        raise InputError(f"{path}: " + "; ".join(faults))
    return settings


def not_implemented(raw: dict) -> list[str]:
    """What a PEFT config asks for and this project does not have, a line a key."""
    faults = []
    for key, value in raw.items():
        if not value or key in HARMLESS:
            continue
        if value not in ALLOWED.get(key, []):
            faults.append(f"{key} is {value!r}, which is not implemented")
    return faults


def not_a_lora(settings: dict) -> list[str]:
    """The numbers that no LoRA can have."""
    faults = []
    if not 1 <= settings["rank"] <= 4096:
        faults.append(f"rank {settings['rank']} does not lie in [1, 4096]")
    if not math.isfinite(settings["alpha"]):
        faults.append(f"alpha {settings['alpha']} is not finite")
    if not 0 <= settings["dropout"] < 1:
        faults.append(f"dropout {settings['dropout']} does not lie in [0, 1)")
    return faults


def write_config(
    path: Path,
    settings: dict,
    targets: tuple[str, ...],
    language_model: str = "language_model",
) -> None:
    """Write adapter_config.json. `settings` are those of `read_config`, `targets` the names of the
    linear layers with LoRA, such as ("q_proj", "v_proj"); `language_model` as in `peft_name`."""
    raw = {
        "peft_type": "LORA",
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "use_rslora": settings["use_rslora"],
        "bias": "none",
        "inference_mode": True,
        # A regular expression: a plain list of names would also match layers of the vision tower.
        "target_modules": rf".*{language_model}.*\.({'|'.join(targets)})",
    }
    write_whole(path, json.dumps(raw, indent=2) + "\n")


# ---- Tensors, with notes on what they were trained on
def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None) -> None:
    """Write a safetensors file whose metadata hold the notes."""
    # All notes under one key: safetensors writes several keys in a random order.
    metadata = {"trained_on": json.dumps(notes or {})}
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        save_file(on_cpu, temporary, metadata=metadata)

    write_whole(path, save)


def read_tensors(path: Path, notes: dict[str, str] | None = None) -> dict[str, Tensor]:
    """All tensors of an adapter's file, under our names.

    Args:
        notes: what the caller has, such as {"base": hash of the model}. A file that holds notes
            must hold all of these, with the same values. PEFT's own files hold none.
    Raises InputError."""
    pickled = path.with_suffix(".bin")
    if not path.exists() and pickled.exists():
        found = f"{pickled}: pickle, which is never read"
        advice = f"load it with PEFT once and save it again: that writes {path.name}"
        raise InputError(f"{found}; {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            trained_on = dict(json.loads(metadata.get("trained_on", "{}")))
            stored = list(file.keys())
            tensors = {our_name(name): file.get_tensor(name) for name in stored}
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file of an adapter ({error})") from None
    # One tensor under its old and its new name, for example: either could be meant.
    if len(tensors) < len(stored):
        shown = sorted(stored)[:4]
        raise InputError(f"{path}: holds tensors twice, under different names: {shown}, ...")
    if trained_on:
        check_notes(path, trained_on, notes or {})
    return tensors


def check_notes(path: Path, trained_on: dict[str, str], notes: dict[str, str]) -> None:
    """Raise InputError where an adapter was trained on something else than it is loaded into."""
    faults = []
    for key, note in notes.items():
        if trained_on.get(key) != note:
            faults.append(f"{key} was {trained_on.get(key)!r} and is {note!r}")
    if faults:
        advice = "use the base model and prompts of training, or train anew"
        raise InputError(f"{path}: {'; '.join(faults)}; {advice}")


def without_idle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out LoRA that learned nothing (B = 0) outside of the language model.

    PEFT's usual list of targets, such as ["q_proj", "v_proj"], makes LoRA in the vision tower too.
    Where the tower was not trained it computes nothing, and we have no layer for it."""
    kept = {}
    for name, tensor in tensors.items():
        name_of_B = name.replace(".lora_A.", ".lora_B.")
        is_idle = ".lora_B." in name_of_B and name_of_B in tensors and not tensors[name_of_B].any()
        if name.startswith("language_model.") or not is_idle:
            kept[name] = tensor
    return kept


def check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple]) -> None:
    """Raise InputError unless the file `path` held exactly the tensors of `shapes`, by name."""
    faults = []
    for name in shapes:
        if name not in tensors:
            faults.append(f"missing: {name}")
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in shapes:
            faults.append(f"unexpected: {name}")
        elif shape != shapes[name]:
            faults.append(f"wrong shape: {name} {shape}, expected {shapes[name]}")
    if faults:
        shown = "\n  ".join(sorted(faults)[:20])
        raise InputError(f"{path}: does not fit this model\n  {shown}")


def refuse_adapter(folder: Path) -> None:
    """Raise InputError for a folder that holds adapters where a whole model is wanted."""
    if (folder / "config.json").exists():
        return
    if (folder / "training_state.json").exists() or folder.parent.name == "checkpoints":
        run = folder.parent.parent
        raise InputError(f"{folder}: a checkpoint of a run; give the run's folder, {run}")
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        advice = "merge it with PEFT's merge_and_unload, and give the folder of that"
        raise InputError(f"{folder}: an adapter (of {base}), not a model; {advice}")
