"""The trainable part: LoRA on the language model's linear layers, and two soft prompts. Everything else is frozen.

    freeze(model)
    quantize(model)                            # if memory is short: the frozen linear layers in int8
    add_lora(model, LoRAConfig(rank=16, alpha=16))
    add_soft_prompts(model, layout.image_prompt, layout.text_prompt)
    trainable_parameters(model)                # what the optimizer gets
    with adapters_disabled(model): ...         # bitwise the base model
    save_adapter(model, folder)                # PEFT's layout; the soft prompts lie beside it

LoRA: arXiv 2106.09685. Soft prompts start as the embeddings of the hand-written prompts, as in the paper.
Axes: B batch, T tokens, N all of them, D hidden, R rank, P prompt tokens, V vocabulary.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.autograd.function import once_differentiable

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterError(ValueError):
    """An adapter that cannot be used; the message names the file, what was found and what to do."""


@dataclass
class LoRAConfig:
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] = TARGETS  # names of linear layers inside the language model's blocks
    use_rslora: bool = False  # scale by alpha / sqrt(rank): arXiv 2312.03732

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Int8Linear(nn.Module):
    """A frozen linear layer in int8, each row in steps of its own: W = weight * absmax / 127 (LLM.int8(), arXiv
    2208.07339, without outliers). Whole weights exist one layer at a time, in the forward and the backward pass."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        absmax = base.weight.detach().abs().amax(dim=1, keepdim=True)  # (out, 1)
        steps = base.weight.detach().float() / (absmax / 127).float().clamp(min=1e-30)
        self.weight = nn.Parameter(steps.round_().clamp_(-127, 127).to(torch.int8), requires_grad=False)
        self.absmax, self.bias = nn.Parameter(absmax, requires_grad=False), base.bias

    def forward(self, x):
        return frozen_linear(x, self.weight, self.absmax, self.bias)


def dequantize(weight, absmax, dtype: torch.dtype):
    """An int8 weight (out, in) as `dtype`; one without absmax as it is."""
    return weight if absmax is None else weight.to(dtype).mul_((absmax / 127).to(dtype))


def frozen_linear(x, weight, absmax, bias):
    """x (..., in) through a frozen weight, in int8 where there is an absmax -> (..., out)."""
    if absmax is None or torch.compiler.is_compiling():  # the compiler makes cheap things twice by itself
        return F.linear(x, dequantize(weight, absmax, x.dtype), bias)
    rank_0 = x.new_empty(0, weight.shape[1]), x.new_empty(weight.shape[0], 0)
    return LeanLoRA.apply(x, getattr(x, "recipe", None), 0.0, weight, absmax, bias, *rank_0)[0]


