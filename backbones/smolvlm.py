"""SmolVLM: a LLaVA for laptops, of 256 or 500 million parameters (arXiv 2504.05299).

    model = SmolVLM.from_pretrained("SmolVLM-256M-Instruct")
    hidden = model(input_ids, pixel_values)           # as of Llava: (B, T, D), after the norm

Read model.py first: SmolVLM is the same network but for four things, in the order of this file.

  template        how it writes a conversation, and what stands around an image's tokens
  pictures        are resized twice, to a square; one frame each, none is cut into tiles
  vision tower    SigLIP's with its last norm, which LLaVA leaves out
  connector       4 x 4 neighbouring patches become one token, so that an image takes 64 of them

The files are those of Idefics3 (SmolVLM) or SmolVLM2, which have the same network.

Axes as in model.py: B batch, T tokens, N image tokens, D hidden. Here s is the scale factor.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from data import ChatTemplate, ImageProcessor
from formats import hf
from formats.files import InputError
from formats.images import read_field, read_pixel_table, refuse_unless
from model import ACTIVATIONS, LanguageModel, Llava, TextConfig, VisionConfig, VisionTower

# ---- How a conversation is written
SMOLVLM = ChatTemplate(
    begin="<|im_start|>",
    user="User: ",
    image_turn="User:<image>",
    around_image=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    behind_image="",
    assistant="<end_of_utterance>\nAssistant:",
    answer=" ",
    end="<end_of_utterance>",
    between="\n",
)


# ---- Pictures
class SmolVLMProcessor(ImageProcessor):
    """Picture -> pixel values of one square frame, as preprocessor_config.json says.

    Bit for bit what transformers' PIL processors (Idefics3ImageProcessor, SmolVLMImageProcessor)
    make of it with do_image_splitting off. The file switches splitting on; it is not done here, for
    it takes up to 17 frames of 64 tokens for a picture."""

    changes = {"do_image_splitting": False}

    def __init__(self, raw: dict, where: str = "preprocessor_config.json"):
        side = read_field(raw, "max_image_size", longest_edge, where)
        self.resized = (read_field(raw, "size", longest_edge, where),)
        self.size = (side, side)
        self.resample = read_field(raw, "resample", Image.Resampling, where, default=1)
        self.table = read_pixel_table(raw, where)
        refuse_unless(raw, "do_resize", True, where)
        refuse_unless(raw, "do_normalize", True, where)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, height, width) fp32."""
        # First the longer edge to a fixed length, up as well as down; then to a square. One resize
        # straight to the square would give other numbers.
        longest = self.resized[0]
        if image.width >= image.height:
            width = longest
            height = even(int(longest / (image.width / image.height)))
        else:
            width = even(int(longest * (image.width / image.height)))
            height = longest
        resized = image.resize((max(width, 1), max(height, 1)), self.resample)
        height, width = self.size
        frame = resized.resize((width, height), self.resample)
        return self.normalised(np.asarray(frame))


def longest_edge(value: dict) -> int:
    """{"longest_edge": pixels} -> pixels. Raises ValueError."""
    length = value["longest_edge"]
    if type(length) is not int or not 0 < length <= 4096:
        raise ValueError(f"{length!r} is not a length in pixels")
    return length


def even(length: int) -> int:
    return length + length % 2


# ---- Configuration
# What transformers takes for keys that are absent. They are neither SigLIP's nor LLaMA's own.
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "num_attention_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
TEXT_DEFAULTS = {"llama": {"rms_norm_eps": 1e-5}}
# Older networks of the same name, told by switches that must be off.
SWITCHES = ("use_resampler", "qk_layer_norms")
ARCHITECTURES = {
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
PROCESSORS = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}


@dataclass
class SmolVLMConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model_type: str = "smolvlm"  # or "idefics3", the same
    image_token_id: int = 128257
    scale_factor: int = 2
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_image_tokens(self) -> int:
        """N: s x s patches become one token."""
        return self.vision.num_states // self.scale_factor**2

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SmolVLMConfig":
        """Read config.json, and the stop tokens of generation_config.json. Raises InputError."""
        folder = Path(folder)
        path = folder / "config.json"
        raw = hf.read_config(folder, supported=tuple(ARCHITECTURES))
        sections = sections_of(path, raw)
        text = hf.read_section(TextConfig, path, "text_config", sections, TEXT_DEFAULTS)
        # Four model_types of the vision tower are in the wild, for one network: SigLIP's.
        sections["vision_config"]["model_type"] = "siglip_vision_model"
        defaults = {"siglip_vision_model": VISION_DEFAULTS}
        vision = hf.read_section(VisionConfig, path, "vision_config", sections, defaults)
        if raw.get("tie_word_embeddings") is True:
            text.tie_word_embeddings = True

        values = dict(raw)
        values["vision"] = vision
        values["text"] = text
        values["eos_token_ids"] = hf.read_stop_tokens(folder, raw.get("text_config") or {})
        known = ("vision", "text", "eos_token_ids")
        config = hf.fill(cls, values, f"{path}: ", known)
        hf.refuse_faults(folder, config, faults_of(config, raw))
        return config

    def processor_keys(self) -> dict:
        """What processor_config.json must say; see `LlavaConfig`."""
        return {
            "processor_class": PROCESSORS[self.model_type],
            "image_seq_len": self.num_image_tokens,
        }

    def to_dict(self) -> dict:
        """The content of a Hugging Face config.json."""
        vision = dict(vars(self.vision))
        vision["model_type"] = f"{self.model_type}_vision"
        text = dict(vars(self.text))
        text["eos_token_id"] = self.eos_token_ids[0] if self.eos_token_ids else None
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "image_token_id": self.image_token_id,
            "scale_factor": self.scale_factor,
            "vision_config": vision,
            "text_config": text,
            "vocab_size": self.text.vocab_size,
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }


