"""What training takes on each backbone at its real size: GB by the command's own estimate, and
TFLOP a pair, counted.

    python -m benchmarks.backbones

Nothing is loaded and nothing computed: all tensors are on the meta device, which knows shapes only.
A pair is an image of N tokens with a long caption of 100, and a short caption of 20; prompts and
template take 40 tokens on either side. The batch: 128 pairs in bf16, --gradient_cache
--micro_batch 4, which computes everything in front of a long caption a second time (counted).
"""

import argparse

import torch

from backbones import qwen2_vl, smolvlm
from benchmarks.measure import count_flops
from data import Batch, Chunk
from lora import LoRAConfig, add_lora, add_soft_prompts, freeze
from model import Llava, LlavaConfig, TextConfig, VisionConfig
from runtime import memory
from train import TrainConfig

PAIRS = 128
MICRO_BATCH = 4
PROMPT = 40
LONG_CAPTION = 100
SHORT_CAPTION = 20


def smol(hidden: int, intermediate: int, layers: int, heads: int) -> smolvlm.SmolVLM:
    text = TextConfig(
        vocab_size=49280,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
    )
    vision = VisionConfig(model_type="siglip_vision_model", image_size=512, patch_size=16)
    config = smolvlm.SmolVLMConfig(vision, text, image_token_id=49190, scale_factor=4)
    return smolvlm.SmolVLM(config)


def qwen() -> qwen2_vl.Qwen2VL:
    text = qwen2_vl.TextConfig(
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    vision = qwen2_vl.VisionConfig(hidden_size=1536)
    return qwen2_vl.Qwen2VL(qwen2_vl.Qwen2VLConfig(vision, text))


# Name, model, and the side of a square picture.
MODELS = [
    ("SmolVLM-256M", lambda: smol(576, 1536, 30, 9), 512),
    ("SmolVLM-500M", lambda: smol(960, 2560, 32, 15), 512),
    ("Qwen2-VL-2B, pictures of 224 x 224", qwen, 224),
    ("Qwen2-VL-2B, pictures of 392 x 392", qwen, 392),
    ("LLaVA-1.5-7B", lambda: Llava(LlavaConfig()), 336),
]


def language_flops(model, T: int, supervised: int, backward: bool) -> int:
    """Of one sequence of T tokens through the language model, the last ones through the head."""
    D = model.config.text.hidden_size
    x = torch.zeros(1, T, D, device="meta", dtype=torch.bfloat16, requires_grad=backward)

    def forward():
        if isinstance(model, qwen2_vl.Qwen2VL):
            positions = torch.zeros(3, 1, T, dtype=torch.long, device="meta")
            hidden = model.language_model(x, positions)
        else:
            hidden = model.language_model(x)
        loss = hidden.sum()
        if supervised:
            loss = loss + model.logits(hidden[:, -supervised:]).sum()
        if backward:
            loss.backward()

    return count_flops(forward)


def flops_of_a_pair(model, side: int, N: int) -> float:
    """TFLOP of one pair and step, gradient cache included."""
    picture = torch.zeros(1, 3, side, side, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        total = count_flops(lambda: model.image_features(picture))
        # Phase 1 of the gradient cache: the embeddings alone.
        total += language_flops(model, N + PROMPT, 0, backward=False)
        total += language_flops(model, SHORT_CAPTION + PROMPT, 0, backward=False)
    total += language_flops(model, N + PROMPT + LONG_CAPTION, LONG_CAPTION, backward=True)
    total += language_flops(model, SHORT_CAPTION + PROMPT, 0, backward=True)
    return total / 1e12


def batch_of(model, N: int) -> Batch:
    """A batch of the same lengths; only its shapes matter."""
    images = []
    texts = []
    pair = torch.zeros(MICRO_BATCH, dtype=torch.long)
    for _ in range(PAIRS // MICRO_BATCH):
        ids = torch.zeros(MICRO_BATCH, N + PROMPT + LONG_CAPTION, dtype=torch.long)
        ids[:, :N] = model.config.image_token_id
        images.append(Chunk(ids, pair, pair))
        ids = torch.zeros(MICRO_BATCH, SHORT_CAPTION + PROMPT, dtype=torch.long)
        texts.append(Chunk(ids, pair, pair))
    return Batch(images, texts, PAIRS, PAIRS * LONG_CAPTION, [])


def measure(make, side: int) -> dict[str, float]:
    with torch.device("meta"):
        model = make().bfloat16()
        freeze(model)
        N = model.config.num_image_tokens
        if callable(N):
            N = N(side, side)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        add_lora(model, LoRAConfig())
        add_soft_prompts(model, list(range(PROMPT // 2)), list(range(PROMPT // 2)))
    config = TrainConfig(
        batch_size=PAIRS, micro_batch=MICRO_BATCH, gradient_cache=True, caption_share=1.0
    )
    parts = memory.estimate(config, model, batch_of(model, N))
    parts.pop("a sequence")  # no part of the sum
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = (2 * parameters + 4 * learning) / 1e9
    return {
        "tokens": N,
        "weights": weights,
        "training": weights + sum(parts.values()),
        "tflop": flops_of_a_pair(model, side, N),
    }


def lines() -> list[str]:
    """The table in Markdown."""
    found = ["| model | image tokens | weights in bf16 | training | TFLOP a pair |"]
    found.append("|---|---|---|---|---|")
    for name, make, side in MODELS:
        row = measure(make, side)
        found.append(
            f"| {name} | {row['tokens']} | {row['weights']:.1f} GB "
            f"| {row['training']:.1f} GB | {row['tflop']:.2f} |"
        )
    return found


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("\n".join(lines()))


if __name__ == "__main__":
    main()
