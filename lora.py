"""The trainable part: LoRA on the language model's linear layers, two soft prompts, a temperature.
Everything else is frozen.

    freeze(model)
    add_lora(model, LoRAConfig(rank=16, alpha=16))
    add_soft_prompts(model, layout.image_prompt, layout.text_prompt)
    add_temperature(model, 0.07)
    trainable_parameters(model)                # what the optimizer gets
    with adapters_disabled(model): ...         # bitwise the base model
    save_adapter(model, folder)                # PEFT's layout; the soft prompts lie beside it
    load_adapter(model, folder, image_prompt, text_prompt)

LoRA: arXiv 2106.09685. Soft prompts start as the embeddings of the hand-written prompts, as in the
paper.

This is the version to read and to change. A training run computes the same numbers with less memory
(fast/lean.py), and may hold the frozen layers in 8 bits (fast/int8.py).

Axes: B batch, T tokens, D hidden, R rank, V vocabulary, P tokens of both prompts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from formats import peft
from formats.files import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- LoRA
@dataclass
class LoRAConfig:
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] = TARGETS  # names of linear layers inside the decoder layers
    use_rslora: bool = False  # scale by alpha / sqrt(rank): arXiv 2312.03732

    @property
    def scale(self) -> float:
        if self.use_rslora:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank


class LoRALinear(nn.Module):
    """y = W x + scale * B A dropout(x), with W frozen, A (R, in) and B (out, R)."""

    def __init__(self, base_layer: nn.Module, config: LoRAConfig):
        """base_layer: an nn.Linear, or what computes like one and has its `weight` (out, in)."""
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.enabled = True
        out_features, in_features = base_layer.weight.shape
        # A and B are fp32 whatever the base is in: they are small, and the sum of many small steps.
        options = {"bias": False, "device": base_layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(in_features, config.rank, **options)
        self.lora_B = nn.Linear(config.rank, out_features, **options)
        # B starts at zero, so that training starts at the base model.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        """x (..., in) -> (..., out), in the dtype of x."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        # Computed in the base's precision; the casts hand the gradients on in fp32.
        A = self.lora_A.weight.to(x.dtype)
        B = self.lora_B.weight.to(x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)  # of the adapter's input alone
        return y + self.config.scale * F.linear(F.linear(x, A), B)


# ---- Soft prompts
class SoftPrompt(nn.Module):
    """A token embedding with P learnable rows after the vocabulary: id V + i is prompt token i.

    The rows start as the embeddings of the hand-written prompts' tokens; disabled, they are exactly
    those again. The table of the vocabulary keeps its name, `embed_tokens.weight`."""

    def __init__(self, base: nn.Embedding, image_prompt: list[int], text_prompt: list[int]):
        super().__init__()
        # Shared, not copied: a head that is tied to the embedding stays tied.
        self.weight = base.weight  # (V, D)
        self.enabled = True
        prompt_ids = torch.tensor(image_prompt + text_prompt, device=base.weight.device)
        # A buffer moves with the model; not persistent, as Hugging Face's files have no such name.
        self.register_buffer("prompt_ids", prompt_ids, persistent=False)
        rows = base.weight.detach()[prompt_ids].float()  # (P, D), a copy
        image_rows, text_rows = rows.split([len(image_prompt), len(text_prompt)])
        self.image = nn.Parameter(image_rows.clone())
        self.text = nn.Parameter(text_rows.clone())

    def forward(self, input_ids):
        """input_ids (B, T) in [0, V + P) -> (B, T, D)."""
        vocabulary_size = len(self.weight)  # V
        is_soft = input_ids >= vocabulary_size
        prompt_row = (input_ids - vocabulary_size).clamp(min=0)  # 0 for words, and not used there
        # First every prompt token is the word that it began as.
        word_ids = torch.where(is_soft, self.prompt_ids[prompt_row], input_ids)
        words = F.embedding(word_ids, self.weight)  # (B, T, D)
        if not self.enabled:
            return words
        # Then it gets the row that has been learned for it.
        learned = torch.cat([self.image, self.text]).to(self.weight.dtype)  # (P, D)
        return torch.where(is_soft[..., None], F.embedding(prompt_row, learned), words)


# ---- What a model gets, and what of it trains
def freeze(model: nn.Module) -> None:
    """No parameter that is there now gets a gradient; what is added later does."""
    model.requires_grad_(False)


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Replace the targeted linear layers of the decoder layers by LoRALinear, in place.

    The weights are shared, not copied. Raises InputError where none of the targets is there, or one
    of them has LoRA already."""
    places = []
    for part in model.language_model.layers.modules():
        for name in config.targets:
            if hasattr(part, name):
                places.append((part, name))
    has_lora = any(isinstance(getattr(part, name), LoRALinear) for part, name in places)
    if has_lora or not places:
        problem = "the language model has none of these, or has LoRA already"
        raise InputError(f"LoRA on {config.targets}: {problem}")
    # Only now: replaced inside of the walk, the new layers would be walked too.
    for part, name in places:
        setattr(part, name, LoRALinear(getattr(part, name), config))


def add_soft_prompts(model: nn.Module, image_prompt: list[int], text_prompt: list[int]) -> None:
    """Give the ids from the vocabulary's end on to two soft prompts that start as these tokens."""
    language_model = model.language_model
    language_model.embed_tokens = SoftPrompt(language_model.embed_tokens, image_prompt, text_prompt)


