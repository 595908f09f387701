"""backbones/qwen2_vl.py: its files' layouts, sizes, template and positions, and what it refuses."""

import json

import pytest
import torch
from backbone_cases import CASES, QWEN_TOKENS, pictures, write_captions
from conftest import edit_json, edit_weights
from safetensors.torch import load_file

import backbones
import eval
import train
from backbones.qwen2_vl import QWEN2_VL, Qwen2VL, Qwen2VLConfig, Qwen2VLProcessor
from data import Layout, TextTokenizer, stack_images
from examples.export import export
from formats.files import InputError

CASE = CASES["qwen2_vl"]

# config.json of Qwen2-VL-2B-Instruct.
REAL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "hidden_size": 1536,
        "in_chans": 3,
        "model_type": "qwen2_vl",
        "spatial_patch_size": 14,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
LANGUAGE_KEYS = ("attention_dropout", "hidden_act", "hidden_size", "intermediate_size")
LANGUAGE_KEYS += ("max_position_embeddings", "num_attention_heads", "num_hidden_layers")
LANGUAGE_KEYS += ("num_key_value_heads", "rms_norm_eps", "vocab_size", "use_sliding_window")


def nested() -> dict:
    """The same as new versions of transformers save it."""
    section = {key: REAL[key] for key in LANGUAGE_KEYS}
    section["model_type"] = "qwen2_vl_text"
    section["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
    }
    dropped = (*LANGUAGE_KEYS, "rope_theta", "rope_scaling")
    kept = {key: value for key, value in REAL.items() if key not in dropped}
    return {**kept, "text_config": section}


SAVED_AGAIN = {**REAL, "rope_scaling": {"type": "default", "rope_type": "default"}}
SAVED_AGAIN["rope_scaling"]["mrope_section"] = [16, 24, 24]


