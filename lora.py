"""The trainable part: LoRA on the language model's linear layers, and two soft prompts. Everything else is frozen.

    freeze(model)
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


class LoRALinear(nn.Module):
    """y = W x + scale * B A dropout(x), with W frozen. B starts at zero, so that training starts at the base model."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
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
            return [F.linear(x, layer.weight, layer.bias) for layer in layers]
        # Computed in the base's precision; the casts hand the gradients on in fp32, where they are summed up.
        tensors = [
            (layer.weight, layer.bias, layer.lora_A.weight.to(x.dtype), layer.lora_B.weight.to(x.dtype))
            for layer in layers
        ]
        dropout = self.config.dropout if self.training else 0.0
        trains = any(t is not None and t.requires_grad for weight, bias, *_ in tensors for t in (weight, bias))
        if dropout or (trains and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return [lora_linear(x, *each, self.config.scale, dropout) for each in tensors]
        flat = [tensor for each in tensors for tensor in each]
        return LeanLoRA.apply(x, getattr(x, "recipe", None), self.config.scale, *flat)


def lora_linear(x, weight, bias, A, B, scale: float, dropout: float = 0.0):
    """The reference. x (..., in), weight (out, in), A (R, in), B (out, R) -> (..., out)."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(F.dropout(x, dropout), A), B)


class LeanLoRA(torch.autograd.Function):
    """`lora_linear` of several layers with one input, for frozen weights and without dropout. Sums are made inside of
    matrix products, and an input with a recipe (see model.py) is not kept for the backward pass but made again.

    y = x W' + s (x A') B'    dB = s dy' (x A')    dA = s (dy B)' x    dx = dy W + s (dy B) A

    The A's of all layers are one matrix: `down` is x times all of them.
    """

    @staticmethod
    def forward(ctx, x, recipe, scale, *tensors):
        weights, biases, As, Bs = (tensors[i::4] for i in range(4))  # the layers' tensors come one layer after another
        ctx.make_x, sources = recipe or (lambda x: x, [x])
        A, rows = torch.cat(As), x.flatten(0, -2)  # (layers * R, in), (N, in)
        down = rows @ A.T
        ctx.scale, ctx.rank, ctx.shape, ctx.layers = scale, len(As[0]), x.shape, len(weights)
        ctx.save_for_backward(down, A, *weights, *Bs, *(source.detach() for source in sources))
        return tuple(
            F.linear(rows, weight, bias).addmm_(part, B.T, alpha=scale).unflatten(0, x.shape[:-1])
            for weight, bias, B, part in zip(weights, biases, Bs, down.split(ctx.rank, dim=1))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        down, A, *rest = ctx.saved_tensors
        weights, Bs, sources = rest[: ctx.layers], rest[ctx.layers : 2 * ctx.layers], rest[2 * ctx.layers :]
        rows = ctx.make_x(*sources).flatten(0, -2)
        dys = [dy.flatten(0, -2) for dy in dys]  # (N, out) each
        d_down = torch.cat([dy @ B for dy, B in zip(dys, Bs)], dim=1).mul_(ctx.scale)  # (N, layers * R)
        dAs = (d_down.T @ rows).split(ctx.rank)
        dBs = [(dy.T @ part).mul_(ctx.scale) for dy, part in zip(dys, down.split(ctx.rank, dim=1))]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = d_down @ A
            for dy, weight in zip(dys, weights):
                dx.addmm_(dy, weight)
            dx = dx.view(ctx.shape)
        return dx, None, None, *(d for dA, dB in zip(dAs, dBs) for d in (None, None, dA, dB))


class SoftPrompt(nn.Module):
    """A token embedding with learnable rows behind the vocabulary: id V + i is token i of the two prompts.

    The rows start as the embeddings of the hand-written prompts' tokens; disabled, they are exactly those.
    """

    def __init__(self, base: nn.Embedding, image_prompt: list[int], text_prompt: list[int]):
        super().__init__()
        self.weight, self.enabled = base.weight, True
        prompt_ids = torch.tensor(image_prompt + text_prompt, device=base.weight.device)
        self.register_buffer("prompt_ids", prompt_ids, persistent=False)
        rows = base.weight.detach()[prompt_ids].float()
        self.image, self.text = (
            nn.Parameter(part.clone()) for part in rows.split([len(image_prompt), len(text_prompt)])
        )

    def forward(self, input_ids):
        """input_ids (B, T) in [0, V + P) -> (B, T, D)."""
        vocabulary = len(self.weight)
        is_soft = input_ids >= vocabulary
        row = (input_ids - vocabulary).clamp(min=0)
        if not self.enabled:
            return F.embedding(torch.where(is_soft, self.prompt_ids[row], input_ids), self.weight)
        embeddings = F.embedding(input_ids.masked_fill(is_soft, 0), self.weight)
        soft = F.embedding(row, torch.cat([self.image, self.text]).to(self.weight.dtype))
        return torch.where(is_soft[..., None], soft, embeddings)


def freeze(model: nn.Module) -> None:
    """No parameter that is there now gets a gradient; what is added later does."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Replace the targeted linear layers of `model.language_model` by LoRALinear, in place; weights are shared.

    Raises AdapterError where there is LoRA already, or none of the targets.
    """
    parts = [part for block in model.language_model.layers for part in (block.self_attn, block.mlp)]
    targets = [(part, name) for part in parts for name in config.targets if hasattr(part, name)]
    if not targets or any(isinstance(getattr(part, name), LoRALinear) for part, name in targets):
        raise AdapterError(
            f"LoRA on {config.targets}: the language model has none of these layers, or has LoRA already"
        )
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
    """Fold every B A into its weight, computed in fp32, and put plain linear layers back. Soft prompts stay."""
    for name, module in adapters(model).items():
        if isinstance(module, LoRALinear):
            delta = module.config.scale * module.lora_B.weight @ module.lora_A.weight
            layer = nn.Linear(*module.weight.shape[::-1], bias=module.bias is not None, device="meta")
            merged = (module.weight.float() + delta).to(module.weight.dtype)
            layer.weight, layer.bias = nn.Parameter(merged, module.weight.requires_grad), module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


# ---- Files: PEFT's layout (adapter_config.json, adapter_model.safetensors), and soft_prompts.safetensors beside it.


def save_adapter(model: nn.Module, folder: str | Path, notes: dict[str, str] | None = None) -> None:
    """Write what was added to the model. `notes` are kept with the soft prompts, such as the prompts' text."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if ".lora_" in name}
    if tensors:
        config = next(module.config for module in adapters(model).values() if isinstance(module, LoRALinear))
        tensors = {f"base_model.model.model.{name}": tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        raw = {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.use_rslora,
            # A regular expression: a plain list of names would also match layers of the vision tower.
            "target_modules": rf".*language_model.*\.({'|'.join(config.targets)})",
            "bias": "none",
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(raw, indent=2) + "\n")
    embedding = model.language_model.embed_tokens
    if isinstance(embedding, SoftPrompt):
        prompts = {
            f"soft_prompt.{name}": p.detach().cpu()
            for name, p in (("image", embedding.image), ("text", embedding.text))
        }
        save_file(prompts, folder / "soft_prompts.safetensors", metadata=notes)


def load_adapter(
    model: nn.Module, folder: str | Path, image_prompt: list[int], text_prompt: list[int]
) -> LoRAConfig | None:
    """Add to a base model what `save_adapter` wrote, or a LoRA adapter of PEFT's for the same language model.

    The prompts are the hand-written token ids that the soft prompts began as. Returns the LoRA's config, None where
    there is none. Raises AdapterError.
    """
    folder, config = Path(folder), None
    has_lora, has_prompts = (folder / "adapter_config.json").exists(), (folder / "soft_prompts.safetensors").exists()
    if not has_lora and not has_prompts:
        raise AdapterError(
            f"{folder}: neither adapter_config.json nor soft_prompts.safetensors; this is not an adapter"
        )
    if has_lora:
        config = read_lora_config(folder / "adapter_config.json")
        add_lora(model, config)
        path = folder / "adapter_model.safetensors"
        load_tensors(
            model, path, {f"{n}.weight": f"{n}.weight" for n, m in model.named_modules() if ".lora_" in n}, lora_name
        )
    if has_prompts:
        add_soft_prompts(model, image_prompt, text_prompt)
        names = {f"soft_prompt.{kind}": f"language_model.embed_tokens.{kind}" for kind in ("image", "text")}
        load_tensors(model, folder / "soft_prompts.safetensors", names)
    return config


def read_lora_config(path: Path) -> LoRAConfig:
    """PEFT's adapter_config.json. What is not implemented is refused by name."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        named = raw["target_modules"]
        is_named = lambda target: target in named if isinstance(named, list) else re.search(rf"\b{target}\b", named)  # noqa: E731
        targets = tuple(target for target in TARGETS if named == "all-linear" or is_named(target))
        numbers = int(raw.get("r", 8)), float(raw.get("lora_alpha", 8)), float(raw.get("lora_dropout", 0))
        config = LoRAConfig(*numbers, targets, raw.get("use_rslora") is True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be used ({type(error).__name__}: {error})") from None
    unknown = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform")
    faults = [f"{key} is {raw[key]!r}, which is not implemented" for key in unknown if raw.get(key)]
    if raw.get("peft_type") != "LORA":
        faults.append(f"peft_type is {raw.get('peft_type')!r}, only 'LORA' is implemented")
    if raw.get("bias", "none") != "none":
        faults.append(f"bias is {raw['bias']!r}, only 'none' is implemented")
    if not 1 <= config.rank <= 4096 or not math.isfinite(config.alpha) or not 0 <= config.dropout < 1 or not targets:
        faults.append(f"rank {config.rank}, alpha {config.alpha}, dropout {config.dropout} on {targets} is no LoRA")
    if faults:
        raise AdapterError(f"{path}: " + "; ".join(faults))
    return config


def lora_name(stored: str) -> str:
    """PEFT's names, with transformers' old or new module paths, bare language models included -> ours."""
    path = r"base_model\.model\.(?:model\.)?(?:language_model\.)?(?:model\.)?(layers\.\d+\.\w+\.\w+\.lora_[AB])"
    match = re.fullmatch(path + r"(?:\.default)?\.weight", stored)
    return f"language_model.{match[1]}.weight" if match else stored


def load_tensors(model: nn.Module, path: Path, names: dict[str, str], rename=lambda name: name) -> None:
    """Copy a safetensors file into parameters: exactly the tensors `names` (file -> parameter), with equal shapes."""
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            stored = {rename(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file ({error})") from None
    faults = [f"missing: {name}" for name in names if name not in stored]
    faults += [f"unexpected: {name}" for name in stored if name not in names]
    for name in names.keys() & stored.keys():
        have, want = tuple(stored[name].shape), tuple(parameters[names[name]].shape)
        if have != want:
            faults.append(f"wrong shape: {name} {have}, expected {want}")
    if faults:
        raise AdapterError(f"{path}: does not fit this model\n  " + "\n  ".join(sorted(faults)[:20]))
    with torch.no_grad():
        for name, parameter in names.items():
            parameters[parameter].copy_(stored[name])
