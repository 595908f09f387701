"""Hugging Face model folders, in and out: config.json, stop tokens, safetensors weights.

    config = read_llava_config(folder, LlavaConfig, VisionConfig, TextConfig)
    found = find_llava_tensors(folder, shapes, config)         # all names and shapes are right
    for name, tensor in read_tensors(found, dtype, device): ...
    write_llava(folder, tensors, config_json, stop_tokens, max_shard_bytes)

The files are data from strangers: whatever cannot be used is refused by name, before weights are
read; nothing is executed, and pickle is never opened. Dataclasses, dictionaries, tensors and paths
go in and out, never a model.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from formats.files import InputError, read_json, what_it_may_be, write_whole

# What an absent key of config.json means in transformers, where it is not the default of our
# dataclasses (which are those of CLIP and LLaMA). The keys are the values of model_type we know.
VISION_DEFAULTS = {
    "clip_vision_model": {},
    "siglip_vision_model": {
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
TEXT_DEFAULTS = {
    "llama": {},
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}
# Where text_config names no stop token: LLaMA's is </s>, Qwen2 has no default.
DEFAULT_STOP_TOKENS = {"llama": (2,)}

# Larger sizes are mistakes, and could not even be multiplied.
LARGEST_INTEGER = 2**20
LARGEST_FLOAT = 2**40
MOST_LAYERS = 1000

FLOATING_POINT = ("F64", "F32", "F16", "BF16")  # safetensors' names
REOPEN_AFTER = 2**24  # bytes read from one opening of a file
MOST_FAULTS_SHOWN = 30


# ---- config.json ----
def read_config(folder: Path, supported: Collection[str]) -> dict:
    """config.json, if its model_type is one of `supported`. Raises InputError."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a Hugging Face LLaVA folder has this file")
    raw = read_json(path)
    refuse_unsupported(path, raw, supported)
    return raw


def refuse_unsupported(path: Path, raw: dict, supported: Collection[str]) -> None:
    """Raise InputError for layouts and models that cannot be read, with what to use instead."""
    # The repository haotian-liu/LLaVA writes other names, and its files are pickled.
    if "mm_vision_tower" in raw or "LlavaLlamaForCausalLM" in str(raw.get("architectures")):
        raise InputError(
            f"{path}: the original layout is pickled; "
            "use a Hugging Face conversion, such as llava-hf/llava-1.5-7b-hf"
        )
    model_type = raw.get("model_type")
    if model_type not in supported:
        known = ", ".join(repr(name) for name in supported)
        raise InputError(
            f"{path}: model_type is {model_type!r}; only {known} is supported ('llava' is "
            "LLaVA-1.5 and the interleave models, not LLaVA-NeXT)"
        )
    # MLX's conversions have the shorter key.
    if raw.get("quantization_config") or raw.get("quantization"):
        raise InputError(
            f"{path}: the weights are quantised; use the fp16, bf16 or fp32 checkpoint"
        )


def read_llava_config(
    folder: Path, llava_class, vision_class, text_class, model_type: str = "llava"
):
    """Read the config.json and generation_config.json of a LLaVA folder into three dataclasses.

    llava_class: has the fields `vision` and `text`, of the other two classes, and
    `eos_token_ids`; the other fields are keys of config.json. Returns a llava_class.
    Raises InputError for keys of a wrong type and for what is not implemented."""
    path = folder / "config.json"
    raw = read_config(folder, supported=(model_type,))
    if isinstance(raw.get("vision_feature_layer"), list):
        raise InputError(f"{path}: vision_feature_layer is a list; only one is supported")

    # Without a vision_config, the tower is LLaVA-1.5's, as the dataclass starts. Keys absent inside
    # of a vision_config mean something else: plain CLIP's defaults.
    default = llava_class()
    vision = default.vision
    if raw.get("vision_config") is not None:
        vision = read_section(vision_class, path, "vision_config", raw, VISION_DEFAULTS)
    text = default.text
    if raw.get("text_config") is not None:
        text = read_section(text_class, path, "text_config", raw, TEXT_DEFAULTS)
    # A tied head is announced at either level, and saving may write a wrong `false` at the other.
    if raw.get("tie_word_embeddings") is True:
        text.tie_word_embeddings = True

    values = dict(raw)
    # The key's old name; the new one wins.
    if raw.get("image_token_id") is None:
        values["image_token_id"] = raw.get("image_token_index")
    values["vision"] = vision
    values["text"] = text
    values["eos_token_ids"] = read_stop_tokens(folder, raw.get("text_config") or {})
    return fill(llava_class, values, f"{path}: ", known=("vision", "text", "eos_token_ids"))


