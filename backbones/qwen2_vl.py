"""Qwen2-VL (arXiv 2409.12191): pictures of any size, and positions in two dimensions.

    model = Qwen2VL.from_pretrained("Qwen2-VL-2B-Instruct")
    hidden = model(input_ids, pictures)           # (B, T, D), after the norm
    pictures: a list of (3, height, width); where all are of one size, one tensor will do

Read model.py first. Qwen2-VL differs from LLaVA in what is below, in the order of this file:

  template        how it writes a conversation
  pictures        keep their shape: a large one has more patches, and so takes more tokens
  vision tower    patches know their row and column by rotary angles, not by a learned table
  merger          2 x 2 neighbouring patches become one token of the language model
  M-RoPE          a token has three positions: time, row and column (words have three equal ones)

The decoder layers and the cache of keys and values are those of model.py. Videos are not read.

Axes as in model.py: B batch, T tokens, D hidden, H heads. Here N counts the patches of all images
of a call, one image after another, and m is the side of a block of patches that are merged, 2.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import model
from data import ChatTemplate, ImageProcessor
from formats import hf
from formats.files import InputError
from formats.images import read_field, read_pixel_table, refuse_unless
from model import ACTIVATIONS, KVCache, LanguageModel, Llava, cos_and_sin, rotate

# ---- How a conversation is written
QWEN2_VL = ChatTemplate(
    begin="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    user="<|im_start|>user\n",
    image_token="<|image_pad|>",
    image_turn="<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>",
    behind_image="",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    between="\n",
)


# ---- Pictures
class Qwen2VLProcessor(ImageProcessor):
    """Picture -> pixel values of about its own size, as preprocessor_config.json says.

    Both sides become multiples of a block's, 28 pixels, and their product lies between min_pixels
    and max_pixels. Bit for bit the pixels of transformers' PIL processor, before they are cut into
    patches: that is a part of the vision tower here."""

    def __init__(self, raw: dict, where: str = "preprocessor_config.json"):
        patch_size = read_field(raw, "patch_size", length, where, default=14)
        self.block = patch_size * read_field(raw, "merge_size", length, where, default=2)
        self.size = (self.block, self.block)  # of the smallest picture; all others are larger
        size = read_field(raw, "size", dict, where, default={})
        # The keys' names changed twice; "edge" never meant one.
        smallest = size.get("shortest_edge") or size.get("min_pixels") or 56 * 56
        largest = size.get("longest_edge") or size.get("max_pixels") or 28 * 28 * 1280
        smallest = read_field(raw, "min_pixels", length, where, default=smallest)
        largest = read_field(raw, "max_pixels", length, where, default=largest)
        self.resized = (smallest, largest)
        self.resample = read_field(raw, "resample", Image.Resampling, where, default=3)
        self.table = read_pixel_table(raw, where)
        refuse_unless(raw, "do_resize", True, where)
        refuse_unless(raw, "do_normalize", True, where)
        self.check_limits(where)

    def check_limits(self, where: str) -> None:
        smallest, largest = self.resized
        if not smallest <= largest or largest < self.block**2:
            found = f"from {smallest} to {largest} pixels"
            raise InputError(f"{where}: pictures {found}, one block has {self.block**2}")

    def limit(self, max_pixels: int) -> None:
        """Make no picture of more pixels than this. Raises InputError."""
        smallest, _ = self.resized
        self.resized = (min(smallest, max_pixels), max_pixels)
        self.check_limits("max_pixels")
        smallest, largest = self.resized
        size = {"shortest_edge": smallest, "longest_edge": largest}
        self.changes = {"size": size, "min_pixels": smallest, "max_pixels": largest}

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, height, width) fp32. Raises InputError for one that is too long."""
        height, width = self.best_size(image.height, image.width)
        resized = image.resize((width, height), self.resample)
        return self.normalised(np.asarray(resized))

    def best_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that a picture is resized to."""
        if max(height, width) > 200 * min(height, width):
            raise InputError(f"{width} x {height} pixels are too long for an image")
        block = self.block
        smallest, largest = self.resized
        # Python rounds a half to the even number, and so did Qwen2-VL's training. A thin side may
        # become 0 here; the picture is then too small, and grows.
        rows = round(height / block)
        columns = round(width / block)
        pixels = rows * columns * block**2
        if pixels > largest:
            shrink = math.sqrt(height * width / largest)
            rows = max(1, math.floor(height / shrink / block))
            columns = max(1, math.floor(width / shrink / block))
        elif pixels < smallest:
            grow = math.sqrt(smallest / (height * width))
            rows = math.ceil(height * grow / block)
            columns = math.ceil(width * grow / block)
        return rows * block, columns * block


def length(value: int) -> int:
    """A number of pixels. Raises ValueError."""
    if type(value) is not int or not 0 < value <= 2**28:
        raise ValueError(f"{value!r} is not a number of pixels")
    return value


# ---- Configuration
@dataclass
class VisionConfig:
    """The defaults are the tower of all sizes of Qwen2-VL; config.json names little else."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584  # not the tower's own width, but that of what leaves it: D
    hidden_act: str = "quick_gelu"
    mlp_ratio: int = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def image_size(self) -> int:
        """The side of the smallest picture: of one block of patches."""
        return self.patch_size * self.spatial_merge_size


