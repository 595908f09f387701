"""What notebook 6 asks for, done: two losses and a model that are not in the project's own files.

The notebook runs these, so that no cell of it waits for an answer. Who does the exercises opens
this file afterwards.

Axes: B pairs of a batch, T tokens, N image tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model import LlavaConfig, TextConfig, VisionConfig
from train import TrainConfig

# ---- Another loss: SigLIP's


@dataclass
class ChangedConfig(TrainConfig):
    """TrainConfig, and the weights of three more losses; 0 leaves one out."""

    siglip_weight: float = 0.0
    gap_weight: float = 0.0
    mine_weight: float = 0.0  # of exercise 6.3's


def siglip_loss(image_embeddings, text_embeddings, scale, bias):
    """SigLIP (arXiv 2303.15343): every pair of the batch is a question of its own, right or wrong?
    There is no softmax, so no pair competes with another.

    (B, D), (B, D), 1 / temperature, a number that most pairs need to be wrong -> a scalar."""
    images = F.normalize(image_embeddings, dim=-1)
    texts = F.normalize(text_embeddings, dim=-1)
    logits = scale * images @ texts.T + bias  # (B, B)
    sign = 2 * torch.eye(len(images), device=logits.device) - 1  # 1 for right pairs, -1 for wrong
    return -F.logsigmoid(sign * logits).sum() / len(images)


def add_bias(model: nn.Module) -> None:
    """A parameter of the model itself, as the temperature: it is trained, logged and saved."""
    model.logit_bias = nn.Parameter(torch.tensor(-10.0, device=model.device))


def siglip(model, images, texts, config):
    """The entry of train.EMBEDDING_LOSSES."""
    return siglip_loss(images, texts, model.log_scale.exp(), model.logit_bias)


# ---- One loss more: the gap


def gap(model, images, texts, config):
    """How far the mean picture is from the mean text, squared: the modality gap (arXiv 2203.02053).

    Nothing in the contrastive loss asks pictures and texts to lie in the same place."""
    images = F.normalize(images, dim=-1)
    texts = F.normalize(texts, dim=-1)
    return (images.mean(0) - texts.mean(0)).square().sum()


# ---- Another model, as small as the contract allows


def tiny_config(config: LlavaConfig) -> LlavaConfig:
    """The sizes of `Tiny`: pictures, ids and vocabulary of a larger model, hardly any width."""
    vision = VisionConfig(
        hidden_size=32,
        image_size=config.vision.image_size,
        patch_size=config.vision.patch_size,
    )
    text = TextConfig(
        vocab_size=config.text.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
    )
    tokens = config.image_token_id
    return LlavaConfig(vision, text, image_token_id=tokens, eos_token_ids=config.eos_token_ids)


class TinyMix(nn.Module):
    """In the place of attention. Its two layers have names that LoRA looks for."""

    def __init__(self, D: int):
        super().__init__()
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, mix):
        return self.o_proj(F.gelu(mix(self.v_proj(x))))


class TinyLayer(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(D)
        self.self_attn = TinyMix(D)

    def forward(self, x, mix):
        """x (B, T, D); mix: values (B, T, D) -> what each token collects of them, (B, T, D)."""
        return x + self.self_attn(self.input_layernorm(x), mix)


class TinyLanguageModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(TinyLayer(D) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(D)
        self.checkpoint_layers = 0


class TinyParts(nn.Module):
    """What the contract of backbones/__init__.py asks for, but for the methods that compute.

    Writing and files are left out: docs/your-own-backbone.md says how a model gets them."""

    config_class = LlavaConfig
    language_model_name = "language_model"

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        D = config.text.hidden_size
        P = config.vision.patch_size
        self.vision_tower = nn.Conv2d(3, D, kernel_size=P, stride=P)
        self.language_model = TinyLanguageModel(config.text)
        self.lm_head = nn.Linear(D, config.text.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def new_cache(self, batch_size):
        raise NotImplementedError("the tiny model cannot write")

    def generate(self, prompts, *options):
        raise NotImplementedError("the tiny model cannot write")

    @classmethod
    def from_pretrained(cls, folder, *options):
        raise NotImplementedError("the tiny model has no files")

    def save_pretrained(self, folder, *options):
        raise NotImplementedError("the tiny model has no files")


class Tiny(TinyParts):
    """The model of exercise 6.4. Its attention is a mean: each token collects all up to itself."""

    def mix(self, v):
        """v (B, T, D) -> (B, T, D): at t the mean of v over the positions 0 to t."""
        seen = torch.arange(1, v.shape[1] + 1, device=v.device)  # (T,)
        return v.cumsum(dim=1) / seen[:, None]

    def image_features(self, pixel_values):
        """(images, 3, S, S) -> (images, N, D), the patches row by row."""
        patches = self.vision_tower(pixel_values)  # (images, D, rows, columns)
        return patches.flatten(2).transpose(1, 2)

    def forward(self, input_ids, pixel_values=None, image_features=None, cache=None):
        """-> hidden states (B, T, D) after the final norm."""
        x = self.language_model.embed_tokens(input_ids)  # (B, T, D)
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)
        if image_features is not None:
            is_image = input_ids == self.config.image_token_id  # (B, T)
            if is_image.sum() != image_features.shape[:2].numel():
                raise ValueError("not as many image tokens as image features")
            x = x.masked_scatter(is_image[..., None], image_features)
        for layer in self.language_model.layers:
            x = layer(x, self.mix)
        return self.language_model.norm(x)

    def logits(self, hidden):
        return self.lm_head(hidden)
