"""LLaVA-OneVision (arXiv 2408.03326): a LLaVA whose images end with a token of their own.

    model = OneVision.from_pretrained("llava-onevision-qwen2-0.5b-ov-hf")
    hidden = model(input_ids, pixel_values)           # as of Llava: (B, T, D), after the norm

Read model.py first. Two things differ:

  pictures        are padded to a square with grey instead of being cut or squashed
  image_newline   one learned vector behind the patches of each image: 729 + 1 tokens

This is how the model reads SEVERAL images of one question, and how transformers does then: one tile
each. A lone image transformers cuts into tiles ("anyres", up to 7,300 tokens); that is not done
here, where an image is always one tile, so a lone image's embedding is not the one of transformers.
The "-si" checkpoints were trained on lone images only, and may be worse at it than "-ov".
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from data import ImageProcessor
from formats import hf
from formats.files import InputError
from model import ACTIVATIONS, Llava, LlavaConfig, TextConfig, VisionConfig


# ---- Pictures
class OneVisionProcessor(ImageProcessor):
    """Picture -> pixel values of one tile: bit for bit what transformers' PIL processor makes of
    several images of one sample."""

    def __init__(self, raw: dict, where: str = "preprocessor_config.json"):
        # Their do_pad is about the number of tiles.
        super().__init__({**raw, "do_pad": False}, where)
        self.grey = tuple(int(value * 255) for value in raw["image_mean"])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, height, width) fp32."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.grey)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return super().__call__(square)


# ---- Configuration
def siglip_384() -> VisionConfig:
    """The tower of a file that names none, as transformers has it."""
    return VisionConfig(
        model_type="siglip_vision_model",
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )


@dataclass
class OneVisionConfig(LlavaConfig):
    vision: VisionConfig = field(default_factory=siglip_384)
    image_token_id: int = 151646
    vision_feature_layer: int = -1
    vision_feature_select_strategy: str = "full"
    image_grid_pinpoints: list | None = None  # how lone images would be cut; kept for the file

    @property
    def num_image_tokens(self) -> int:
        """The patches, and image_newline."""
        return super().num_image_tokens + 1

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "OneVisionConfig":
        """Read config.json, and the stop tokens of generation_config.json. Raises InputError."""
        folder = Path(folder)
        raw = hf.read_config(folder, supported=("llava_onevision",))
        if not isinstance(raw.get("text_config"), dict):
            raise InputError(f"{folder / 'config.json'}: text_config is missing")
        config = hf.read_llava_config(folder, cls, VisionConfig, TextConfig, "llava_onevision")
        hf.check_llava_config(folder, config, ACTIVATIONS)
        return config

    def processor_keys(self) -> dict:
        """There is no export: see the top of this file. Raises InputError."""
        raise InputError(
            "transformers would cut a lone picture into tiles, and embed it otherwise: "
            "a LLaVA-OneVision cannot be exported; its adapters can be used with PEFT"
        )

    def to_dict(self) -> dict:
        """The content of a Hugging Face config.json."""
        content = super().to_dict()
        content["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
        content["model_type"] = "llava_onevision"
        content["image_token_id"] = content.pop("image_token_index")
        content.pop("image_seq_length")
        if self.image_grid_pinpoints is not None:
            content["image_grid_pinpoints"] = self.image_grid_pinpoints
        return content


# ---- Names
def our_name(name: str) -> str:
    return hf.canonical_name(name.replace("model.image_newline", "image_newline"))


def find_tensors(folder: Path, shapes: dict, config: OneVisionConfig) -> dict:
    """`hf.find_llava_tensors` with one name more."""
    optional = ("lm_head.weight",) if config.text.tie_word_embeddings else ()

    def is_unused(name: str) -> bool:
        return hf.is_unused(name, config)

    return hf.find_tensors(folder, shapes, our_name, is_unused, optional)


# ---- OneVision
class OneVision(Llava):
    """LLaVA with one more vector."""

    config_class = OneVisionConfig
    find_tensors = staticmethod(find_tensors)

    def __init__(self, config: OneVisionConfig):
        super().__init__(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size))

    def image_features(self, pixel_values):
        """pixel_values (images, 3, image_size, image_size) -> features (images, N, D)."""
        features = self.multi_modal_projector(self.vision_tower(pixel_values))
        newline = self.image_newline.expand(len(features), 1, -1)
        return torch.cat([features, newline], dim=1)