@dataclass
class TextConfig(model.TextConfig):
    """A Qwen2 whose positions are three."""

    rope_theta: float = 1000000.0
    # How many of the head_dim / 2 angles turn by time, by row and by column.
    mrope_section: tuple[int, ...] = (16, 24, 24)


TEXT_DEFAULTS = {
    "qwen2": {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    }
}


@dataclass
class Qwen2VLConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_ids: tuple[int, ...] = ()

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many tokens a picture of this size takes: one a block of patches."""
        return height * width // self.vision.image_size**2

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Qwen2VLConfig":
        """Read config.json, and the stop tokens of generation_config.json. Raises InputError."""
        folder = Path(folder)
        path = folder / "config.json"
        raw = hf.read_config(folder, supported=("qwen2_vl",))
        vision = raw.get("vision_config") or {}
        # Released files hold the language model's keys at the top, newer ones in a section.
        section = raw.get("text_config") or raw
        for name, found in (("vision_config", vision), ("text_config", section)):
            if not isinstance(found, dict):
                raise InputError(f"{path}: {name} is {found!r}, expected an object")
        text = read_text(path, section)
        if raw.get("tie_word_embeddings") is True:
            text.tie_word_embeddings = True

        values = dict(raw)
        values["vision"] = hf.fill(VisionConfig, vision, f"{path}: vision_config.")
        values["text"] = text
        values["eos_token_ids"] = hf.read_stop_tokens(folder, {"model_type": "qwen2", **section})
        known = ("vision", "text", "eos_token_ids")
        config = hf.fill(cls, values, f"{path}: ", known)
        hf.refuse_faults(folder, config, faults_of(config))
        return config

    def processor_keys(self) -> dict:
        """What processor_config.json must say; see `LlavaConfig`."""
        return {"processor_class": "Qwen2VLProcessor"}

    def to_dict(self) -> dict:
        """The content of a Hugging Face config.json, as the released ones are laid out."""
        content = dict(vars(self.text))
        section = list(content.pop("mrope_section"))
        content.update(
            architectures=["Qwen2VLForConditionalGeneration"],
            model_type="qwen2_vl",
            rope_scaling={"type": "mrope", "mrope_section": section},
            eos_token_id=self.eos_token_ids[0] if self.eos_token_ids else None,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            vision_start_token_id=self.vision_start_token_id,
            vision_end_token_id=self.vision_end_token_id,
            vision_config={**vars(self.vision), "model_type": "qwen2_vl"},
        )
        return content


def read_text(path: Path, section: dict) -> TextConfig:
    """The language model's sizes. Raises InputError."""
    section = {**section, "model_type": "qwen2"}
    mrope_section = None
    for key in ("rope_scaling", "rope_parameters"):
        rope = section.get(key)
        if not isinstance(rope, dict):
            continue
        # M-RoPE is told by its sections: saving again turns the type "mrope" into "default". What
        # is left must be plain.
        rope = dict(rope)
        mrope_section = rope.pop("mrope_section", mrope_section)
        for kind in ("type", "rope_type"):
            if rope.get(kind) == "mrope":
                rope[kind] = "default"
        section[key] = rope
    text = hf.read_section(TextConfig, path, "text_config", {"text_config": section}, TEXT_DEFAULTS)
    if mrope_section is not None:
        is_list = isinstance(mrope_section, list) and len(mrope_section) == 3
        if not is_list or not all(type(each) is int and each >= 0 for each in mrope_section):
            raise InputError(f"{path}: mrope_section is {mrope_section!r}, expected three numbers")
        text.mrope_section = tuple(mrope_section)
    return text