class LoRALinear(nn.Module):
    """y = W x + scale * B A dropout(x), with W frozen. B starts at zero, so that training starts at the base model."""

    def __init__(self, base: nn.Linear | Int8Linear, config: LoRAConfig):
        super().__init__()
        self.weight, self.absmax, self.bias = base.weight, getattr(base, "absmax", None), base.bias
        self.config, self.enabled = config, True
        (out_features, in_features), device = base.weight.shape, base.weight.device
        # In fp32 whatever the base is in: small, and the sum of many small steps.
        self.lora_A = nn.Linear(in_features, config.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(config.rank, out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.project(x, [self])[0]

    def project(self, x, layers: list["LoRALinear"]):
        """One input through several layers, all LoRALinear of one config: x (..., in) -> a list of (..., out)."""
        if not self.enabled:
            return [frozen_linear(x, layer.weight, layer.absmax, layer.bias) for layer in layers]
        # Computed in the base's precision; the casts hand the gradients on in fp32, where they are summed up.
        learned = [(layer.lora_A.weight.to(x.dtype), layer.lora_B.weight.to(x.dtype)) for layer in layers]
        tensors = [(layer.weight, layer.absmax, layer.bias, *pair) for layer, pair in zip(layers, learned)]
        dropout = self.config.dropout if self.training else 0.0
        trains = any(tensor is not None and tensor.requires_grad for each in tensors for tensor in each[:3])
        if dropout or (trains and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return [lora_linear(x, *each, self.config.scale, dropout) for each in tensors]
        return LeanLoRA.apply(x, getattr(x, "recipe", None), self.config.scale, *(t for each in tensors for t in each))


def lora_linear(x, weight, absmax, bias, A, B, scale: float, dropout: float = 0.0):
    """The reference. x (..., in), weight (out, in), absmax (out, 1) or None, A (R, in), B (out, R) -> (..., out)."""
    return frozen_linear(x, weight, absmax, bias) + scale * F.linear(F.linear(F.dropout(x, dropout), A), B)


class LeanLoRA(torch.autograd.Function):
    """`lora_linear` of several layers with one input, for frozen weights and without dropout. Sums are made inside of
    matrix products, and an input with a recipe (see model.py) is not kept for the backward pass but made again.

    y = x W' + s (x A') B'    dB = s dy' (x A')    dA = s (dy B)' x    dx = dy W + s (dy B) A"""

    @staticmethod
    def forward(ctx, x, recipe, scale, *tensors):
        weights, absmaxes, biases, As, Bs = (tensors[i::5] for i in range(5))  # they come one layer after another
        ctx.make_x, sources = recipe or (lambda x: x, [x])
        A, rows = torch.cat(As), x.flatten(0, -2)  # the A's of all layers are one (layers * R, in), x is (N, in)
        down = rows @ A.T
        ctx.scale, ctx.shape, ctx.layers = scale, x.shape, len(weights)
        ctx.save_for_backward(down, A, *weights, *absmaxes, *Bs, *(source.detach() for source in sources))
        ys = []
        for weight, absmax, bias, B, part in zip(weights, absmaxes, biases, Bs, down.chunk(ctx.layers, dim=1)):
            y = F.linear(rows, dequantize(weight, absmax, x.dtype), bias).addmm_(part, B.T, alpha=scale)
            ys.append(y.unflatten(0, x.shape[:-1]))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        down, A, *rest = ctx.saved_tensors
        weights, absmaxes, Bs = (rest[i * ctx.layers : (i + 1) * ctx.layers] for i in range(3))
        rows = ctx.make_x(*rest[3 * ctx.layers :]).flatten(0, -2)
        dys = [dy.flatten(0, -2) for dy in dys]  # (N, out) each
        d_down = torch.cat([dy @ B for dy, B in zip(dys, Bs)], dim=1).mul_(ctx.scale)  # (N, layers * R)
        dAs = (d_down.T @ rows).chunk(ctx.layers)
        dBs = [(dy.T @ part).mul_(ctx.scale) for dy, part in zip(dys, down.chunk(ctx.layers, dim=1))]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = d_down @ A
            for dy, weight, absmax in zip(dys, weights, absmaxes):
                dx.addmm_(dy, dequantize(weight, absmax, dy.dtype))
            dx = dx.view(ctx.shape)
        return dx, None, None, *(d for dA, dB in zip(dAs, dBs) for d in (None, None, None, dA, dB))


class SoftPrompt(nn.Module):
    """A token embedding with learnable rows behind the vocabulary: id V + i is token i of the two prompts. They start
    as the embeddings of the hand-written prompts' tokens; disabled, they are exactly those."""

    def __init__(self, base: nn.Embedding, image_prompt: list[int], text_prompt: list[int]):
        super().__init__()
        self.weight, self.enabled = base.weight, True
        prompt_ids = torch.tensor(image_prompt + text_prompt, device=base.weight.device)
        self.register_buffer("prompt_ids", prompt_ids, persistent=False)
        rows = base.weight.detach()[prompt_ids].float()
        self.image, self.text = (nn.Parameter(p.clone()) for p in rows.split([len(image_prompt), len(text_prompt)]))

    def forward(self, input_ids):
        """input_ids (B, T) in [0, V + P) -> (B, T, D)."""
        row = input_ids - len(self.weight)
        is_soft, row = row >= 0, row.clamp(min=0)
        if not self.enabled:
            return F.embedding(torch.where(is_soft, self.prompt_ids[row], input_ids), self.weight)
        embeddings = F.embedding(input_ids.masked_fill(is_soft, 0), self.weight)
        soft = F.embedding(row, torch.cat([self.image, self.text]).to(self.weight.dtype))
        return torch.where(is_soft[..., None], soft, embeddings)


def freeze(model: nn.Module) -> None:
    """No parameter that is there now gets a gradient; what is added later does."""
    model.requires_grad_(False)


def quantize(model: nn.Module) -> None:
    """Hold the linear layers of the language model's blocks in int8, in place; before `add_lora`. Embedding, head,
    projector and vision tower stay as they are: LLaVA-1.5-7B shrinks to 0.54 of its bf16 weights."""
    for part in list(model.language_model.layers.modules()):
        for name, layer in part.named_children():
            if isinstance(layer, nn.Linear):
                setattr(part, name, Int8Linear(layer))


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Replace the targeted linear layers of `model.language_model` by LoRALinear, in place; weights are shared.
    Raises AdapterError where there is LoRA already, or none of the targets."""
    parts = model.language_model.layers.modules()
    targets = [(part, name) for part in parts for name in config.targets if hasattr(part, name)]
    if not targets or any(isinstance(getattr(part, name), LoRALinear) for part, name in targets):
        raise AdapterError(f"LoRA on {config.targets}: the language model has none of these, or has LoRA already")
    for part, name in targets:
        setattr(part, name, LoRALinear(getattr(part, name), config))


def add_soft_prompts(model: nn.Module, image_prompt: list[int], text_prompt: list[int]) -> None:
    """Give the ids from the vocabulary's end on to two soft prompts that start as these hand-written tokens."""
    model.language_model.embed_tokens = SoftPrompt(model.language_model.embed_tokens, image_prompt, text_prompt)


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """All LoRALinear and SoftPrompt modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear | SoftPrompt)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer gets, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapters_disabled(model: nn.Module):
    """Inside, the model computes exactly what it did before anything was added."""
    before = {module: module.enabled for module in adapters(model).values()}
    for module in before:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in before.items():
            module.enabled = enabled


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold every B A into its weight, computed in fp32; what was int8 gets whole weights again. Soft prompts stay."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | Int8Linear):
            weight = dequantize(module.weight, module.absmax, model.dtype)
            if isinstance(module, LoRALinear):
                delta = module.config.scale * module.lora_B.weight @ module.lora_A.weight
                weight = (weight.float() + delta).to(weight.dtype)
            layer = nn.Linear(*weight.shape[::-1], bias=module.bias is not None, device="meta")
            layer.weight, layer.bias = nn.Parameter(weight, module.weight.requires_grad), module.bias
            model.set_submodule(name, layer)


# ---- Files: PEFT's layout (adapter_config.json, adapter_model.safetensors), and soft_prompts.safetensors beside it.
# Keys of PEFT's config that are read, or that say nothing about what a loaded LoRA computes.
HARMLESS = """r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_pattern base_model_name_or_path
revision task_type inference_mode auto_mapping peft_version megatron_core qalora_group_size runtime_config eva_config"""
# What others may be. Some starts, such as PiSSA's, change the base model too; peft converts such a LoRA to a plain one.
ALLOWED = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}


def save_adapter(model: nn.Module, folder: str | Path, notes: dict[str, str] | None = None) -> None:
    """Write what was added to the model. `notes` say what it was trained on, such as the prompts' text and a hash of
    the base model: they are kept in the files' metadata, and `load_adapter` compares them."""
    folder, metadata = Path(folder), {"trained_on": json.dumps(notes or {})}  # one key: the order of more is random
    folder.mkdir(parents=True, exist_ok=True)
    named, base = model.named_parameters(), "base_model.model.model."
    if lora := {base + name: parameter.detach().cpu() for name, parameter in named if ".lora_" in name}:
        config = next(module.config for module in adapters(model).values() if isinstance(module, LoRALinear))
        save_file(lora, folder / "adapter_model.safetensors", metadata=metadata)
        raw = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
        raw |= {"use_rslora": config.use_rslora, "bias": "none", "inference_mode": True}
        # A regular expression: a plain list of names would also match layers of the vision tower.
        raw["target_modules"] = rf".*language_model.*\.({'|'.join(config.targets)})"
        (folder / "adapter_config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if isinstance(embedding := model.language_model.embed_tokens, SoftPrompt):
        tensors = {f"soft_prompt.{side}": getattr(embedding, side).detach().cpu() for side in ("image", "text")}
        save_file(tensors, folder / "soft_prompts.safetensors", metadata=metadata)


def load_adapter(model: nn.Module, folder: str | Path, image_prompt: list[int], text_prompt: list[int], notes=None):
    """Add to a base model what `save_adapter` wrote, or a LoRA adapter of PEFT's for the same language model.
    The prompts are the hand-written token ids that the soft prompts began as. Of `notes`, a file that holds some must
    hold them all. Returns the LoRAConfig, None where there is none. Raises AdapterError."""
    folder, config = Path(folder), None
    lora, soft = folder / "adapter_config.json", folder / "soft_prompts.safetensors"
    if not lora.exists() and not soft.exists():
        raise AdapterError(f"{folder}: neither {lora.name} nor {soft.name}; this is not an adapter")
    if lora.exists():
        config, lora = read_lora_config(lora), folder / "adapter_model.safetensors"
        tensors = read_tensors(lora, notes)
        # A plain list of targets makes LoRA in the vision tower as well: left out where it learned nothing, B = 0.
        idle = {name for name in tensors if ".lora_B." in name and not tensors[name].any()}
        ours = {name for name in tensors if name.startswith("language_model.")}
        tensors = {n: t for n, t in tensors.items() if n in ours or n.replace(".lora_A.", ".lora_B.") not in idle}
        config.targets = tuple(target for target in TARGETS if any(f".{target}.lora_" in name for name in ours))
        add_lora(model, config)
        copy_tensors(model, lora, tensors, {name: name for name, _ in model.named_parameters() if ".lora_" in name})
    if soft.exists():
        add_soft_prompts(model, image_prompt, text_prompt)
        names = {f"soft_prompt.{side}": f"language_model.embed_tokens.{side}" for side in ("image", "text")}
        copy_tensors(model, soft, read_tensors(soft, notes), names)
    return config


def read_lora_config(path: Path) -> LoRAConfig:
    """PEFT's adapter_config.json, but for the targets: the tensors tell. Any key unknown and set is refused by name."""
    try:
        raw = {"peft_type": "missing"} | json.loads(path.read_text(encoding="utf-8"))
        numbers = int(raw.get("r", 8)), float(raw.get("lora_alpha", 8)), float(raw.get("lora_dropout", 0))
        config = LoRAConfig(*numbers, use_rslora=raw.get("use_rslora") is True)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be used ({type(error).__name__}: {error})") from None
    unknown = {key: value for key, value in raw.items() if value and key not in HARMLESS.split()}
    faults = [f"{k} is {v!r}, which is not implemented" for k, v in unknown.items() if v not in ALLOWED.get(k, [])]
    if not 1 <= config.rank <= 4096 or not math.isfinite(config.alpha) or not 0 <= config.dropout < 1:
        faults.append(f"rank {config.rank}, alpha {config.alpha}, dropout {config.dropout} is no LoRA")
    if faults:
        raise AdapterError(f"{path}: " + "; ".join(faults))
    return config


def lora_name(stored: str) -> str:
    """PEFT's names -> ours. The module's path is as in new or old transformers, or in a bare language model:
    base_model.model.  model.language_model.layers.0   language_model.model.layers.0   model.layers.0"""
    path = r"base_model\.model\.(?:model\.)?(?:language_model\.)?(?:model\.)?(layers\.\d+\.\w+\.\w+\.lora_[AB])"
    match = re.fullmatch(path + r"(?:\.default)?\.weight", stored)
    return f"language_model.{match[1]}.weight" if match else stored


def read_tensors(path: Path, notes: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """All tensors, under our names, of a file that was trained on what the notes say, or does not say on what."""
    try:
        with safe_open(path, framework="pt") as file:
            stored, found = list(file.keys()), dict(json.loads((file.metadata() or {}).get("trained_on", "{}")))
            tensors = {lora_name(name): file.get_tensor(name) for name in stored}
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path}: not a safetensors file of an adapter ({error})") from None
    if len(tensors) < len(stored):  # under its old and its new name, for example
        raise AdapterError(f"{path}: holds tensors twice, under different names: {sorted(stored)[:4]}, ...")
    notes = {key: note for key, note in (notes or {}).items() if found and found.get(key) != note}
    if faults := [f"{key} was {found.get(key)!r} and is {note!r}" for key, note in notes.items()]:
        raise AdapterError(f"{path}: {'; '.join(faults)}; use the base model and prompts of training, or train anew")
    return tensors


def copy_tensors(model: nn.Module, path: Path, stored: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Copy what `path` held into parameters: exactly the tensors `names` (stored -> parameter), with equal shapes."""
    parameters = dict(model.named_parameters())
    have = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    want = {name: tuple(parameters[parameter].shape) for name, parameter in names.items()}
    faults = [f"missing: {n}" for n in want.keys() - have] + [f"unexpected: {n}" for n in have.keys() - want]
    faults += [f"wrong shape: {n} {have[n]}, expected {want[n]}" for n in want.keys() & have if want[n] != have[n]]
    if faults:
        raise AdapterError(f"{path}: does not fit this model\n  " + "\n  ".join(sorted(faults)[:20]))
    with torch.no_grad():
        for name, parameter in names.items():
            parameters[parameter].copy_(stored[name])
