"""backbones/onevision.py: its files, sizes and pictures, and what it refuses."""

import json

import pytest
import torch
from backbone_cases import CASES
from conftest import edit_json, edit_weights
from PIL import Image

import backbones
import eval
from backbones.onevision import OneVision, OneVisionConfig
from data import CHATML
from formats.files import InputError

CASE = CASES["llava_onevision"]

# The head of the 0.5B's config.json, and what its sections are known to hold.
REAL = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384]],
    "image_token_index": 151646,
    "model_type": "llava_onevision",
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 152000,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_image_newline_parameter": True,
    "video_token_index": 151647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
UNUSED = 2 * 1152  # post_layernorm: it is in the file, and not held here


def test_sizes_of_the_real_one(tmp_path):
    """From the real config.json: as many parameters, 730 tokens, a head that is the embedding."""
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    config = backbones.read_config(tmp_path)
    with torch.device("meta"):
        model = OneVision(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 893_675_552 - UNUSED
    assert config.num_image_tokens == 730
    assert config.text.tie_word_embeddings and config.num_vision_layers == 26


def test_names_of_released_files(tmp_path):
    """The released layout: image_newline stands alone, the tower has a norm that nobody uses."""
    folder = tmp_path / "model"
    CASE.make(folder)
    expected = backbones.load(folder).state_dict()

    def rename(tensors):
        names = {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.image_newline": "image_newline",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
        for name in list(tensors):
            for new, old in names.items():
                if name.startswith(new):
                    rest = name.removeprefix(new).removeprefix("vision_model.")
                    tensors[old + rest] = tensors.pop(name)
        tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(32)
        tensors["vision_tower.vision_model.post_layernorm.bias"] = torch.ones(32)

    edit_weights(folder, rename)
    found = backbones.load(folder).state_dict()
    assert found.keys() == expected.keys() and "image_newline" in found
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_what_is_read_is_what_is_written(tmp_path):
    CASE.make(tmp_path / "model")
    model = backbones.load(tmp_path / "model")
    model.save_pretrained(tmp_path / "saved")
    assert OneVisionConfig.from_pretrained(tmp_path / "saved") == model.config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_config": None}, "text_config is missing"),
        ({"vision_config.model_type": "clip"}, "vision_config.model_type is 'clip'"),
        ({"vision_feature_layer": 9}, "no vision layer 9"),
        ({"quantization": {"bits": 4}}, "quantised"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    CASE.make(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", changes)
    with pytest.raises(InputError) as caught:
        backbones.load(tmp_path / "model")
    assert message in str(caught.value)


def test_template_and_padding(tmp_path):
    """ChatML as LLaVA's interleave models write it; a picture stands in the middle of grey."""
    CASE.make(tmp_path / "model")
    embedder = eval.load_base(tmp_path / "model", "cpu")
    assert embedder.layout.template is CHATML
    assert embedder.layout.image_side().count(embedder.layout.image_id) == 17
    white = Image.new("RGB", (32, 10), (255, 255, 255))
    red = embedder.processor(white)[0]  # (32, 32)
    assert (red == red.max()).all(dim=1).sum() == 10
    assert (red[:11] == red[0, 0]).all() and (red[21:] == red[0, 0]).all()