def read_section(cls, path: Path, name: str, raw: dict, defaults: dict[str, dict]):
    """Fill the dataclass `cls` from the object `name` inside config.json. Raises InputError.

    defaults: what an absent key means, for every model_type that is supported."""
    section = raw[name]
    where = f"{path}: {name}."
    if not isinstance(section, dict):
        raise InputError(f"{path}: {name} is {section!r}, expected an object")
    model_type = section.get("model_type")
    if model_type is None:
        model_type = cls.model_type
    if not isinstance(model_type, str) or model_type not in defaults:
        known = " and ".join(defaults)
        raise InputError(f"{where}model_type is {model_type!r}, supported are {known}")
    if section.get("use_sliding_window"):
        raise InputError(f"{where}use_sliding_window is on; sliding windows are not implemented")
    # The model_type's own defaults lie under what the file says.
    values = dict(defaults[model_type])
    values.update(section)
    values["model_type"] = model_type
    values["rope_theta"], values["rope_scaling"] = read_rope(where, section)
    return fill(cls, values, where)


def read_rope(where: str, section: dict) -> tuple:
    """The base of the rotary angles, and Llama-3.1's scaling of them; None where there is none.

    Old files have `rope_theta` and perhaps `rope_scaling`, new ones `rope_parameters`.
    Raises InputError for other scalings."""
    theta = section.get("rope_theta")
    scaling = None
    for key in ("rope_scaling", "rope_parameters"):
        rope = section.get(key) or {}
        if is_llama3_rope(rope):
            scaling = {name: rope[name] for name in LLAMA3_ROPE}
            scaling["rope_type"] = "llama3"
        elif not is_plain_rope(rope):
            raise InputError(
                f"{where}{key} is {rope!r}; only plain rotary embeddings and Llama-3.1's "
                "('llama3') are implemented"
            )
        # The newer key wins where a file has both.
        theta = rope.get("rope_theta", theta)
    return theta, scaling


LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def is_llama3_rope(rope) -> bool:
    if not isinstance(rope, dict) or "llama3" not in (rope.get("rope_type"), rope.get("type")):
        return False
    numbers = [rope.get(name) for name in LLAMA3_ROPE]
    for number in numbers:
        if type(number) not in (int, float) or not 0 < number <= LARGEST_FLOAT:
            return False
    _, low, high, _ = numbers
    return low < high


def is_plain_rope(rope) -> bool:
    if not isinstance(rope, dict) or "factor" in rope:
        return False
    # The kind's name is `type` in older files.
    plain = (None, "default")
    return rope.get("rope_type") in plain and rope.get("type") in plain


def fill(cls, values: dict, where: str, known: Collection[str] = ()):
    """A dataclass with the values of a JSON object; absent and null keys keep their defaults.

    known: fields whose values are checked already. Raises InputError for a wrong type or size,
    which names `where` and the field."""
    arguments = {}
    for field in fields(cls):
        value = values.get(field.name)
        # transformers writes null for "as by default".
        if value is None:
            continue
        if field.name not in known and not fits(field, value):
            expected = getattr(field.type, "__name__", field.type)
            raise InputError(f"{where}{field.name} is {value!r}, expected {expected}")
        arguments[field.name] = value
    return cls(**arguments)


def fits(field: Field, value) -> bool:
    """Whether a JSON value is of a field's type and, where it is a size, a possible one."""
    # Python takes True for the integer 1, so bool comes first.
    if isinstance(value, bool) or field.type is bool:
        return isinstance(value, bool) and field.type is bool
    if field.type is float:
        return isinstance(value, int | float) and 0 < value <= LARGEST_FLOAT
    if not isinstance(value, field.type):
        return False
    # Ids and layers may be 0 or negative; `check_llava_config` looks at those that matter.
    is_size = isinstance(value, int) and not field.name.endswith(("_id", "_layer"))
    return not is_size or 0 < value <= LARGEST_INTEGER


