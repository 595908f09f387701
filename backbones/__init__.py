"""The contract between a vision-language model and the rest of this project, in one place.

    model = backbones.load(folder, dtype=torch.bfloat16, device="cuda")
    config = backbones.read_config(folder)                  # its sizes, without its weights

`load` chooses the class by config.json's "model_type". `Llava` (model.py) is the reference of the
contract. Another model is one more file in this folder, with a class that fulfils `Backbone`, and
one more line in BACKBONES; data, LoRA, losses, training and evaluation stay as they are.
docs/your-own-backbone.md adds one step by step, and says which models are not served.

Beside the members below, three properties of the computation are part of the contract:

  causal    A hidden state depends on its own token and those before it, never on those
            after it. So right padding needs no mask, and one forward pass of an image's sequence
            gives both its embedding (at the summary position) and the states that predict the
            caption after it. A prefix that sees itself in both directions does not fit.
  a head    `logits(hidden)` is hidden @ lm_head.weight.T: no bias, no cap.
  a Module  The class is a torch.nn.Module whose parameters are the base model's weights and
            nothing else. What is trained is added from outside (lora.py).

Axes: B batch, T tokens, N tokens of an image, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from backbones.onevision import OneVision, OneVisionProcessor
from backbones.qwen2_vl import QWEN2_VL, Qwen2VL, Qwen2VLProcessor
from backbones.smolvlm import SMOLVLM, SmolVLM, SmolVLMProcessor
from data import ChatTemplate, ImageProcessor
from formats import hf
from model import Llava


# ---- Sizes: what is known of a model without its weights ----
@runtime_checkable
class TextSizes(Protocol):
    """The language model's sizes. lora.py needs V, the estimate of memory the rest."""

    vocab_size: int  # V; soft prompts take the ids from V on
    hidden_size: int  # D, the length of an embedding
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # the longest sequence, generated tokens included


@runtime_checkable
class VisionSizes(Protocol):
    image_size: int  # pixel_values are squares of this side; where sizes differ, one of them is


@runtime_checkable
class BackboneConfig(Protocol):
    """What config.json says. `LlavaConfig` is the reference."""

    text: TextSizes
    vision: VisionSizes
    image_token_id: int  # must be the tokenizer's id of the layout's image token
    # N: so often an image's token stands in input_ids. Where pictures differ in size, a method:
    # (height, width) of a picture's pixel values -> N.
    num_image_tokens: int | Callable[[int, int], int]
    eos_token_ids: tuple[int, ...]  # `generate` stops at any of them; may be replaced after loading

    def processor_keys(self) -> dict:
        """What an export's processor_config.json must say for transformers to do as here."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "BackboneConfig":
        """Read a folder's small files. Raises InputError for what is missing or unsupported."""


# ---- Parts that others reach into ----
@runtime_checkable
class LanguagePart(Protocol):
    embed_tokens: nn.Module  # ids (B, T) -> (B, T, D), with a `weight` (V, D); lora.SoftPrompt
    # takes its place, and then gets ids of V and above too. All embedding goes through it.
    layers: nn.ModuleList  # LoRA replaces the nn.Linear in here that bear its targets' names
    checkpoint_layers: int  # so many of the first layers compute their inner values twice


@runtime_checkable
class Cache(Protocol):
    tokens: list[list[int]]  # the ids that each row holds; rows may differ in length


# ---- The model ----
@runtime_checkable
class Backbone(Protocol):
    """A vision-language model that can be trained, evaluated and asked here."""

    config: BackboneConfig
    config_class: type  # whose from_pretrained reads `config` alone
    language_model_name: str  # transformers' name of `language_model`, which adapter files bear
    vision_tower: nn.Module  # frozen, and sharded when training is, its nn.ModuleLists by layers
    language_model: LanguagePart
    lm_head: nn.Module  # `lm_head.weight` is (V, D): the caption loss computes logits from it
    device: torch.device  # where inputs must be
    dtype: torch.dtype  # of the weights; pixel_values of another floating dtype are cast

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What takes the places of image tokens.

        pixel_values: (images, 3, height, width), normalised as preprocessor_config.json says.
        A backbone whose pictures differ in size gets a list of (3, height, width) where they do.
        Returns (images, N, D), or whatever else `forward` takes as `image_features`. Training calls
        it once an image and step, and hands on what it got."""

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D) after the final norm, in the model's dtype; never logits.

        input_ids: (B, T) int64, padded on the right, with N image tokens for each image.
        pixel_values or image_features: the images of all rows, in reading order; neither for text.
        cache: what stands in front of input_ids; the caller then adds the new ids to its `tokens`.
        Raises ValueError where image tokens and image features differ in number."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> scores of the next token (..., V)."""

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for so many conversations."""

    def generate(
        self,
        prompts: list[list[int]],
        pixel_values: torch.Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
    ) -> list[list[int]]:
        """Continue prompts of any lengths -> each row's new ids, without the stop token.

        temperature 0 is greedy. With a cache, the prompts are whole conversations, of which what it
        holds is not computed again. Raises ValueError for prompts that do not fit the cache, the
        images or max_position_embeddings."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Backbone":
        """Read a Hugging Face folder, in eval mode. Raises InputError with all faults.

        dtype None leaves the weights as they are stored: on the CPU as views of the files, of
        which sharded training reads only what it keeps."""

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write the base model as a Hugging Face folder that transformers opens."""


# ---- Which class reads which folder ----
@dataclass(frozen=True)
class Family:
    """What belongs to one model_type."""

    model: type[Backbone]
    processor: type[ImageProcessor]  # from_pretrained(folder), then picture -> (3, height, width)
    template: ChatTemplate | None  # None: as data.Layout finds by the tokenizer


BACKBONES: dict[str, Family] = {
    "llava": Family(Llava, ImageProcessor, None),
    "idefics3": Family(SmolVLM, SmolVLMProcessor, SMOLVLM),
    "smolvlm": Family(SmolVLM, SmolVLMProcessor, SMOLVLM),
    "llava_onevision": Family(OneVision, OneVisionProcessor, None),
    "qwen2_vl": Family(Qwen2VL, Qwen2VLProcessor, QWEN2_VL),
}


def family_of(folder: str | Path) -> Family:
    """What a folder's model_type asks for. Raises InputError that lists those there are."""
    raw = hf.read_config(Path(folder), supported=tuple(BACKBONES))
    return BACKBONES[raw["model_type"]]


def load(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """The model in a Hugging Face folder, whichever it is; see `Backbone.from_pretrained`."""
    return family_of(folder).model.from_pretrained(folder, dtype, device)


def read_config(folder: str | Path) -> BackboneConfig:
    """The sizes of the model in a Hugging Face folder. Raises InputError."""
    return family_of(folder).model.config_class.from_pretrained(folder)