def add_temperature(model: nn.Module, temperature: float) -> None:
    """Give the model a learnable temperature of the contrastive loss: `model.log_scale`, fp32.

    The similarity is multiplied by exp(log_scale) = 1 / temperature, as in CLIP. It belongs to the
    training, not to the adapter: `save_adapter` does not write it, checkpoints keep it. Another
    parameter of a loss is added in the same way, and is then trained, saved and resumed as well."""
    model.log_scale = nn.Parameter(torch.tensor(-math.log(temperature), device=model.device))


def adapters(model: nn.Module) -> dict[str, LoRALinear | SoftPrompt]:
    """All LoRALinear and SoftPrompt modules by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | SoftPrompt):
            found[name] = module
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer gets, by name."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def loss_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the losses learn, such as the temperature, by name: the trained parameters of the model
    itself, not of one of its parts. They belong to no adapter."""
    named = model.named_parameters(recurse=False)
    return {name: parameter for name, parameter in named if parameter.requires_grad}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes exactly what it did before anything was added."""
    modules = list(adapters(model).values())
    # Some may be disabled already, by a block around this one.
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before):
            module.enabled = enabled


# ---- Merging
def whole_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of a linear layer. One that is held in 8 bits makes it, as `dtype`."""
    if hasattr(layer, "whole_weight"):  # Int8Linear of fast/int8.py
        return layer.whole_weight(dtype)
    return layer.weight


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold every B A into its weight, computed in fp32. Soft prompts stay.

    Afterwards all linear layers are nn.Linear: what was held in 8 bits has whole weights again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            weight = whole_weight(module.base_layer, model.dtype)
            # fp32: in bf16 a small change would be rounded away.
            delta = module.config.scale * module.lora_B.weight @ module.lora_A.weight
            merged = (weight.float() + delta).to(weight.dtype)
            model.set_submodule(name, linear_like(module.base_layer, merged))
    # The layers in 8 bits that had no LoRA.
    for name, module in list(model.named_modules()):
        if hasattr(module, "whole_weight"):
            weight = module.whole_weight(model.dtype)
            model.set_submodule(name, linear_like(module, weight))


def linear_like(layer: nn.Module, weight: torch.Tensor) -> nn.Linear:
    """An nn.Linear with this weight (out, in), and the bias of `layer`."""
    out_features, in_features = weight.shape
    # On the meta device: memory for a weight that is replaced at once would be wasted.
    linear = nn.Linear(in_features, out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear


# ---- Files: PEFT's two, and soft_prompts.safetensors beside them
def save_adapter(model: nn.Module, folder: str | Path, notes: dict[str, str] | None = None) -> None:
    """Write the LoRA and the soft prompts of a model into a folder, which may be new.

    Args:
        notes: what the adapter was trained on, such as the prompts' text and a hash of the base
            model. They are kept in the files' metadata, and `load_adapter` compares them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lora_layers = [module for module in adapters(model).values() if isinstance(module, LoRALinear)]
    if lora_layers:
        tensors = {}
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                tensors[peft.peft_name(name, model.language_model_name)] = parameter
        peft.write_tensors(folder / "adapter_model.safetensors", tensors, notes)
        settings = dict(vars(lora_layers[0].config))
        targets = settings.pop("targets")
        path = folder / "adapter_config.json"
        peft.write_config(path, settings, targets, model.language_model_name)
    embedding = model.language_model.embed_tokens
    if isinstance(embedding, SoftPrompt):
        tensors = {"soft_prompt.image": embedding.image, "soft_prompt.text": embedding.text}
        peft.write_tensors(folder / "soft_prompts.safetensors", tensors, notes)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    image_prompt: list[int],
    text_prompt: list[int],
    notes: dict[str, str] | None = None,
) -> LoRAConfig | None:
    """Add to a base model what `save_adapter` wrote, or PEFT for the same language model.

    Args:
        image_prompt, text_prompt: the hand-written token ids that the soft prompts began as.
        notes: what the adapter is loaded into. A file that holds notes must hold these.
    Returns the LoRAConfig, None where there is no LoRA. Raises InputError."""
    folder = Path(folder)
    lora_file = folder / "adapter_config.json"
    soft_file = folder / "soft_prompts.safetensors"
    if not lora_file.exists() and not soft_file.exists():
        names = f"neither {lora_file.name} nor {soft_file.name}"
        raise InputError(f"{folder}: {names}; this is not an adapter")
    config = None
    if lora_file.exists():
        config = load_lora(model, folder, notes)
    if soft_file.exists():
        add_soft_prompts(model, image_prompt, text_prompt)
        embedding = model.language_model.embed_tokens
        parameters = {"soft_prompt.image": embedding.image, "soft_prompt.text": embedding.text}
        copy_tensors(soft_file, peft.read_tensors(soft_file, notes), parameters)
    return config


def load_lora(model: nn.Module, folder: Path, notes: dict[str, str] | None) -> LoRAConfig:
    """The LoRA part of `load_adapter`."""
    config = LoRAConfig(**peft.read_config(folder / "adapter_config.json"))
    path = folder / "adapter_model.safetensors"
    tensors = peft.without_idle(peft.read_tensors(path, notes))
    ours = [name for name in tensors if name.startswith("language_model.")]
    # The tensors say which layers have LoRA; PEFT's `target_modules` may be any expression.
    targets = []
    for target in TARGETS:
        if any(f".{target}.lora_" in name for name in ours):
            targets.append(target)
    config.targets = tuple(targets)
    add_lora(model, config)
    parameters = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameters[name] = parameter
    copy_tensors(path, tensors, parameters)
    return config


def copy_tensors(
    path: Path, tensors: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]
) -> None:
    """Copy what the file `path` held into the parameters of the same names, all and no other."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    peft.check_tensors(path, tensors, shapes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
