"""LLaVA in pure PyTorch: a vision tower, a projector, a language model.

    model = Llava.from_pretrained("llava-1.5-7b-hf", dtype=torch.bfloat16, device="cuda")
    hidden = model(input_ids, pixel_values)                         # (B, T, D), after the norm
    answers = model.generate([[1, 3148, 1001, ...]], pixel_values)  # lists of token ids

Images and token ids go in, hidden states come out. One class per box of the diagram, from the
bottom up: configuration, vision tower, projector, language model, cache, LLaVA. Attributes carry
the names of Hugging Face's parameters, so that loading is a renaming of prefixes and nothing else
(formats/hf.py does it). What the other modules need of a model is written in backbones/__init__.py.

Axes: B batch, T tokens, S cached tokens, N image tokens, D hidden, H heads, K key/value heads,
V vocabulary.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from formats import hf


# ---- Configuration ----
# Hugging Face's keys and defaults: a released config.json leaves out what equals a default.
@dataclass
class VisionConfig:
    """A CLIP or SigLIP vision tower. The defaults are CLIP's; formats/hf.py knows SigLIP's."""

    model_type: str = "clip_vision_model"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def is_clip(self) -> bool:
        """CLIP has a class token and a norm before the first layer; SigLIP has neither."""
        return self.model_type == "clip_vision_model"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_states(self) -> int:
        """Hidden states of one image: its patches, and CLIP's class token in front of them."""
        patches = (self.image_size // self.patch_size) ** 2
        return patches + 1 if self.is_clip else patches


def clip_large_336() -> VisionConfig:
    """CLIP ViT-L/14 at 336 pixels: LLaVA-1.5's tower, and that of a file that names none."""
    return VisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


@dataclass
class TextConfig:
    """A LLaMA or Qwen2 language model. The defaults are LLaMA's; formats/hf.py knows Qwen2's."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama-3.1's, for `longer_periods`; None: as RoPE was
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        if not self.head_dim:
            self.head_dim = self.hidden_size // self.num_attention_heads


@dataclass
class LlavaConfig:
    vision: VisionConfig = field(default_factory=clip_large_336)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32000
    pad_token_id: int | None = None  # kept for the file: padding is never looked at here
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int = -2  # the last layer of CLIP serves CLIP's own task, not LLaVA's
    vision_feature_select_strategy: str = "default"  # or "full", with the class token
    eos_token_ids: tuple[int, ...] = (2,)  # generation stops at any of them

    @property
    def num_vision_layers(self) -> int:
        """Layers up to LLaVA's feature layer, which may be counted from the end.

        Hidden state 0 is the tower's input, hidden state i the output of layer i - 1."""
        num_hidden_states = self.vision.num_hidden_layers + 1
        return self.vision_feature_layer % num_hidden_states

    @property
    def num_image_tokens(self) -> int:
        """Positions that one image takes in `input_ids`: 576 in LLaVA-1.5."""
        # "default" leaves out the first state, whatever it is: CLIP's class token.
        if self.vision_feature_select_strategy == "default":
            return self.vision.num_states - 1
        return self.vision.num_states

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LlavaConfig":
        """Read config.json, and the stop tokens of generation_config.json. Raises InputError."""
        config = hf.read_llava_config(Path(folder), cls, VisionConfig, TextConfig)
        hf.check_llava_config(Path(folder), config, ACTIVATIONS)
        return config

    def to_dict(self) -> dict:
        """The content of a Hugging Face config.json."""
        return hf.llava_config_to_dict(self)

    def processor_keys(self) -> dict:
        """What processor_config.json must say, so that transformers counts as many image tokens."""
        return hf.llava_processor_keys(self)


def quick_gelu(x):
    """The approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,  # the exact one, by erf
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


def split_heads(x, head_dim: int):
    """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


# ---- Vision tower ----
# CLIP: arXiv 2103.00020, github.com/openai/CLIP (model.py). SigLIP: arXiv 2303.15343.
class VisionEmbeddings(nn.Module):
    """An image -> a sequence of patches that know their places."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        # A convolution whose stride is its size is one linear layer for all patches.
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            D,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=not config.is_clip,
        )
        self.position_embedding = nn.Embedding(config.num_states, D)
        # The class token sums up the image for CLIP. LLaVA-1.5 leaves it out, but patches see it.
        self.class_embedding = None
        if config.is_clip:
            self.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)

    def forward(self, pixel_values):
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(pixel_values)  # (B, D, rows, columns)
        x = x.flatten(2).transpose(1, 2)  # (B, patches, D), row by row
        if self.class_embedding is not None:
            class_token = self.class_embedding.expand(len(x), 1, -1)  # (B, 1, D)
            x = torch.cat([class_token, x], dim=1)
        return x + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Multi-head attention in which every patch sees every patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        q = split_heads(self.q_proj(x), self.head_dim)  # (B, H, N, head_dim)
        k = split_heads(self.k_proj(x), self.head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v)  # no mask: an image has no order
        y = y.transpose(1, 2).flatten(2)  # (B, N, D)
        return self.out_proj(y)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x):
        h = x + self.self_attn(self.layer_norm1(x))
        return h + self.mlp(self.layer_norm2(h))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(num_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """A vision transformer that ends at LLaVA's feature layer.

    The layers after it are neither held nor computed, and no norm follows."""

    def __init__(self, config: VisionConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config, num_layers)
        # The name is misspelled in CLIP's checkpoints.
        self.pre_layrnorm = nn.Identity()
        if config.is_clip:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values):
        """The feature layer's hidden states.

        pixel_values: (B, 3, image_size, image_size), normalised; cast to the tower's dtype.
        Returns (B, patches, D), with CLIP (B, 1 + patches, D).
        Raises ValueError for images of another size."""
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            found = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values {found} are not {size} pixels square")
        x = self.embeddings(pixel_values)
        x = self.pre_layrnorm(x)
        return self.encoder(x)


# ---- Projector ----
class MultiModalProjector(nn.Module):
    """From the vision tower's width to the language model's (LLaVA-1.5: arXiv 2310.03744)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        D = config.text.hidden_size
        bias = config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.vision.hidden_size, D, bias=bias)
        self.activation = ACTIVATIONS[config.projector_hidden_act]
        self.linear_2 = nn.Linear(D, D, bias=bias)

    def forward(self, features):
        return self.linear_2(self.activation(self.linear_1(features)))


