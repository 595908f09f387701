"""backbones/smolvlm.py: its names, sizes and template, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch
from backbone_cases import CASES, SMOL_TOKENS
from conftest import edit_json, edit_weights

import backbones
import eval
from backbones.smolvlm import SMOLVLM, SmolVLM, SmolVLMConfig
from data import Layout, TextTokenizer
from formats.files import InputError

CASE = CASES["idefics3"]

# config.json of SmolVLM-256M-Instruct and of SmolVLM-500M-Instruct, with dead keys as they stand
# there; what is left out there is left out here.
REAL = {
    256_484_928: {
        "model_type": "idefics3",
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 49190,
        "scale_factor": 4,
        "vocab_size": 49280,
        "pad_token_id": 128002,
        "tie_word_embeddings": False,
        "text_config": {
            "architectures": ["VLlama3ForCausalLM"],
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000,
            "rope_scaling": None,
            "max_position_embeddings": 8192,
            "vocab_size": 49280,
            "perceiver_config": {"use_resampler": False},
            "qk_layer_norms": False,
            "use_resampler": False,
            "pixel_shuffle_factor": 4,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "idefics3",
            "hidden_size": 768,
            "image_size": 512,
            "patch_size": 16,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_image_size": {"longest_edge": 512},
            "size": {"longest_edge": 2048},
            "use_base_siglip": True,
        },
    },
    507_482_304: {
        "model_type": "smolvlm",
        "image_token_id": 49190,
        "scale_factor": 4,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000,
            "max_position_embeddings": 8192,
            "vocab_size": 49280,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": 768,
            "image_size": 512,
            "patch_size": 16,
            "num_attention_heads": 12,
        },
    },
}


@pytest.mark.parametrize("number", REAL)
def test_sizes_of_the_real_ones(tmp_path, number):
    """From the real config.json: as many parameters and tensors, 64 tokens an image."""
    (tmp_path / "config.json").write_text(json.dumps(REAL[number]))
    stops = {"eos_token_id": 49279, "pad_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    config = backbones.read_config(tmp_path)
    with torch.device("meta"):
        model = SmolVLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == number
    assert len(model.state_dict()) == {256_484_928: 471, 507_482_304: 489}[number]
    assert config.num_image_tokens == 64
    assert config.eos_token_ids == (49279,)
    assert config.text.rms_norm_eps == 1e-5 and config.vision.layer_norm_eps == 1e-6


def test_the_file_on_disk_is_read_without_its_defaults(tmp_path):
    """What transformers leaves out or names otherwise means the same."""
    reference = CASE.make(tmp_path / "model")
    expected = SmolVLMConfig.from_pretrained(tmp_path / "model")
    changes = {"vision_config.model_type": "siglip_vision_model", "use_cache": True}
    changes["text_config.rope_parameters"] = ...
    changes["text_config.rope_theta"] = 10000
    edit_json(tmp_path / "model" / "config.json", changes)
    assert SmolVLMConfig.from_pretrained(tmp_path / "model") == expected
    assert expected.num_image_tokens == 4 and reference.config.model_type == "idefics3"


def test_a_buffer_of_old_files_is_left_out(tmp_path):
    CASE.make(tmp_path / "model")

    def add(tensors):
        tensors["model.vision_model.embeddings.position_ids"] = torch.zeros(1, 16)

    edit_weights(tmp_path / "model", add)
    backbones.load(tmp_path / "model")


REFUSED = [
    ({"scale_factor": 3}, "scale_factor 3 does not divide 4 patches"),
    ({"use_resampler": True}, "use_resampler is on"),
    ({"qk_layer_norms": True}, "qk_layer_norms is on"),
    ({"text_config.model_type": "mistral"}, "text_config.model_type is 'mistral'"),
    ({"text_config.hidden_act": "gelu"}, "hidden_act 'gelu' is not 'silu'"),
    ({"text_config": 3}, "text_config is 3"),
    ({"vision_config": "none"}, "vision_config is 'none'"),
    ({"vision_config.hidden_act": "nothing"}, "'nothing' is unknown"),
    ({"image_token_id": 5000}, "5000 is not a token"),
    ({"quantization": {"bits": 4}}, "quantised"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_is_refused(tmp_path, changes, message):
    CASE.make(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", changes)
    with pytest.raises(InputError, match="config.json") as caught:
        backbones.load(tmp_path / "model")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_image_size": {"longest_edge": 64}}, "makes images of"),
        ({"max_image_size": ...}, "max_image_size is missing"),
        ({"size": {"height": 3, "width": 3}}, "size is"),
        ({"size": {"longest_edge": 10**9}}, "size is"),
        ({"do_resize": False}, "do_resize is False"),
    ],
)
def test_preprocessing_that_is_refused(tmp_path, changes, message):
    CASE.make(tmp_path / "model")
    edit_json(tmp_path / "model" / "preprocessor_config.json", changes)
    with pytest.raises(InputError) as caught:
        eval.read_folder(tmp_path / "model")
    assert message in str(caught.value)


def test_pixels_have_no_limit(tmp_path):
    """All its pictures are of one size: a limit is refused, not ignored."""
    CASE.make(tmp_path / "model")
    with pytest.raises(InputError, match="max_pixels"):
        eval.read_folder(tmp_path / "model", max_pixels=1000)


@pytest.fixture
def layout(tmp_path):
    CASE.tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Layout(TextTokenizer(tmp_path), 4, "Why?", "Sum it up:", template=SMOLVLM)


# The chat template of the released files, without its part for videos.
JINJA = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def conversation(*turns):
    messages = []
    for number, content in enumerate(turns):
        parts = [{"type": "image"}] if number == 0 and content.startswith("<image>") else []
        parts.append({"type": "text", "text": content.removeprefix("<image>")})
        messages.append({"role": "assistant" if number % 2 else "user", "content": parts})
    return messages


def written(layout, *turns):
    """The ids of a conversation as jinja and transformers' processor write it."""
    jinja2 = pytest.importorskip("jinja2")
    processing = pytest.importorskip("transformers.models.idefics3.processing_idefics3")
    template = jinja2.Environment().from_string(JINJA)
    text = template.render(messages=conversation(*turns), add_generation_prompt=True)
    names = SimpleNamespace(
        fake_image_token="<fake_token_around_image>",
        global_image_tag="<global-img>",
        image_token="<image>",
        image_seq_len=4,
    )
    one_frame = {"rows": [[0]], "cols": [[0]]}
    frame = processing.Idefics3Processor.replace_image_token(names, one_frame, 0)
    return layout.tokenizer.encode(text.replace("<image>", frame), special=True)


def test_the_template_is_that_of_the_released_files(layout):
    """A question; question, answer and next question; a text: the same ids."""
    assert layout.question("Why?") == layout.image_side() == written(layout, "<image>Why?")
    answer = layout.tokenizer.encode(layout.answer(" A cat. "))
    ids = layout.question("What?") + answer + layout.next_question("And now?")
    assert ids == written(layout, "<image>What?", "A cat.", "And now?")
    assert layout.text_side("a cat") == written(layout, "a cat\nSum it up:")


def test_tokens_that_are_missing_are_named(tmp_path):
    from backbone_cases import tokenizer

    for missing in ("<image>", "<end_of_utterance>"):
        tokens = [token for token in SMOL_TOKENS if token != missing]
        tokenizer(tokens).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(InputError, match=missing):
            Layout(TextTokenizer(tmp_path), 4, template=SMOLVLM)