def read_stop_tokens(folder: Path, text_config: dict) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, else text_config's, else a default."""
    path = folder / "generation_config.json"
    value = None
    if path.exists():
        value = read_json(path).get("eos_token_id")
    if value is None:
        path = folder / "config.json"
        value = text_config.get("eos_token_id")
    if value is None:
        return DEFAULT_STOP_TOKENS.get(text_config.get("model_type") or "llama", ())
    ids = value if isinstance(value, list) else [value]
    # Not isinstance: True would pass for an integer.
    if not all(type(index) is int for index in ids):
        raise InputError(
            f"{path}: eos_token_id is {value!r}, expected an integer or a list of them"
        )
    return tuple(ids)


def check_llava_config(folder: Path, config, activations: Collection[str]) -> None:
    """Raise InputError, with all faults, for sizes that do not fit together."""
    layer = config.vision_feature_layer
    strategy = config.vision_feature_select_strategy
    faults = vision_faults(config.vision, activations) + text_faults(config.text)
    if config.projector_hidden_act not in activations:
        faults.append(f"projector_hidden_act {config.projector_hidden_act!r} is unknown")
    if strategy not in ("default", "full"):
        faults.append(f"vision_feature_select_strategy {strategy!r} is unknown")
    # Layer 0 would be the tower's input, before any layer.
    if not 0 < abs(layer) <= config.vision.num_hidden_layers:
        faults.append(f"no vision layer {layer}")
    refuse_faults(folder, config, faults)


def vision_faults(vision, activations: Collection[str]) -> list[str]:
    """What does not fit in a CLIP or SigLIP tower's sizes."""
    faults = []
    if vision.hidden_act not in activations:
        faults.append(f"vision_config.hidden_act {vision.hidden_act!r} is unknown")
    if vision.hidden_size % vision.num_attention_heads != 0:
        faults.append(f"vision heads do not divide {vision.hidden_size}")
    # An image must hold a patch at least; a rest at its right and bottom is cut off.
    if vision.patch_size > vision.image_size:
        faults.append(f"patch_size {vision.patch_size} > image_size {vision.image_size}")
    if vision.num_hidden_layers > MOST_LAYERS:
        faults.append(f"more than {MOST_LAYERS} layers")
    return faults


def text_faults(text) -> list[str]:
    """What does not fit in a language model's sizes."""
    faults = []
    # The language model's MLP is SwiGLU, whose activation is part of the name.
    if text.hidden_act != "silu":
        faults.append(f"text_config.hidden_act {text.hidden_act!r} is not 'silu'")
    if text.num_attention_heads % text.num_key_value_heads != 0:
        faults.append(f"{text.num_key_value_heads} key/value heads do not fit")
    # Rotary embeddings turn pairs of numbers, half a head apart.
    if text.head_dim % 2 != 0 or text.head_dim == 0:
        faults.append(f"head_dim {text.head_dim} is not even, rotary embeddings need it")
    if text.num_hidden_layers > MOST_LAYERS:
        faults.append(f"more than {MOST_LAYERS} layers")
    return faults


def refuse_faults(folder: Path, config, faults: list[str]) -> None:
    """Raise InputError with these faults and those that every backbone can have."""
    if not 0 < config.image_token_id < config.text.vocab_size:
        faults.append(f"image_token_index {config.image_token_id} is not a token")
    if faults:
        raise InputError(f"{folder / 'config.json'}: " + "; ".join(faults))