def faults_of(config: Qwen2VLConfig) -> list[str]:
    """What does not fit together."""
    vision = config.vision
    text = config.text
    faults = hf.text_faults(text)
    if vision.hidden_act not in ACTIVATIONS:
        faults.append(f"vision_config.hidden_act {vision.hidden_act!r} is unknown")
    # Half of a head's angles are rows, half are columns; each turns a pair of numbers.
    if vision.embed_dim % (4 * vision.num_heads) != 0:
        faults.append(f"{vision.num_heads} vision heads do not fit {vision.embed_dim}")
    if vision.hidden_size != text.hidden_size:
        faults.append(f"vision_config.hidden_size {vision.hidden_size} != {text.hidden_size}")
    if vision.depth > hf.MOST_LAYERS:
        faults.append(f"more than {hf.MOST_LAYERS} layers")
    if text.rope_scaling is not None:
        faults.append("a scaled M-RoPE is not implemented")
    if 2 * sum(text.mrope_section) != text.head_dim:
        faults.append(f"mrope_section {text.mrope_section} is not half of head_dim {text.head_dim}")
    return faults


# ---- Vision tower
def in_blocks(grid, m: int):
    """(rows, columns, ...) -> (rows * columns, ...): block after block of m x m, row by row.

    So the patches that become one token stand side by side."""
    blocks = grid.unflatten(1, (-1, m)).unflatten(0, (-1, m))  # (rows / m, m, columns / m, m, ...)
    return blocks.transpose(1, 2).flatten(0, 3)


def patches_of(image, config: VisionConfig):
    """A picture (3, height, width) -> its patches, (patches, 3 * frames * side * side)."""
    p = config.patch_size
    grid = image.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # (3, rows, p, columns, p)
    grid = grid.permute(1, 3, 0, 2, 4)  # (rows, columns, 3, p, p)
    patches = in_blocks(grid, config.spatial_merge_size)[:, :, None]  # (patches, 3, 1, p, p)
    # The tower was made for videos, of which it takes two frames at once: here the same one twice.
    frames = patches.expand(-1, -1, config.temporal_patch_size, -1, -1)
    return frames.flatten(1)


def patch_angles(rows: int, columns: int, config: VisionConfig, device):
    """The angles by which a picture's patches turn, (patches, head_dim / 2) fp32.

    The first half of them tells the row, the second half the column."""
    y = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    x = torch.arange(columns, device=device)[None].expand(rows, columns)
    places = in_blocks(torch.stack([y, x], dim=-1), config.spatial_merge_size)  # (patches, 2)
    size = config.embed_dim // config.num_heads // 2  # numbers of a head that belong to an axis
    exponents = torch.arange(0, size, 2, device=device).float() / size
    angles = places[..., None].float() / 10000.0**exponents  # (patches, 2, size / 2)
    return angles.flatten(1)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        # Kept as a convolution for the shape of its weight; computed as one matrix product.
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, kernel, bias=False)

    def forward(self, patches):
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight)


class VisionAttention(nn.Module):
    """Every patch sees every patch of its own picture."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x, cos, sin, lengths):
        """x (N, width); cos and sin (N, head_dim); lengths: how many patches each picture has."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, 3, H, head_dim)
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # (1, H, N, head_dim) each
        # In fp32, as the model was trained.
        q = rotate(q.float(), cos, sin).to(x.dtype)
        k = rotate(k.float(), cos, sin).to(x.dtype)
        outputs = []
        of_each = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2))
        for q_image, k_image, v_image in of_each:
            outputs.append(F.scaled_dot_product_attention(q_image, k_image, v_image))
        y = torch.cat(outputs, dim=2)  # (1, H, N, head_dim)
        return self.proj(y[0].transpose(0, 1).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden = config.mlp_ratio * config.embed_dim
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x, cos, sin, lengths):
        h = x + self.attn(self.norm1(x), cos, sin, lengths)
        return h + self.mlp(self.norm2(h))


