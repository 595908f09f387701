"""LLaVA in pure PyTorch: a vision tower, a two-layer projector, a language model. Images and ids in, hidden states out.

    model = Llava.from_pretrained("llava-1.5-7b-hf", dtype=torch.bfloat16, device="cuda")
    hidden = model(input_ids, pixel_values)                          # (B, T, D), after the final norm
    answers = model.generate([[1, 3148, 1001, ...]], pixel_values)   # lists of token ids

One class per box of the diagram, from the bottom up. Attributes carry the names of Hugging Face's parameters, so that
loading is a renaming of prefixes and nothing else; what is read and what is refused is at the end of the file.

Axes: B batch, T tokens, S cached tokens, N image tokens, D hidden, H heads, K key/value heads, V vocabulary.
"""

import json
import re
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, what was found and what to do."""


# ---- Configuration: Hugging Face's keys and defaults, as released config.json files omit what equals a default.
@dataclass
class VisionConfig:
    """A CLIP or SigLIP vision tower; these are CLIP's defaults, what differs for SigLIP is in `DEFAULTS`."""

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

    # CLIP has a class token and a norm before the first layer, SigLIP a bias on the patch embedding.
    is_clip = property(lambda self: self.model_type == "clip_vision_model")
    # Of one image: its patches, and CLIP's class token in front of them.
    num_states = property(lambda self: (self.image_size // self.patch_size) ** 2 + self.is_clip)


@dataclass
class TextConfig:
    """A LLaMA or Qwen2 language model; these are LLaMA's defaults, what differs for Qwen2 is in `DEFAULTS`."""

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
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# What an absent key means, where it differs from the dataclasses above.
QWEN2 = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
SIGLIP = {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
VISION, TEXT = {"clip_vision_model": {}, "siglip_vision_model": SIGLIP}, {"llama": {}, "qwen2": QWEN2}
DEFAULTS = {VisionConfig: VISION, TextConfig: TEXT}
CLIP_LARGE_336 = VisionConfig("clip_vision_model", 1024, 4096, 24, 16, 3, 336, 14)  # where vision_config is absent
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
ACTIVATIONS["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)  # "gelu" is the exact (erf) form


@dataclass
class LlavaConfig:
    vision: VisionConfig = field(default_factory=lambda: replace(CLIP_LARGE_336))
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32000
    pad_token_id: int | None = None
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    eos_token_ids: tuple[int, ...] = (2,)  # generation stops at any of them

    # Hidden state 0 is the tower's input, hidden state i the output of layer i - 1.
    num_vision_layers = property(lambda self: self.vision_feature_layer % (self.vision.num_hidden_layers + 1))

    @property
    def num_image_tokens(self) -> int:  # positions of one image in `input_ids`: 576 in LLaVA-1.5
        return self.vision.num_states - (self.vision_feature_select_strategy == "default")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LlavaConfig":
        """Read `folder`/config.json, and the stop tokens of generation_config.json. Raises CheckpointError."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        refuse_unsupported(path, raw)
        v = read_section(VisionConfig, path, "vision_config", raw, absent=vars(CLIP_LARGE_336))
        t = read_section(TextConfig, path, "text_config", raw, absent={})
        t.tie_word_embeddings |= raw.get("tie_word_embeddings") is True  # a tied head is announced at either level
        stops = read_stop_tokens(Path(folder) / "generation_config.json", raw.get("text_config") or {})
        raw = {"image_token_id": raw.get("image_token_index")} | raw  # the old name of the key; the new one wins
        config = read_fields(cls, f"{path}: ", raw, vision=v, text=t, eos_token_ids=stops)
        act, strategy = config.projector_hidden_act, config.vision_feature_select_strategy
        layer, image = config.vision_feature_layer, config.image_token_id
        rules = {  # what is said of a rule that does not hold
            f"hidden_act {v.hidden_act!r} or {act!r} is unknown": {v.hidden_act, act} <= ACTIVATIONS.keys(),
            f"text_config.hidden_act {t.hidden_act!r} is not 'silu'": t.hidden_act == "silu",
            f"vision_feature_select_strategy {strategy!r} is unknown": strategy in ("default", "full"),
            f"vision heads do not divide {v.hidden_size}": v.hidden_size % v.num_attention_heads == 0,
            f"{t.num_key_value_heads} key/value heads do not fit": t.num_attention_heads % t.num_key_value_heads == 0,
            f"head_dim {t.head_dim} is not even, rotary embeddings need it": t.head_dim % 2 == 0 < t.head_dim,
            f"patch_size {v.patch_size} > image_size {v.image_size}": v.patch_size <= v.image_size,
            "more than 1000 layers": max(v.num_hidden_layers, t.num_hidden_layers) <= 1000,
            f"no vision layer {layer}": 0 < abs(layer) <= v.num_hidden_layers,
            f"image_token_index {image} is not a token": 0 < image < t.vocab_size,
        }
        if faults := [fault for fault, holds in rules.items() if not holds]:
            raise CheckpointError(f"{path}: " + "; ".join(faults))
        return config

    def to_dict(self) -> dict:  # the config.json of a Hugging Face LLaVA folder
        ours = ("vision", "text", "image_token_id", "eos_token_ids")
        raw = {key: value for key, value in vars(self).items() if key not in ours}
        raw |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
        raw |= {"image_token_index": self.image_token_id, "image_seq_length": self.num_image_tokens}
        raw |= {"vision_config": vars(self.vision) | {"vision_use_head": False}}  # LLaVA has no pooling head
        raw |= {"text_config": vars(self.text) | {"eos_token_id": next(iter(self.eos_token_ids), None)}}
        return raw | {"tie_word_embeddings": self.text.tie_word_embeddings}


# ---- Vision tower. CLIP: github.com/openai/CLIP (model.py); SigLIP: arXiv 2303.15343. Patches attend both ways.
def heads(x, head_dim: int):  # (B, T, H * head_dim) -> (B, H, T, head_dim)
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.head_dim, self.activation = D // config.num_attention_heads, ACTIVATIONS[config.hidden_act]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, hidden), "fc2": nn.Linear(hidden, D)})

    def forward(self, x):
        attention, y = self.self_attn, self.layer_norm1(x)
        q, k, v = (heads(proj(y), self.head_dim) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        x = x + attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class VisionTower(nn.Module):
    """A vision transformer that ends at LLaVA's feature layer: what lies behind is neither held nor computed."""

    def __init__(self, config: VisionConfig, num_layers: int):
        super().__init__()
        self.config, D, P = config, config.hidden_size, config.patch_size
        self.embeddings, self.encoder = nn.Module(), nn.Module()  # names in the checkpoint, nothing more
        self.embeddings.patch_embedding = nn.Conv2d(config.num_channels, D, P, stride=P, bias=not config.is_clip)
        self.embeddings.position_embedding = nn.Embedding(config.num_states, D)
        if config.is_clip:  # whose checkpoints spell it "layrnorm"
            self.embeddings.class_embedding = nn.Parameter(torch.randn(D) * D**-0.5)
        self.pre_layrnorm = nn.LayerNorm(D, eps=config.layer_norm_eps) if config.is_clip else nn.Identity()
        self.encoder.layers = nn.Sequential(*(VisionLayer(config) for _ in range(num_layers)))

    def forward(self, pixel_values):
        """pixel_values (B, 3, image_size, image_size) -> the feature layer's hidden state (B, patches (+ 1), D)."""
        if pixel_values.shape[-2:] != (self.config.image_size,) * 2:
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)} are not {self.config.image_size} pixels square")
        x = self.embeddings.patch_embedding(pixel_values.to(self.embeddings.patch_embedding.weight.dtype))
        x = x.flatten(2).transpose(1, 2)  # (B, patches, D), row by row
        if self.config.is_clip:
            x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return self.encoder.layers(self.pre_layrnorm(x + self.embeddings.position_embedding.weight))


class MultiModalProjector(nn.Module):  # from the vision tower's width to the language model's: arXiv 2310.03744
    def __init__(self, config: LlavaConfig):
        super().__init__()
        D, bias = config.text.hidden_size, config.multimodal_projector_bias
        self.linear_1, self.linear_2 = nn.Linear(config.vision.hidden_size, D, bias=bias), nn.Linear(D, D, bias=bias)
        self.activation = ACTIVATIONS[config.projector_hidden_act]

    def forward(self, features):
        return self.linear_2(self.activation(self.linear_1(features)))


# ---- Language model: LLaMA (arXiv 2302.13971); Qwen2 is the same with biases on q, k and v.
def rotary_embedding(positions, head_dim: int, theta: float, dtype: torch.dtype):
    """Cosine and sine of every position's angles, in fp32 until the last cast (RoPE, arXiv 2104.09864).
    positions (B or 1, T) -> two tensors (B or 1, 1, T, head_dim), the angles twice, the first half's sine negated."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None, :, None].float() / theta**exponents  # (B or 1, 1, T, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + head_dim / 2]); Hugging Face's weights are laid out for halves, not neighbours."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def project(x, *layers):
    """One input through several linear layers; LoRA's layers (lora.py) do it at once."""
    at_once = all(hasattr(layer, "project") for layer in layers)
    return layers[0].project(x, layers) if at_once else [layer(x) for layer in layers]


def made_of(function, *inputs):
    """function(*inputs) with its recipe: who needs it for gradients makes it again. It must not be changed in place."""
    result = function(*inputs)
    if not torch.compiler.is_compiling():  # the compiler decides for itself what to keep
        result.recipe = function, inputs
    return result


class SwiGLU(torch.autograd.Function):  # silu(gate) * up (arXiv 2002.05202), which keeps nothing but its inputs
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        D, hidden, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.grouped = head_dim, H != K
        self.input_layernorm = nn.RMSNorm(D, config.rms_norm_eps)
        sizes = {"q_proj": H * head_dim, "k_proj": K * head_dim, "v_proj": K * head_dim}
        bias = config.attention_bias or config.model_type == "qwen2"
        self.self_attn = nn.ModuleDict({name: nn.Linear(D, size, bias=bias) for name, size in sizes.items()})
        self.self_attn["o_proj"] = nn.Linear(H * head_dim, D, bias=config.attention_bias)
        self.post_attention_layernorm = nn.RMSNorm(D, config.rms_norm_eps)
        shapes = {"gate_proj": (D, hidden), "up_proj": (D, hidden), "down_proj": (hidden, D)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=config.mlp_bias) for name, shape in shapes.items()})

    def forward(self, x, cos, sin, cache=None, layer=0):
        x = x + self.attend(made_of(self.input_layernorm, x), cos, sin, cache, layer)
        gate, up = project(made_of(self.post_attention_layernorm, x), self.mlp.gate_proj, self.mlp.up_proj)
        gated = F.silu(gate) * up if torch.compiler.is_compiling() else made_of(SwiGLU.apply, gate, up)
        return x + self.mlp.down_proj(gated)

    def attend(self, x, cos, sin, cache, layer):
        attention = self.self_attn
        q, k, v = (heads(y, self.head_dim) for y in project(x, attention.q_proj, attention.k_proj, attention.v_proj))
        q, k, mask = rotate(q, cos, sin), rotate(k, cos, sin), None
        if cache is not None:
            k, v, mask = cache.update(layer, k, v)  # (B, K, S, head_dim) and (B, 1, T, S), no mask on first use
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return attention.o_proj(x.transpose(1, 2).flatten(2))


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpoint_layers = 0  # the first layers keep only their input, and are computed again for the gradients

    def forward(self, x, cache=None):
        """Embeddings (B, T, D) -> hidden states (B, T, D) after the final norm; with a cache, they continue its rows.
        Attention is causal and needs no padding mask, as padding stands on the RIGHT: no real token sees it."""
        positions = torch.arange(x.shape[1], device=x.device)[None] if cache is None else cache.extend(x.shape[1])
        cos, sin = rotary_embedding(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            if index < self.checkpoint_layers and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)  # reentrant, LoRA would get no gradient
            x = layer(x, cos, sin, cache, index)
        return self.norm(x)