# ---- Language model ----
# LLaMA: arXiv 2302.13971. Qwen2 (arXiv 2407.10671) is the same with biases on q, k and v.
def rotary_embedding(
    positions, head_dim: int, theta: float, dtype: torch.dtype, scaling: dict | None = None
):
    """Cosines and sines by which `rotate` turns queries and keys (RoPE, arXiv 2104.09864).

    positions: (B or 1, T). scaling: see `longer_periods`.
    Returns two tensors (B or 1, 1, T, head_dim) in `dtype`. Each angle stands there twice, as two
    numbers turn by it; the first half of the sines is negated."""
    # The angles need fp32: bf16 cannot tell position 256 from 257.
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    periods = theta**exponents  # how many positions one radian takes
    if scaling is not None:
        periods = longer_periods(periods, scaling)
    angles = positions[:, None, :, None].float() / periods  # (B or 1, 1, T, head_dim / 2)
    return cos_and_sin(angles, dtype)


def longer_periods(periods, scaling: dict):
    """Llama-3.1's change to RoPE for long texts (arXiv 2407.21783): slow angles turn more slowly.
    LLaVA-1.5 has none of it: to be skipped at a first reading.

    What turns often within the old context keeps its period. What does not even turn
    `low_freq_factor` times in it takes `factor` times as long; in between, it is blended."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * periods)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for fast angles, 0 for slow ones
    return 1 / (kept / periods + (1 - kept) / (scaling["factor"] * periods))


def cos_and_sin(angles, dtype: torch.dtype):
    """Angles (..., head_dim / 2) -> what `rotate` takes, two tensors (..., head_dim).

    On its own because Qwen2-VL comes to its angles in another way."""
    cos = angles.cos()
    sin = angles.sin()
    cos = torch.cat([cos, cos], dim=-1)
    sin = torch.cat([-sin, sin], dim=-1)
    return cos.to(dtype), sin.to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + head_dim / 2]) of queries or keys by its position's angle.

    (a, b) becomes (a cos - b sin, b cos + a sin). The paper pairs neighbours; Hugging Face's
    weights are laid out for pairs half a head apart.
    x: (B, H, T, head_dim), cos and sin of `rotary_embedding`. Returns the shape of x."""
    partner = x.roll(x.shape[-1] // 2, dims=-1)  # x with its halves swapped
    # This is x * cos + partner * sin, rounded once less, without a tensor for the second product.
    return torch.addcmul(x * cos, partner, sin)


class Attention(nn.Module):
    """Causal attention; several query heads may share keys and values (GQA, arXiv 2305.13245)."""

    def __init__(self, config: TextConfig, layer_index: int):
        super().__init__()
        D = config.hidden_size
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.layer_index = layer_index  # this layer's place in a cache
        self.head_dim = config.head_dim
        self.is_grouped = config.num_attention_heads != config.num_key_value_heads
        # Qwen2's config.json does not mention its biases.
        has_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, query_size, bias=has_bias)
        self.k_proj = nn.Linear(D, key_size, bias=has_bias)
        self.v_proj = nn.Linear(D, key_size, bias=has_bias)
        self.o_proj = nn.Linear(query_size, D, bias=config.attention_bias)

    def forward(self, x, cos, sin, cache=None):
        q = split_heads(self.q_proj(x), self.head_dim)  # (B, H, T, head_dim)
        k = split_heads(self.k_proj(x), self.head_dim)  # (B, K, T, head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        # Without a mask, attention is causal by a flag: that is the fast kernel.
        mask = None
        if cache is not None:
            # Now k and v also hold what was seen before: (B, K, S, head_dim). The mask is
            # (B, 1, T, S), or None as long as there is nothing before.
            k, v, mask = cache.update(self.layer_index, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.is_grouped
        )
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * head_dim)
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        D = config.hidden_size
        hidden = config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden, D, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer_index: int):
        super().__init__()
        # Norms stand in front of what they feed, so that x itself runs through all layers.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        h = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # So many of the first layers keep only their input for the backward pass, and compute the
        # rest a second time: less memory, more time.
        self.checkpoint_layers = 0

    def forward(self, x, cache=None):
        """Embeddings (B, T, D) -> hidden states (B, T, D) after the final norm.

        With a cache, x continues its rows. There is no padding mask: padding stands on the RIGHT,
        and as attention is causal, no real token sees it."""
        T = x.shape[1]
        if cache is None:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
        else:
            positions = cache.extend(T)  # (B, T)
        # All layers turn by the same angles.
        config = self.config
        cos, sin = rotary_embedding(
            positions, config.head_dim, config.rope_theta, x.dtype, config.rope_scaling
        )
        return self.run_layers(x, cos, sin, cache)

    def run_layers(self, x, cos, sin, cache):
        """All layers and the final norm. Qwen2-VL enters here, with angles of its own."""
        for index, layer in enumerate(self.layers):
            if index < self.checkpoint_layers and torch.is_grad_enabled():
                # The reentrant kind would give LoRA no gradient, as its input x needs none.
                x = checkpoint(layer, x, cos, sin, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache)
        return self.norm(x)