@pytest.mark.parametrize("content", [REAL, SAVED_AGAIN, nested()], ids=["flat", "again", "nested"])
def test_sizes_of_the_real_one(tmp_path, content):
    """From the real config.json, however it was saved: as many parameters and tensors."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    stops = {"eos_token_id": [151645, 151643], "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    config = backbones.read_config(tmp_path)
    with torch.device("meta"):
        model = Qwen2VL(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_208_985_600
    assert len(model.state_dict()) - 1 == 729  # the tied head is stored once
    vision = sum(parameter.numel() for parameter in model.vision_tower.parameters())
    assert vision == 665_271_296
    assert config.text.rms_norm_eps == 1e-6 and config.text.rope_theta == 1e6
    assert config.text.mrope_section == (16, 24, 24)
    assert config.eos_token_ids == (151645, 151643)
    sizes = {(224, 224): 64, (336, 336): 144, (476, 644): 391}
    assert {size: config.num_image_tokens(*size) for size in sizes} == sizes


RELEASED = {"model.language_model.": "model.", "model.visual.": "visual."}
LAYOUTS = {
    "released": RELEASED,
    "new": {},
    "bare": {"model.language_model.": "language_model.", "model.visual.": "visual."},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_files(tmp_path, layout):
    """Names of old and new transformers, and of the model without its head: the same weights."""
    folder = tmp_path / "model"
    is_bare = layout == "bare"  # it has no head, so it is tied
    CASE.make(folder, tie_word_embeddings=is_bare)
    expected = backbones.load(folder).state_dict()

    def rename(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.startswith(("visual.", "model.visual.")):
                name = "model.visual." + name.split("visual.", 1)[1]
            elif name.startswith("model.") and not name.startswith("model.language_model."):
                name = "model.language_model." + name.removeprefix("model.")
            for start, other in LAYOUTS[layout].items():
                if name.startswith(start):
                    name = other + name.removeprefix(start)
                    break
            tensors[name] = tensor
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)  # of old files

    edit_weights(folder, rename)
    names = load_file(folder / "model.safetensors").keys()
    start = {"released": "visual.", "new": "model.visual.", "bare": "visual."}[layout]
    assert any(name.startswith(start) for name in names)
    found = backbones.load(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("is_nested", [False, True])
def test_flat_and_nested_files_are_the_same_model(tmp_path, is_nested):
    """The tiny model's config.json in the other form."""
    folder = tmp_path / "model"
    CASE.make(folder)
    expected = Qwen2VLConfig.from_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    section = content.pop("text_config")
    rope = section.pop("rope_parameters")
    section |= {"rope_theta": rope["rope_theta"]}
    section["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    content = {**content, "text_config": section} if is_nested else {**section, **content}
    (folder / "config.json").write_text(json.dumps(content))
    assert Qwen2VLConfig.from_pretrained(folder) == expected


REFUSED = [
    ({"text_config.rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary"),
    ({"text_config.rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section is [1, 2]"),
    ({"text_config.rope_parameters": {"mrope_section": [1, 2, 3]}}, "is not half of head_dim 8"),
    ({"text_config.use_sliding_window": True}, "sliding"),
    ({"text_config": [1]}, "text_config is [1]"),
    ({"vision_config": "none"}, "vision_config is 'none'"),
    ({"vision_config.hidden_size": 40}, "vision_config.hidden_size 40 != 32"),
    ({"vision_config.num_heads": 16}, "16 vision heads do not fit 32"),
    ({"vision_config.depth": 2000}, "more than 1000 layers"),
    ({"vision_config.patch_size": "8"}, "patch_size is '8'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'; only 'llava', 'idefics3', "),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=str)
def test_what_is_refused(tmp_path, changes, message):
    CASE.make(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", changes)
    with pytest.raises(InputError, match="config.json") as caught:
        backbones.load(tmp_path / "model")
    assert message in str(caught.value)


def test_pictures_and_videos_that_are_refused(tmp_path):
    CASE.make(tmp_path / "model")
    model = backbones.load(tmp_path / "model")
    with pytest.raises(ValueError, match="multiples of 16"):
        model.image_features(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match="videos are not implemented"):
        model.generate([[5, model.config.video_token_id]], None, 1)


# ---- Sizes of pictures
def test_older_names_of_the_limits():
    """The keys' three forms mean the same; min_pixels and max_pixels win."""
    rest = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    forms = [
        {"min_pixels": 3136, "max_pixels": 50176},
        {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
        {"size": {"min_pixels": 3136, "max_pixels": 50176}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 50176},
    ]
    for form in forms:
        assert Qwen2VLProcessor({**rest, **form}).resized == (3136, 50176)
    assert Qwen2VLProcessor(rest).resized == (3136, 1003520)


def test_a_run_keeps_its_limit(tmp_path, capsys):
    """train.py --max_pixels: the run embeds, and is exported, with pictures of that size."""
    folder = tmp_path / "model"
    CASE.make(folder)
    out = tmp_path / "run"
    command = ["--model", str(folder), "--data", str(write_captions(tmp_path / "data"))]
    command += ["--out", str(out), "--steps", "1", "--batch_size", "4", "--device", "cpu"]
    train.main([*command, "--max_pixels", "1024"])
    embedder = eval.load_embedder(out, "cpu")
    assert embedder.processor.resized == (300, 1024)
    with pytest.raises(InputError, match="keeps the max_pixels"):
        eval.load_embedder(out, "cpu", max_pixels=2048)
    export(out, tmp_path / "exported")
    oracle = CASE.processor(tmp_path / "exported")
    (picture,) = pictures(4)[3:]
    theirs = oracle([picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(CASE.inputs(embedder.prepare([picture]))["pixel_values"], theirs)


def test_a_limit_of_pixels(tmp_path, capsys):
    """max_pixels shrinks large pictures, and the layout then lays out fewer tokens."""
    folder = tmp_path / "model"
    CASE.make(folder)
    whole = eval.load_base(folder, "cpu")
    limited = eval.load_base(folder, "cpu", max_pixels=1024)
    counts = []
    for embedder in (whole, limited):
        (image,) = embedder.prepare(pictures(4)[3:])
        counts.append(embedder.layout.image_side(image=image).count(embedder.layout.image_id))
        assert eval.encode_image(embedder, pictures(3)).isfinite().all()
    assert counts[1] * 256 <= 1024 < counts[0] * 256
    with pytest.raises(InputError, match="max_pixels"):
        eval.load_base(folder, "cpu", max_pixels=100)
    pictures(4)[3].save(tmp_path / "photo.png")
    command = ["caption", str(tmp_path / "photo.png"), "--model", str(folder), "--device", "cpu"]
    eval.main([*command, "--max_pixels", "1024", "--max_new_tokens", "2"])
    assert "photo.png" in capsys.readouterr().out
    assert eval.fingerprint(whole) != eval.fingerprint(limited)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 14}, "makes images of (28, 28)"),
        ({"max_pixels": 100}, "one block has 256"),
        ({"min_pixels": 10**12}, "min_pixels is"),
        ({"do_resize": False}, "do_resize is False"),
    ],
)
def test_preprocessing_that_is_refused(tmp_path, changes, message):
    CASE.make(tmp_path / "model")
    edit_json(tmp_path / "model" / "preprocessor_config.json", changes)
    with pytest.raises(InputError) as caught:
        eval.read_folder(tmp_path / "model")
    assert message in str(caught.value)


# ---- Positions
def test_positions_equal_transformers(tmp_path):
    """Rows with two pictures, one, and none, padded: time, row and column of every real token."""
    reference = CASE.make(tmp_path / "model")
    embedder = eval.load_base(tmp_path / "model", "cpu")
    layout = embedder.layout
    pixels = embedder.prepare(pictures(4))
    two = layout.question("?", pixels[0]) + layout.question("and?", pixels[1])
    rows = [two, layout.question("What?", pixels[3]), layout.text_side("no picture")]
    shown = [pixels[0], pixels[1], pixels[3]]
    ids = [torch.tensor(row) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).int()
    expected, deltas = reference.model.get_rope_index(
        input_ids,
        image_grid_thw=CASE.inputs(shown)["image_grid_thw"],
        attention_mask=mask,
        **CASE.token_types(input_ids),
    )
    features = embedder.model.image_features(stack_images(shown))
    cache = embedder.model.new_cache(3)
    found = embedder.model.positions(input_ids, features, cache)
    assert torch.equal(found[:, mask.bool()], expected[:, mask.bool()])
    # transformers counts from the padded length, we from the row's own.
    for shift, delta in zip(cache.shifts, deltas.flatten().tolist()):
        assert shift == delta


# ---- Template
@pytest.fixture
def layout(tmp_path):
    CASE.tokenizer.save(str(tmp_path / "tokenizer.json"))

    def number(height, width):
        return height * width // 256

    return Layout(TextTokenizer(tmp_path), number, "Why?", "Sum it up:", template=QWEN2_VL)


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"


def test_the_template_is_that_of_the_released_files(layout):
    """A question; question, answer and next question; a text."""
    image = torch.zeros(3, 32, 48)

    def ids(text):
        return layout.tokenizer.encode(text, special=True)

    start = f"{SYSTEM}<|im_start|>user\n{IMAGE}What?<|im_end|>\n<|im_start|>assistant\n"
    assert layout.question("What?", image) == ids(start)
    answer = layout.tokenizer.encode(layout.answer("A cat."))
    whole = start + "A cat.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    found = layout.question("What?", image) + answer + layout.next_question("And?")
    assert found == ids(whole)
    text = f"{SYSTEM}<|im_start|>user\na cat\nSum it up:<|im_end|>\n<|im_start|>assistant\n"
    assert layout.text_side("a cat") == ids(text)


def test_a_layout_without_the_image_says_so(layout):
    with pytest.raises(ValueError, match="give the image"):
        layout.image_side()


def test_tokens_that_are_missing_are_named(tmp_path):
    from backbone_cases import tokenizer

    for missing in ("<|image_pad|>", "<|im_end|>"):
        tokens = [token for token in QWEN_TOKENS if token != missing]
        tokenizer(tokens).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(InputError) as caught:
            Layout(TextTokenizer(tmp_path), 4, template=QWEN2_VL)
        assert missing in str(caught.value)