class KVCache:
    """Keys and values of the tokens that a batch of conversations has seen. `tokens[b]` are the ids that row b holds;
    rows may differ in length: what lies behind a row's last token is padding, masked out and overwritten later."""

    def __init__(self, config: TextConfig, batch_size: int, dtype: torch.dtype, device: torch.device | str):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]

    def reserve(self, capacity: int) -> None:  # tokens a row, at once, so that generation need not grow at every step
        if (extra := capacity - self.keys.shape[3]) > 0:
            self.keys, self.values = (F.pad(x, (0, 0, 0, extra)) for x in (self.keys, self.values))

    def extend(self, T: int):
        """Announce T new tokens a row -> their positions (B, T). `tokens` is the caller's to update afterwards."""
        lengths = torch.tensor([len(row) for row in self.tokens], device=self.keys.device)
        self.positions = lengths[:, None] + torch.arange(T, device=lengths.device)
        self.end = max(map(len, self.tokens)) + T
        self.reserve(self.end)
        slots = torch.arange(self.end, device=lengths.device)
        # (B, 1, T, S), or none: with nothing cached, attention among the new tokens is plainly causal, the fast path.
        self.mask = slots <= self.positions[:, None, :, None] if any(self.tokens) else None
        return self.positions

    def update(self, layer: int, key, value):
        """Store key and value (B, K, T, head_dim) of one layer -> all keys and values to attend to, and their mask."""
        rows = torch.arange(len(self.tokens), device=key.device)[:, None]
        self.keys[layer][rows, :, self.positions] = key.transpose(1, 2)
        self.values[layer][rows, :, self.positions] = value.transpose(1, 2)
        if self.mask is None:
            return key, value, None
        return self.keys[layer][:, :, : self.end], self.values[layer][:, :, : self.end], self.mask