class PatchMerger(nn.Module):
    """m x m patches -> one token, of the language model's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patches = config.spatial_merge_size**2
        width = config.embed_dim * self.patches
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.hidden_size)
        )

    def forward(self, x):
        """(N, width) -> (N / m^2, D): the patches of a token stand side by side."""
        return self.mlp(self.ln_q(x).unflatten(0, (-1, self.patches)).flatten(1))


class VisionTower(nn.Module):
    """A vision transformer for pictures of different sizes at once: their patches are one row."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values):
        """Pictures (3, height, width), a list or one tensor -> tokens (of all of them, D).

        Raises ValueError for sides that are no multiples of a block's."""
        block = self.config.image_size
        patches = []
        angles = []
        for image in pixel_values:
            height, width = image.shape[-2:]
            if height % block or width % block:
                raise ValueError(f"a picture of {height} x {width} pixels: no multiples of {block}")
            patches.append(patches_of(image, self.config))
            rows = height // self.config.patch_size
            columns = width // self.config.patch_size
            angles.append(patch_angles(rows, columns, self.config, image.device))
        lengths = [len(of_image) for of_image in patches]
        x = self.patch_embed(torch.cat(patches))  # (N, width)
        cos, sin = cos_and_sin(torch.cat(angles), torch.float32)  # (N, head_dim)
        for layer in self.blocks:
            x = layer(x, cos, sin, lengths)
        return self.merger(x)


# ---- M-RoPE
def mrope(positions, config: TextConfig, dtype: torch.dtype):
    """`rotary_embedding` for three positions: each angle turns by one of them.

    positions: (3, B, T), time, row and column. Returns two tensors (B, 1, T, head_dim)."""
    axes = []  # of each angle
    for axis, count in enumerate(config.mrope_section):
        axes += [axis] * count
    by_angle = positions[axes].permute(1, 2, 0)[:, None]  # (B, 1, T, head_dim / 2)
    size = config.head_dim
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    angles = by_angle.float() / config.rope_theta**exponents
    return cos_and_sin(angles, dtype)


def walk(ids: list[int], start: int, image_token: int, grids) -> tuple[torch.Tensor, int]:
    """The three positions of a row of tokens that begins at position `start`, (3, T).

    A word's three positions are equal, and one more than the word's before. All tokens of a picture
    have the time at which it begins; rows and columns are counted from there. What follows goes on
    behind the largest position. grids: an iterator over (rows, columns), of each picture's tokens.
    Also returns by how much the row's later positions lie behind their places in it."""
    parts = []
    position = start
    place = 0
    while place < len(ids):
        if ids[place] == image_token:
            rows, columns = next(grids)
            y = torch.arange(rows).repeat_interleave(columns)
            x = torch.arange(columns).repeat(rows)
            parts.append(torch.stack([torch.zeros_like(y), y, x]) + position)
            position += max(rows, columns)
            place += rows * columns
        else:
            end = place
            while end < len(ids) and ids[end] != image_token:
                end += 1
            words = torch.arange(position, position + end - place)
            parts.append(words.expand(3, -1))
            position += end - place
            place = end
    return torch.cat(parts, dim=1), position - start - len(ids)


class MRoPELanguageModel(LanguageModel):
    """Qwen2, turned by three positions."""

    def forward(self, x, positions, cache=None):
        """Embeddings (B, T, D), positions (3, B, T) -> hidden states, as `LanguageModel`."""
        if cache is not None:
            cache.extend(x.shape[1])  # the places in the cache are still 0, 1, 2, ...
        cos, sin = mrope(positions, self.config, x.dtype)
        return self.run_layers(x, cos, sin, cache)


class Cache(KVCache):
    """A KVCache that knows how far positions and places of a row have come apart."""

    def __init__(self, config: TextConfig, batch_size: int, dtype: torch.dtype, device):
        super().__init__(config, batch_size, dtype, device)
        self.shifts = [0] * batch_size