# ---- Cache ----
class KVCache:
    """Keys and values of the tokens that a batch of conversations has seen.

    `tokens[b]` are the ids that row b holds, and rows may differ in length. What lies after a
    row's last token is padding: it is masked out, and the row's next tokens overwrite it.

    keys, values: (layers, B, K, capacity, head_dim)."""

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        layers = config.num_hidden_layers
        shape = (layers, batch_size, config.num_key_value_heads, 0, config.head_dim)
        # Empty: `reserve` makes room when it is known how much is needed.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        # What `extend` tells the layers' `update` about the tokens that come now.
        self.positions = None  # (B, T)
        self.end = 0  # slots in use
        self.mask = None  # (B, 1, T, S), or None

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens a row at once; growing at every step would copy all."""
        extra = capacity - self.keys.shape[3]
        if extra > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, extra))
            self.values = F.pad(self.values, (0, 0, 0, extra))

    def extend(self, T: int):
        """Announce T new tokens a row -> their positions (B, T).

        The caller adds those that are not padding to `tokens`, after the forward pass."""
        device = self.keys.device
        lengths = [len(row) for row in self.tokens]
        starts = torch.tensor(lengths, device=device)
        self.positions = starts[:, None] + torch.arange(T, device=device)  # (B, T)
        self.end = max(lengths) + T
        self.reserve(self.end)
        self.mask = None
        # With nothing cached, attention among the new tokens is plainly causal: the fast path.
        if any(lengths):
            slots = torch.arange(self.end, device=device)
            self.mask = slots <= self.positions[:, None, :, None]  # (B, 1, T, S)
        return self.positions

    def update(self, layer_index: int, key, value):
        """Store one layer's new keys and values, and return what its queries attend to.

        key, value: (B, K, T, head_dim).
        Returns all keys and values (B, K, S, head_dim) and their mask (B, 1, T, S), True where a
        query may look. With nothing cached before, the new ones and None."""
        keys = self.keys[layer_index]
        values = self.values[layer_index]
        rows = torch.arange(len(self.tokens), device=key.device)[:, None]  # (B, 1)
        # Two indices with a slice between them: their axes (B, T) come first, then K.
        keys[rows, :, self.positions] = key.transpose(1, 2)
        values[rows, :, self.positions] = value.transpose(1, 2)
        if self.mask is None:
            return key, value, None
        return keys[:, :, : self.end], values[:, :, : self.end], self.mask


# ---- LLaVA ----
class Llava(nn.Module):
    """LLaVA (arXiv 2304.08485): image features take the places of image tokens among the words."""

    config_class = LlavaConfig
    language_model_name = "language_model"  # in transformers, and so in adapter files
    find_tensors = staticmethod(hf.find_llava_tensors)  # where the weights lie in its files

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.num_vision_layers)
        self.multi_modal_projector = MultiModalProjector(config)
        self.add_language_model(LanguageModel(config.text))

    def add_language_model(self, language_model: LanguageModel) -> None:
        """The last two parts; other backbones, which have other towers, call this as well.

        The head may be the embedding once more (a tied head)."""
        text = language_model.config
        self.language_model = language_model
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.tie_word_embeddings:
            self.lm_head.weight = language_model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def image_features(self, pixel_values):
        """pixel_values (images, 3, image_size, image_size) -> features (images, N, D)."""
        states = self.vision_tower(pixel_values)
        states = states[:, -self.config.num_image_tokens :]  # CLIP's class token may stay out
        return self.multi_modal_projector(states)

    def forward(self, input_ids, pixel_values=None, image_features=None, cache=None):
        """Hidden states (B, T, D) after the final norm; those at padding are meaningless.

        input_ids: (B, T) int64, padded on the right with any id but the image token's, which
            stands there once per image feature.
        pixel_values: (images, 3, image_size, image_size), all images in reading order; or
        image_features: (images, N, D), where they were computed before.
        cache: a KVCache of what stands in front of input_ids. The caller adds to its `tokens` what
            was not padding.
        Raises ValueError where image tokens and image features differ in number."""
        embeddings = self.language_model.embed_tokens(input_ids)  # (B, T, D)
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)
        if image_features is not None:
            embeddings = self.insert_images(input_ids, embeddings, image_features)
        return self.language_model(embeddings, cache)

    def insert_images(self, input_ids, embeddings, image_features):
        """Put the image features, in order, where `input_ids` has image tokens."""
        is_image = input_ids == self.config.image_token_id  # (B, T)
        # A wrong number would shift features into other images' places without a word.
        num_places = int(is_image.sum())
        num_features = image_features.shape[:-1].numel()
        if num_places != num_features:
            raise ValueError(
                f"input_ids have {num_places} image tokens for {num_features} image features"
            )
        # Places and features are both in reading order: one copy serves all rows and images.
        return embeddings.masked_scatter(is_image[..., None], image_features.to(embeddings.dtype))

    def logits(self, hidden):
        """Hidden states (..., D) -> scores of the next token (..., V)."""
        return self.lm_head(hidden)

    def new_cache(self, batch_size: int) -> KVCache:
        return KVCache(self.config.text, batch_size, self.dtype, self.device)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        pixel_values=None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
    ) -> list[list[int]]:
        """Continue each prompt up to a stop token (config.eos_token_ids) or max_new_tokens.

        prompts: token ids, rows of any lengths, with an image token for every image feature.
        pixel_values: (images, 3, image_size, image_size), the images in reading order.
        temperature, top_p, generator: see `choose_tokens`; at 0 it takes the likeliest token.
        cache: from `new_cache`, for several turns. The prompts are then whole conversations: what
            the cache holds is not computed again, and images in it are not given again.
        Returns each row's new ids, without the stop token. Raises ValueError for prompts that do
        not fit the cache, the model's positions or the images."""
        if cache is None:
            cache = self.new_cache(len(prompts))
        new_tokens = uncached_tokens(prompts, cache)
        self.check_prompts(prompts, new_tokens, pixel_values, max_new_tokens)
        longest = max(len(prompt) for prompt in prompts)
        cache.reserve(longest + max_new_tokens)

        answers: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))  # the rows that have not met a stop token
        for _ in range(max_new_tokens):
            hidden = self.last_hidden_states(new_tokens, pixel_values, cache)  # (B, D)
            pixel_values = None  # from now on the cache holds the images
            chosen = choose_tokens(self.logits(hidden), temperature, top_p, generator).tolist()
            # A row that has stopped stays as it is: what it was fed now is overwritten later.
            for row in running:
                cache.tokens[row] += new_tokens[row]
            running = [row for row in running if chosen[row] not in self.config.eos_token_ids]
            for row in running:
                answers[row].append(chosen[row])
            if not running:
                break
            new_tokens = [[token] for token in chosen]
        return answers

    def check_prompts(self, prompts, new_tokens, pixel_values, max_new_tokens: int) -> None:
        """Raise ValueError where the prompts are too long, or lack their images."""
        needed = max(len(prompt) for prompt in prompts) + max_new_tokens
        known = self.config.text.max_position_embeddings
        if needed > known:
            raise ValueError(
                f"prompt and {max_new_tokens} new tokens need {needed} positions, "
                f"the model has {known}"
            )
        has_images = any(self.config.image_token_id in row for row in new_tokens)
        if has_images and pixel_values is None:
            raise ValueError("the prompts hold image tokens, but there are no pixel_values")

    def last_hidden_states(self, new_tokens: list[list[int]], pixel_values, cache: KVCache):
        """Feed every row its new tokens -> the hidden state at each row's last one, (B, D)."""
        rows = [torch.tensor(row) for row in new_tokens]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)  # (B, T)
        hidden = self(input_ids, pixel_values, cache=cache)  # (B, T, D)
        # Rows are padded on the right, so their last tokens stand in different columns.
        last = [states[len(row) - 1] for states, row in zip(hidden, new_tokens)]
        return torch.stack(last)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Llava":
        """Read a Hugging Face LLaVA folder. Raises InputError that lists all faults at once.

        dtype: what all weights are converted to; None leaves each as it is stored. On the CPU,
        weights that need no conversion are views of the file, read when they are needed."""
        folder = Path(folder)
        config = cls.config_class.from_pretrained(folder)
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = cls.find_tensors(folder, shapes, config)
        tensors = dict(hf.read_tensors(found, dtype, device))
        # A file whose head is tied need not hold it. Where it does, believe the file: a head
        # unlike the embedding is not tied, whatever config.json says.
        embedding = tensors["language_model.embed_tokens.weight"]
        head = tensors.setdefault("lm_head.weight", embedding)
        if config.text.tie_word_embeddings and head is not embedding:
            config.text.tie_word_embeddings = torch.equal(head, embedding)
        model.load_state_dict(tensors, assign=True)
        if config.text.tie_word_embeddings:
            model.lm_head.weight = model.language_model.embed_tokens.weight
        return model.eval()

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a new Hugging Face LLaVA folder: weights, config.json, generation_config.json.

        A temperature that training added (`log_scale`) is no part of it. Raises FileExistsError
        where there are weights already, ValueError where LoRA is not merged."""
        tensors = self.base_tensors()
        # The tower is written as it is held: its last layer is the feature layer.
        vision = replace(self.config.vision, num_hidden_layers=self.config.num_vision_layers)
        config = replace(self.config, vision=vision, vision_feature_layer=-1)
        content = config.to_dict()
        content["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        stop_tokens = list(config.eos_token_ids)
        hf.write_llava(Path(folder), tensors, content, stop_tokens, max_shard_bytes)

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """The state dict without what training added. Raises ValueError where LoRA is in it."""
        with torch.device("meta"):  # shapes without memory
            own_names = type(self)(self.config).state_dict().keys()
        tensors = {}
        for name, tensor in self.state_dict().items():
            # What a loss learns, such as the temperature, stands beside the model's parts.
            is_of_a_loss = "." not in name and name not in own_names
            if not is_of_a_loss:
                tensors[name] = tensor
        if any(".lora_A." in name for name in tensors):
            raise ValueError("the model has LoRA in it: merge_lora first, or save_adapter")
        return tensors


def uncached_tokens(prompts: list[list[int]], cache: KVCache) -> list[list[int]]:
    """What each prompt says after the tokens that the cache holds. Raises ValueError."""
    if len(prompts) != len(cache.tokens):
        raise ValueError(f"{len(prompts)} prompts for a cache of {len(cache.tokens)} rows")
    new_tokens = []
    for prompt, seen in zip(prompts, cache.tokens):
        rest = prompt[len(seen) :]
        if not rest or prompt[: len(seen)] != seen:
            raise ValueError(
                "a prompt must begin with the tokens that the cache holds, and go on after them"
            )
        new_tokens.append(rest)
    return new_tokens


def choose_tokens(
    logits,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
):
    """logits (B, V) -> the next token's id (B,).

    temperature: 0 takes the likeliest token; above, it is drawn: low is careful, high is bold.
    top_p: drawn only among the likeliest tokens that together hold so much of the probability
        (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # In fp32: in bf16, sums of many small probabilities go nowhere.
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    probabilities, ids = probabilities.sort(dim=-1, descending=True)
    # A token stays if those in front of it do not hold enough: the first one always does.
    in_front = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities * (in_front < top_p)
    picked = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1), places in `ids`
    return ids.gather(-1, picked).squeeze(-1)