# ---- LLaVA: arXiv 2304.08485.
class Llava(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.num_vision_layers)
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = LanguageModel(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)

    def image_features(self, pixel_values):
        """pixel_values (images, 3, height, width) -> what takes the place of the image tokens (images, N, D)."""
        states = self.vision_tower(pixel_values)[:, -self.config.num_image_tokens :]  # CLIP's class token may stay out
        return self.multi_modal_projector(states)

    def forward(self, input_ids, pixel_values=None, image_features=None, cache=None):
        """ids (and images) -> hidden states (B, T, D) after the final norm; those at padding are meaningless.
        input_ids: (B, T) int64, padded on the right with 0; the image token's id once per image feature.
        pixel_values: (images, 3, image_size, image_size) in reading order, or their image_features: (images, N, D).
        cache: holds what stands in front of input_ids; the caller extends its `tokens` by what was not padding."""
        embeddings = self.language_model.embed_tokens(input_ids)
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)
        if image_features is not None:
            is_image = input_ids == self.config.image_token_id
            places, features = int(is_image.sum()), image_features[..., 0].numel()
            if places != features:
                raise ValueError(f"input_ids have {places} image tokens for {features} image features")
            embeddings = embeddings.masked_scatter(is_image[..., None], image_features.to(embeddings.dtype))
        return self.language_model(embeddings, cache)

    def logits(self, hidden):  # (..., D) -> (..., V), of the next token
        return self.lm_head(hidden)

    def new_cache(self, batch_size: int) -> KVCache:
        return KVCache(self.config.text, batch_size, self.dtype, self.device)

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], pixel_values=None, max_new_tokens: int = 128, temperature: float = 0.0,
        top_p: float = 1.0, generator: torch.Generator | None = None, cache: KVCache | None = None
    ) -> list[list[int]]:  # fmt: skip
        """Continue each prompt up to a stop token (config.eos_token_ids) or max_new_tokens -> each row's new ids.
        prompts: token ids, rows of any lengths, image tokens expanded; pixel_values: their images in reading order.
        temperature: 0 picks the likeliest token (greedy), above samples, among those that together hold top_p > 0.
        cache: from `new_cache`; pass the whole conversation: what is cached is not computed again, nor its images."""
        cache = cache if cache is not None else self.new_cache(len(prompts))
        new = [prompt[len(seen) :] for prompt, seen in zip(prompts, cache.tokens, strict=True)]
        if any(not row or seen + row != prompt for row, seen, prompt in zip(new, cache.tokens, prompts)):
            raise ValueError("a prompt must begin with the tokens that the cache holds, and go on behind them")
        longest, known = max(map(len, prompts)) + max_new_tokens, self.config.text.max_position_embeddings
        if longest > known:
            raise ValueError(f"prompt and {max_new_tokens} new tokens need {longest} positions, the model has {known}")
        cache.reserve(longest)
        if pixel_values is None and any(self.config.image_token_id in row for row in new):
            raise ValueError("the prompts hold image tokens, but there are no pixel_values")
        answers, running = [[] for _ in prompts], range(len(prompts))
        for _ in range(max_new_tokens):
            input_ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in new], batch_first=True).to(self.device)
            hidden, pixel_values = self(input_ids, pixel_values, cache=cache), None
            last = torch.stack([states[len(row) - 1] for states, row in zip(hidden, new)])  # (B, D)
            chosen = choose_tokens(self.logits(last), temperature, top_p, generator).tolist()
            for row in running:  # one that has stopped stays as it is: what it is fed now is overwritten later
                cache.tokens[row] += new[row]
            running = [row for row in running if chosen[row] not in self.config.eos_token_ids]
            for row in running:
                answers[row].append(chosen[row])
            if not running:
                break
            new = [[token] for token in chosen]
        return answers

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device: torch.device | str = "cpu") -> "Llava":
        """Read a Hugging Face LLaVA folder onto `device` as `dtype`. Raises CheckpointError with all faults at once."""
        config = LlavaConfig.from_pretrained(folder)
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        load_weights(model, Path(folder), dtype, device)
        return model.eval()

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a new Hugging Face LLaVA folder, safetensors under the old names. The vision tower is written as it is
        held: it ends at the feature layer, which is called -1. Raises FileExistsError where there are weights."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("model*.safetensors")):
            raise FileExistsError(f"{folder}: holds a model already; choose a new folder")
        write_weights(self, folder, max_shard_bytes)
        vision = replace(self.config.vision, num_hidden_layers=self.config.num_vision_layers)
        config = replace(self.config, vision=vision, vision_feature_layer=-1).to_dict()
        config["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        files = {"generation_config": {"eos_token_id": list(self.config.eos_token_ids)}, "config": config}
        for name, content in files.items():  # config.json last: now the folder is complete
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def choose_tokens(logits, temperature: float, top_p: float, generator=None):
    """logits (B, V) -> token ids (B,): greedy at temperature 0, else nucleus sampling (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, ids = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    keep = probabilities.cumsum(dim=-1) - probabilities < top_p  # what stands in front: the first one always stays
    picked = torch.multinomial(probabilities * keep, 1, generator=generator)
    return ids.gather(-1, picked).squeeze(-1)


# ---- Checkpoint files: data from strangers. Names and shapes are checked, nothing is executed, pickle is never opened.
def read_json(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(raw, dict):
            return raw
        raise ValueError(f"a JSON {type(raw).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {broken_download(path)}") from None


def read_section(cls, path: Path, name: str, raw: dict, absent: dict):
    """One of the two sub-configs of config.json; `absent` is what it means where there is none."""
    where, raw = f"{path}: {name}.", absent if raw.get(name) is None else raw[name]
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: {name} is {raw!r}, expected an object")
    known, kind = DEFAULTS[cls], raw.get("model_type") or cls.model_type
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(f"{where}model_type is {kind!r}, supported are {' and '.join(known)}")
    if raw.get("use_sliding_window"):
        raise CheckpointError(f"{where}use_sliding_window is on; sliding windows are not implemented")
    for key in ("rope_scaling", "rope_parameters"):  # old files have `rope_theta`, new ones `rope_parameters`
        rope = raw.get(key) or {}
        kinds = [rope.get("rope_type"), rope.get("type")] if isinstance(rope, dict) else [rope]
        if any(kind not in (None, "default") for kind in kinds) or "factor" in rope:
            raise CheckpointError(f"{where}{key} is {rope!r}; only plain rotary embeddings are implemented")
        raw = raw | {"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
    return read_fields(cls, where, known[kind] | raw)


def read_fields(cls, where: str, raw: dict, **values):
    """Fill the dataclass `cls` from a JSON object, checking type and sign; `values` are known already."""
    for f in fields(cls):
        value = raw.get(f.name)
        if f.name in values or value is None:
            continue
        fits = isinstance(value, f.type) or (f.type is float and isinstance(value, int))
        free = f.name.endswith(("_id", "_layer")) or isinstance(value, str | bool)  # need not be positive
        limit = 2**40 if f.type is float else 2**20  # larger sizes could not even be multiplied
        if not fits or isinstance(value, bool) != (f.type is bool) or not (free or 0 < value <= limit):
            raise CheckpointError(f"{where}{f.name} is {value!r}, expected {getattr(f.type, '__name__', f.type)}")
        values[f.name] = value
    return cls(**values)


def read_stop_tokens(path: Path, text: dict) -> tuple[int, ...]:
    """The ids that end an answer, one or several: generation_config.json's, else text_config's, else LLaMA's."""
    default = {"eos_token_id": 2 if text.get("model_type", "llama") == "llama" else []}
    sources = [read_json(path) if path.exists() else {}, text, default]
    value = next(source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None)
    ids = value if isinstance(value, list) else [value]
    if not all(type(index) is int for index in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected an integer or a list of them")
    return tuple(ids)


def refuse_unsupported(path: Path, raw: dict) -> None:
    kind = raw.get("model_type")
    original = "mm_vision_tower" in raw or "LlavaLlamaForCausalLM" in str(raw.get("architectures"))
    reasons = {
        "the original layout is pickled; use a Hugging Face conversion, such as llava-hf/llava-1.5-7b-hf": original,
        f"model_type is {kind!r}; only 'llava' is supported: LLaVA-1.5 and the interleave models, not LLaVA-NeXT, "
        "OneVision or Qwen2-VL": kind != "llava",
        "the weights are quantised; use the fp16, bf16 or fp32 checkpoint": bool(raw.get("quantization_config")),
        "vision_feature_layer is a list; only one is supported": isinstance(raw.get("vision_feature_layer"), list),
    }
    if reason := next((reason for reason, refused in reasons.items() if refused), None):
        raise CheckpointError(f"{path}: {reason}")


def broken_download(path: Path) -> str:
    """What a file that cannot be read often turns out to be."""
    if not path.is_file():
        return "a Hugging Face LLaVA folder has this file"
    with open(path, "rb") as file:
        head = file.read(8)
    if head == b"version ":
        return "it is a Git LFS pointer: run `git lfs pull`, or download the file itself"
    return f"{'it is an HTML page' if head[:1] == b'<' else 'it may be incomplete'}: download it again"


def open_weights(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); {broken_download(path)}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in transformers' order of precedence. Shards must lie in the folder."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        found = ", ".join(sorted(path.name for path in folder.glob("*.*") if path.suffix != ".json")[:5]) or "nothing"
        advice = "Pickle (.bin) is never read: get the safetensors version, or convert with transformers"
        raise CheckpointError(f"{folder}: no model.safetensors(.index.json), only: {found}. {advice}")
    weight_map = read_json(index).get("weight_map")
    shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not shards or not all(re.fullmatch(r"[^/\\:]+\.safetensors", shard) for shard in shards):
        raise CheckpointError(f"{index}: weight_map must name safetensors files in this folder, not {shards}")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards missing, download them: {missing}")
    return [folder / shard for shard in shards]


def canonical_name(name: str) -> str:
    """Any of the four layouts in the wild -> the names of `Llava.state_dict()`.
    old     language_model.model.layers.0...   language_model.lm_head.weight   vision_tower.vision_model....
    new     model.language_model.layers.0...                  lm_head.weight   model.vision_tower.vision_model....
    newest  model.language_model.layers.0...                  lm_head.weight   model.vision_tower....
    mixed   language_model.model.layers.0...   language_model.lm_head.weight   vision_tower...."""
    name = re.sub(r"^model\.(?=(language_model|vision_tower|multi_modal_projector)\.)", "", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def is_unused(name: str, config: LlavaConfig) -> bool:
    """Tensors that checkpoints hold and LLaVA never reads: the vision tower's end, and buffers computed here."""
    if layer := re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name):
        return config.num_vision_layers <= int(layer[1]) < config.vision.num_hidden_layers
    return bool(re.search(r"^vision_tower\.(post_layernorm|head)\.|\.rotary_emb\.inv_freq$|\.position_ids$", name))


def load_weights(model: Llava, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a model on the meta device its weights: first all names and shapes are checked, then tensors are read."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    found, faults = {}, []
    for path in weight_files(folder):
        with open_weights(path) as file:
            for stored in file.keys():  # noqa: SIM118, the handle is not a dict
                name, tensor = canonical_name(stored), file.get_slice(stored)
                shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
                if is_unused(name, model.config):
                    continue
                if kind not in ("F64", "F32", "F16", "BF16"):
                    raise CheckpointError(f"{path}: {stored} is {kind}: quantised; use the fp16, bf16 or fp32 original")
                wrong = {"unexpected": name not in expected, "twice": name in found}
                wrong |= {f"not of shape {expected.get(name)}": shape != expected.get(name, shape)}
                faults += [f"{what}: {stored} {shape}" for what, is_wrong in wrong.items() if is_wrong]
                found[name] = path, stored
    tied = model.config.text.tie_word_embeddings
    missing = [name for name in expected if name not in found and not (tied and name == "lm_head.weight")]
    if faults := faults + [f"missing: {name} {expected[name]}" for name in missing]:
        shown = faults[:30] + [f"and {len(faults) - 30} more"] * (len(faults) > 30)
        raise CheckpointError(f"{folder}: {len(faults)} tensors do not fit config.json\n  " + "\n  ".join(shown))
    opened, size = None, 0  # tensors are views of the mapped file: only what is converted is copied
    for name, (path, stored) in found.items():
        if path != opened or size > 2**24:  # what was read counts as memory until the file is closed
            file, opened, size = open_weights(path), path, 0
        tensor = file.get_tensor(stored).to(device=device, dtype=dtype)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
        size += tensor.nbytes
    if tied and "lm_head.weight" in found:  # believe the file: a head unlike the embedding is not tied
        tied = torch.equal(model.lm_head.weight, model.language_model.embed_tokens.weight)
    model.config.text.tie_word_embeddings = tied
    if tied:
        model.lm_head.weight = model.language_model.embed_tokens.weight


def write_weights(model: Llava, folder: Path, max_shard_bytes: int) -> None:
    """model.safetensors, or shards with an index, under the names of the old layout (see `canonical_name`)."""
    tensors = model.state_dict()
    assert not any(".lora_" in name for name in tensors), "the model has adapters: merge_lora first, or save_adapter"
    if model.config.text.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    # transformers wants the norm behind the vision tower, though LLaVA never applies it: one that does nothing.
    ones = torch.ones(model.config.vision.hidden_size, dtype=model.dtype)
    tensors |= {"vision_tower.post_layernorm.weight": ones, "vision_tower.post_layernorm.bias": torch.zeros_like(ones)}
    shards, weight_map, room = [{}], {}, max_shard_bytes
    for name, tensor in tensors.items():
        name = re.sub(r"^language_model\.", "language_model.model.", name)
        name = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
        name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
        if tensor.nbytes > room and shards[-1]:
            shards, room = [*shards, {}], max_shard_bytes
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
