"""LLaVAs on Llama-3: its RoPE for long texts, the two templates, a tower with its head."""

import json

import pytest
import torch
from backbone_cases import tokenizer
from conftest import edit_json
from tokenizers import processors

from data import JOYCAPTION, LLAMA3, Layout, TextTokenizer
from formats.files import InputError
from model import Llava, LlavaConfig, longer_periods

transformers = pytest.importorskip("transformers")

# Small enough that all three bands occur: fast angles, slow ones, and those between.
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXT = {"head_dim": 64, "rope_parameters": {**ROPE, "rope_theta": 5000.0}}


def difference(folder, reference):
    model = Llava.from_pretrained(folder)
    config = model.config
    N = config.num_image_tokens
    words = torch.randint(1, 90, (2, 120))
    images = torch.full((2, N), config.image_token_id)
    input_ids = torch.cat([words[:, :5], images, words[:, 5:]], dim=1)
    side = config.vision.image_size
    pixels = torch.randn(2, 3, side, side)
    ours = model.logits(model(input_ids, pixels))
    theirs = reference(input_ids=input_ids, pixel_values=pixels).logits
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "text_config.rope_parameters": ...,
            "text_config.rope_theta": 5000.0,
            "text_config.rope_scaling": ROPE,
        },
        {
            "text_config.rope_parameters": ...,
            "text_config.rope_theta": 5000.0,
            "text_config.rope_scaling": {**ROPE, "type": "llama3"},
        },
    ],
    ids=["new", "old", "oldest"],
)
def test_logits_equal_transformers(make_checkpoint, changes):
    """A joy of a LLaVA: SigLIP with its head, layer -2, all patches; with Llama-3.1's RoPE."""
    folder, reference = make_checkpoint(
        "siglip",
        text_config=TEXT,
        vision_config={"vision_use_head": True},
        vision_feature_select_strategy="full",
    )
    if changes:
        edit_json(folder / "config.json", changes)
    assert difference(folder, reference) < 1e-4


def test_periods_equal_transformers():
    """Llama-3.1's own numbers: 29 angles stay, 29 are 8 times as slow, the others are blended."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**ROPE, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, rope_parameters=rope
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    periods = 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    found = longer_periods(periods, rope)
    torch.testing.assert_close(1 / found, expected, rtol=1e-5, atol=0)
    ratio = found / periods
    assert torch.isclose(ratio, torch.ones(64)).sum() == 29
    assert torch.isclose(ratio, torch.full((64,), 8.0)).sum() == 29


def test_what_is_written_is_read(make_checkpoint, tmp_path):
    """save_pretrained keeps the scaling, here and in transformers."""
    folder, reference = make_checkpoint("siglip", text_config=TEXT)
    Llava.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert LlavaConfig.from_pretrained(tmp_path / "saved").text.rope_scaling == ROPE
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert difference(tmp_path / "saved", loaded.eval()) < 1e-4
    assert difference(tmp_path / "saved", reference) < 1e-4


@pytest.mark.parametrize(
    "rope",
    [
        {**ROPE, "factor": -1.0},
        {**ROPE, "high_freq_factor": 1.0},
        {key: value for key, value in ROPE.items() if key != "low_freq_factor"},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0},
        {"type": "linear", "factor": 2.0},
    ],
    ids=str,
)
def test_other_scalings_are_refused(make_checkpoint, rope):
    folder, _ = make_checkpoint()
    edit_json(folder / "config.json", {"text_config.rope_scaling": rope})
    with pytest.raises(InputError, match="text_config.rope_scaling"):
        Llava.from_pretrained(folder)


# ---- Templates
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
RESERVED = [f"<|reserved_special_token_{number}|>" for number in (69, 70, 71)]
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def layout_of(folder, tokens):
    made = tokenizer(tokens)
    begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    made.save(str(folder / "tokenizer.json"))
    return Layout(TextTokenizer(folder), 3, "Why?", "Sum it up:")


def test_xtuners_template(tmp_path):
    """One <|begin_of_text|>, headers, a line break behind the image, <|eot_id|> ends a turn."""
    layout = layout_of(tmp_path, [*HEADERS, *RESERVED, "<image>"])
    assert layout.template is LLAMA3

    def ids(text):
        return layout.tokenizer.encode("<|begin_of_text|>" + text, special=True)

    question = f"{USER}{'<image>' * 3}\nWhy?<|eot_id|>{ASSISTANT}"
    assert layout.image_side() == layout.question("Why?") == ids(question)
    answer = layout.tokenizer.encode(layout.answer("A cat."))
    whole = f"{question}A cat.<|eot_id|>{USER}And?<|eot_id|>{ASSISTANT}"
    assert layout.question("Why?") + answer + layout.next_question("And?") == ids(whole)
    assert layout.text_side("a cat") == ids(f"{USER}a cat\nSum it up:<|eot_id|>{ASSISTANT}")
    assert layout.stop_id == layout.tokenizer.special_ids["<|eot_id|>"]


def test_joycaptions_template(tmp_path):
    """Its system turn, two marks around an image of reserved tokens, no line break behind them."""
    layout = layout_of(tmp_path, [*HEADERS, *RESERVED])
    assert layout.template is JOYCAPTION
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"
    system = f"{SYSTEM}{dates}You are a helpful image captioner.<|eot_id|>"
    image = RESERVED[1] + RESERVED[0] * 3 + RESERVED[2]

    def ids(text):
        return layout.tokenizer.encode("<|begin_of_text|>" + system + text, special=True)

    assert layout.question("Why?") == ids(f"{USER}{image}Why?<|eot_id|>{ASSISTANT}")
    assert layout.text_side("a cat") == ids(f"{USER}a cat\nSum it up:<|eot_id|>{ASSISTANT}")
    assert layout.image_id == layout.tokenizer.special_ids[RESERVED[0]]


JOY = {
    "model_type": "llava",
    "image_seq_length": 729,
    "image_token_index": 128077,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "full",
    "text_config": {
        "model_type": "llama",
        "eos_token_id": [128001, 128008, 128009],
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {**ROPE, "original_max_position_embeddings": 8192},
        "vocab_size": 128256,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


def test_sizes_of_joycaption(tmp_path):
    """From its real config.json: 8.03 B in the language model, 729 tokens, three stop tokens."""
    (tmp_path / "config.json").write_text(json.dumps(JOY))
    config = LlavaConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = Llava(config)
    language = [*model.language_model.parameters(), model.lm_head.weight]
    assert sum(parameter.numel() for parameter in language) == 8_030_261_248
    projector = model.multi_modal_projector.parameters()
    assert sum(parameter.numel() for parameter in projector) == 21_504_000
    assert config.num_image_tokens == 729
    assert config.eos_token_ids == (128001, 128008, 128009)