def sections_of(path: Path, raw: dict) -> dict[str, dict]:
    """The two sections of config.json, as copies; one that is absent is all defaults."""
    sections = {}
    for name in ("vision_config", "text_config"):
        section = raw.get(name) or {}
        if not isinstance(section, dict):
            raise InputError(f"{path}: {name} is {section!r}, expected an object")
        sections[name] = dict(section)
    return sections


def faults_of(config: SmolVLMConfig, raw: dict) -> list[str]:
    """What does not fit together, or is not implemented."""
    faults = hf.vision_faults(config.vision, ACTIVATIONS) + hf.text_faults(config.text)
    patches = config.vision.image_size // config.vision.patch_size
    if patches % config.scale_factor != 0:
        faults.append(f"scale_factor {config.scale_factor} does not divide {patches} patches")
    for name in SWITCHES:
        if raw.get(name):
            faults.append(f"{name} is on, which is not implemented")
    return faults


# ---- Vision tower
class SmolVLMVisionTower(VisionTower):
    """All layers of a SigLIP, and the norm after them."""

    def __init__(self, config: VisionConfig):
        super().__init__(config, config.num_hidden_layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values):
        """(images, 3, image_size, image_size) -> (images, patches, width), row by row."""
        return self.post_layernorm(super().forward(pixel_values))


# ---- Connector
class Connector(nn.Module):
    """Pixel shuffle (arXiv 1609.05158, here the way back): s x s patches side by side become one
    token, whose s x s times as many numbers one linear layer brings to the language model's width.
    """

    def __init__(self, config: SmolVLMConfig):
        super().__init__()
        self.scale_factor = config.scale_factor
        width = config.vision.hidden_size * config.scale_factor**2
        self.proj = nn.Linear(width, config.text.hidden_size, bias=False)

    def forward(self, patches):
        """(images, patches, width) -> (images, N, D), both row by row."""
        s = self.scale_factor
        side = int(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side // s, s, side // s, s))  # (images, R, s, C, s, width)
        blocks = grid.permute(0, 1, 3, 2, 4, 5)  # (images, R, C, s, s, width)
        return self.proj(blocks.flatten(3).flatten(1, 2))


# ---- Names
def our_name(name: str) -> str:
    """A name in the files -> the name in `SmolVLM.state_dict()`."""
    name = name.removeprefix("model.")
    name = name.replace("text_model.", "language_model.", 1)
    name = name.replace("vision_model.", "vision_tower.", 1)
    return name.replace("connector.modality_projection.", "connector.", 1)


def stored_name(name: str) -> str:
    """The way back."""
    if name.startswith("lm_head."):
        return name
    name = name.replace("language_model.", "text_model.", 1)
    name = name.replace("vision_tower.", "vision_model.", 1)
    return "model." + name.replace("connector.", "connector.modality_projection.", 1)


def is_unused(name: str) -> bool:
    """Buffers that old files hold and are computed here."""
    return name.endswith((".rotary_emb.inv_freq", ".position_ids"))


def find_tensors(folder: Path, shapes: dict, config: SmolVLMConfig) -> dict:
    """`hf.find_tensors` for SmolVLM; a head that is tied may be absent."""
    optional = ("lm_head.weight",) if config.text.tie_word_embeddings else ()
    return hf.find_tensors(folder, shapes, our_name, is_unused, optional)


# ---- SmolVLM
class SmolVLM(Llava):
    """LLaVA with another tower and connector. Forward pass, generation and loading are Llava's."""

    config_class = SmolVLMConfig
    language_model_name = "text_model"
    find_tensors = staticmethod(find_tensors)

    def __init__(self, config: SmolVLMConfig):
        nn.Module.__init__(self)
        self.config = config
        self.vision_tower = SmolVLMVisionTower(config.vision)
        self.connector = Connector(config)
        self.add_language_model(LanguageModel(config.text))

    def image_features(self, pixel_values):
        """pixel_values (images, 3, image_size, image_size) -> features (images, N, D)."""
        return self.connector(self.vision_tower(pixel_values))

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a new Hugging Face folder; see `Llava.save_pretrained`."""
        content = self.config.to_dict()
        content["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        hf.write_folder(
            Path(folder),
            hf.stored_tensors(self.base_tensors(), stored_name, content),
            content,
            list(self.config.eos_token_ids),
            max_shard_bytes,
        )