def llava_config_to_dict(config) -> dict:
    """The content of the config.json that describes a LLaVA to transformers."""
    text = dict(vars(config.text))
    text["eos_token_id"] = config.eos_token_ids[0] if config.eos_token_ids else None
    vision = dict(vars(config.vision))
    vision["vision_use_head"] = False  # LLaVA has no pooling head
    return {
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.num_image_tokens,
        "vision_config": vision,
        "text_config": text,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def llava_processor_keys(config) -> dict:
    """The keys of processor_config.json that follow from a LLaVA's config.json."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": int(config.vision.is_clip),  # its class token
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }


# ---- Names ----
def canonical_name(name: str) -> str:
    """Any of the four layouts in the wild -> the names of `Llava.state_dict()`.

    layout  language model               head                    vision tower
    old     language_model.model.layers  language_model.lm_head  vision_tower.vision_model.
    new     model.language_model.layers  lm_head                 model.vision_tower.vision_model.
    newest  model.language_model.layers  lm_head                 model.vision_tower.
    mixed   language_model.model.layers  language_model.lm_head  vision_tower.
    ours    language_model.layers        lm_head                 vision_tower.

    The projector is multi_modal_projector in all of them, after `model.` in new and newest."""
    name = re.sub(r"^model\.(?=(language_model|vision_tower|multi_modal_projector)\.)", "", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def old_name(name: str) -> str:
    """Our names -> the old layout, which every version of transformers reads."""
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    name = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def is_unused(name: str, config) -> bool:
    """Tensors that checkpoints hold and LLaVA never reads, by their canonical name."""
    # Vision layers after the feature layer.
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d{1,4})\.", name)
    if layer:
        return config.num_vision_layers <= int(layer[1]) < config.vision.num_hidden_layers
    # What follows the vision layers in CLIP and SigLIP, and two buffers that are computed here.
    if re.match(r"vision_tower\.(post_layernorm|head)\.", name):
        return True
    return name.endswith((".rotary_emb.inv_freq", ".position_ids"))


# ---- Reading weights ----
def open_weights(path: Path):
    """A safetensors file, open: a context manager. Raises InputError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        advice = what_it_may_be(path)
        raise InputError(f"{path}: not a safetensors file ({error}); {advice}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the one file, else the shards that the index names.

    That is transformers' order. Raises InputError where there are none or some are missing."""
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        others = sorted(path.name for path in folder.glob("*.*") if path.suffix != ".json")
        found = ", ".join(others[:5]) or "nothing"
        raise InputError(
            f"{folder}: no model.safetensors(.index.json), only: {found}. Pickle (.bin) is never "
            "read: get the safetensors version, or convert with transformers"
        )
    weight_map = read_json(index).get("weight_map")
    shards = []
    if isinstance(weight_map, dict):
        shards = sorted({str(shard) for shard in weight_map.values()})
    # Plain file names only: no path of a stranger may lead out of the folder.
    are_plain = all(re.fullmatch(r"[^/\\:]+\.safetensors", shard) for shard in shards)
    if not shards or not are_plain:
        raise InputError(
            f"{index}: weight_map must name safetensors files in this folder, not {shards}"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(shards)} shards missing, download them: {missing}"
        )
    return [folder / shard for shard in shards]


def tensor_headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and precision of every tensor in a file, by name, without reading their numbers."""
    headers = {}
    with open_weights(path) as file:
        names = file.keys()
        for name in names:
            header = file.get_slice(name)
            headers[name] = (tuple(header.get_shape()), header.get_dtype())
    return headers


def find_llava_tensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], config
) -> dict[str, tuple[Path, str]]:
    """`find_tensors` for LLaVA's four layouts; a head that is tied may be absent."""
    optional = ("lm_head.weight",) if config.text.tie_word_embeddings else ()
    unused = partial(is_unused, config=config)
    return find_tensors(folder, shapes, canonical_name, unused, optional)


def find_tensors(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    rename: Callable[[str], str],
    is_unused: Callable[[str], bool],
    optional: Collection[str] = (),
) -> dict[str, tuple[Path, str]]:
    """Where each tensor of a model lies: its name -> the file, and the name in there.

    shapes: the tensors that the model has, by name. rename: stored names -> the model's names.
    is_unused: of the model's names, what may be in the files and is not wanted. optional: what may
    be absent. Only names and shapes are read.
    Raises InputError that lists all tensors missing, unexpected, there twice, or mis-shaped."""
    found = {}
    faults = []
    for path in weight_files(folder):
        for stored, (shape, kind) in tensor_headers(path).items():
            name = rename(stored)
            if is_unused(name):
                continue
            # Not one fault among many: the packed tensors of such files all look wrong.
            if kind not in FLOATING_POINT:
                raise InputError(
                    f"{path}: {stored} is {kind}: quantised; use the fp16, bf16 or fp32 original"
                )
            if name not in shapes:
                faults.append(f"unexpected: {stored} {shape}")
            if name in found:
                faults.append(f"twice: {stored} {shape}")
            if shape != shapes.get(name, shape):
                faults.append(f"not of shape {shapes[name]}: {stored} {shape}")
            found[name] = (path, stored)
    # What a file lacks would otherwise stay as it was initialised: at random.
    for name, shape in shapes.items():
        if name not in found and name not in optional:
            faults.append(f"missing: {name} {shape}")
    if faults:
        shown = faults[:MOST_FAULTS_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more")
        lines = "\n  ".join(shown)
        raise InputError(f"{folder}: {len(faults)} tensors do not fit config.json\n  {lines}")
    return found


def read_tensors(
    found: dict[str, tuple[Path, str]],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read what `find_tensors` found, one tensor after the other: (name, tensor).

    On the CPU, a tensor that is of `dtype` already (or of any, where dtype is None) is a view of
    the mapped file: only what is converted is copied."""
    opened = None
    bytes_read = 0
    for name, (path, stored) in found.items():
        # What was read of a file counts as this process's memory until the file is closed.
        if path != opened or bytes_read > REOPEN_AFTER:
            file = open_weights(path)
            opened = path
            bytes_read = 0
        tensor = file.get_tensor(stored).to(device=device, dtype=dtype)
        bytes_read += tensor.nbytes
        yield name, tensor


# ---- Writing ----
def write_llava(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict,
    stop_tokens: list[int],
    max_shard_bytes: int,
) -> None:
    """Write a new LLaVA folder.

    tensors: by the names of `Llava.state_dict()`; the rest as in `write_folder`."""
    # transformers wants the norm after the vision tower, though LLaVA never applies it: here is
    # one that does nothing.
    width = config["vision_config"]["hidden_size"]
    dtype = tensors["lm_head.weight"].dtype
    tensors = dict(tensors)
    tensors["vision_tower.post_layernorm.weight"] = torch.ones(width, dtype=dtype)
    tensors["vision_tower.post_layernorm.bias"] = torch.zeros(width, dtype=dtype)
    stored = stored_tensors(tensors, old_name, config)
    write_folder(folder, stored, config, stop_tokens, max_shard_bytes)


def stored_tensors(
    tensors: dict[str, torch.Tensor], rename: Callable[[str], str], config: dict
) -> dict[str, torch.Tensor]:
    """A model's tensors as they are stored. rename: the model's names -> those of the file."""
    stored = dict(tensors)
    # A tied head is the embedding; stored twice, it would be read as two.
    if config["tie_word_embeddings"]:
        stored.pop("lm_head.weight")
    return {rename(name): tensor for name, tensor in stored.items()}


def write_folder(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict,
    stop_tokens: list[int],
    max_shard_bytes: int,
) -> None:
    """Write a new folder: weights, generation_config.json, and config.json last.

    tensors: by the names in the file; config: the content of config.json.
    Raises FileExistsError where there are weights already."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("model*.safetensors")):
        raise FileExistsError(f"{folder}: holds a model already; choose a new folder")
    write_weights(folder, tensors, max_shard_bytes)
    write_settings(folder / "generation_config.json", {"eos_token_id": stop_tokens})
    # config.json last: where it stands, the folder is complete.
    write_settings(folder / "config.json", config)


def write_settings(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    """model.safetensors or, where that would be too large, shards and their index."""
    shards = split_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    # Shards are numbered from 1, as transformers does.
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        for name in shard:
            weight_map[name] = file
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_settings(folder / "model.safetensors.index.json", index)


def split_shards(
    tensors: dict[str, torch.Tensor], max_shard_bytes: int
) -> list[dict[str, torch.Tensor]]:
    """Cut the tensors, in their order, into shards; one that is too large gets its own."""
    shards = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        # safetensors writes no views with gaps.
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    return shards