# ---- Names
def our_name(name: str) -> str:
    """Any of the layouts in the wild -> the names of `Qwen2VL.state_dict()`.

    layout    language model               head      vision tower
    released  model.layers                 lm_head   visual.
    new       model.language_model.layers  lm_head   model.visual.
    bare      language_model.layers        -         visual."""
    name = re.sub(r"^(model\.)?visual\.", "vision_tower.", name)
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "language_model.", name)
    return re.sub(r"^model\.", "language_model.", name)


def stored_name(name: str) -> str:
    """Our names -> those of the released files, which every version of transformers reads."""
    name = re.sub(r"^language_model\.", "model.", name)
    return re.sub(r"^vision_tower\.", "visual.", name)


def is_unused(name: str) -> bool:
    """Buffers that old files hold and are computed here."""
    return name.endswith(".inv_freq")


def find_tensors(folder: Path, shapes: dict, config: Qwen2VLConfig) -> dict:
    """`hf.find_tensors` for Qwen2-VL; a head that is tied may be absent."""
    optional = ("lm_head.weight",) if config.text.tie_word_embeddings else ()
    return hf.find_tensors(folder, shapes, our_name, is_unused, optional)


# ---- Qwen2-VL
class Qwen2VL(Llava):
    """Generation and loading are Llava's; the forward pass adds positions."""

    config_class = Qwen2VLConfig
    language_model_name = "language_model"
    find_tensors = staticmethod(find_tensors)

    def __init__(self, config: Qwen2VLConfig):
        nn.Module.__init__(self)
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.add_language_model(MRoPELanguageModel(config.text))

    def image_features(self, pixel_values):
        """Pictures (3, height, width), a list or one tensor -> a list of (rows, columns, D).

        The tokens of each picture lie as they do in it: `forward` needs their places."""
        features = self.vision_tower(pixel_values)  # (tokens of all, D)
        side = self.config.vision.image_size
        grids = [(image.shape[-2] // side, image.shape[-1] // side) for image in pixel_values]
        of_each = features.split([rows * columns for rows, columns in grids])
        return [tokens.unflatten(0, grid) for tokens, grid in zip(of_each, grids)]

    def forward(self, input_ids, pixel_values=None, image_features=None, cache=None):
        """Hidden states (B, T, D) after the final norm; arguments as in `Llava.forward`.

        pixel_values, image_features: what `image_features` takes and returns."""
        embeddings = self.language_model.embed_tokens(input_ids)  # (B, T, D)
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)
        if image_features is not None:
            rows = torch.cat([tokens.flatten(0, 1) for tokens in image_features])
            embeddings = self.insert_images(input_ids, embeddings, rows)
        positions = self.positions(input_ids, image_features, cache)
        return self.language_model(embeddings, positions, cache)

    def positions(self, input_ids, image_features, cache):
        """Time, row and column of every token, (3, B, T)."""
        B, T = input_ids.shape
        starts = [0] * B
        if cache is not None:
            starts = [len(row) + shift for row, shift in zip(cache.tokens, cache.shifts)]
        if image_features is None:
            first = torch.tensor(starts, device=input_ids.device)[:, None]  # (B, 1)
            positions = first + torch.arange(T, device=input_ids.device)
            return positions.expand(3, B, T)
        grids = iter([tokens.shape[:2] for tokens in image_features])
        rows = []
        for index, ids in enumerate(input_ids.tolist()):
            row, shift = walk(ids, starts[index], self.config.image_token_id, grids)
            rows.append(row)
            if cache is not None:
                cache.shifts[index] += shift
        return torch.stack(rows, dim=1).to(input_ids.device)

    def new_cache(self, batch_size: int) -> Cache:
        return Cache(self.config.text, batch_size, self.dtype, self.device)

    def check_prompts(self, prompts, new_tokens, pixel_values, max_new_tokens: int) -> None:
        """As `Llava.check_prompts`; videos are refused too."""
        super().check_prompts(prompts, new_tokens, pixel_values, max_new_tokens)
        if any(self.config.video_token_id in row for row in new_tokens):
            raise ValueError("the prompts hold video tokens: videos are not implemented")

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
