"""model.py against transformers: logits, gradients, generation, every way a checkpoint can be spelled, saved or broken.

The oracle is a random tiny model that transformers writes (tests/conftest.py), so that no agreement is one of zeros.
"""

import dataclasses
import itertools
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_TOKEN, PROJECT
from safetensors.torch import load_file, save_file

from model import CheckpointError, Llava, LlavaConfig, TextConfig, VisionConfig, canonical_name, choose_tokens

transformers = pytest.importorskip("transformers")

PAIRS = list(itertools.product(["clip", "siglip"], ["llama", "qwen2"]))
TOLERANCE = 1e-4  # of logits of size 1 in fp32; what is measured is near 1e-6


def random_ids(*shape):
    """Token ids, none of them special."""
    return torch.randint(3, IMAGE_TOKEN, shape)


def example(model, images_per_row=(2, 0, 1), length=28):
    """Ids (B, length) that hold runs of image tokens, and the images."""
    input_ids, run = random_ids(len(images_per_row), length), model.config.num_image_tokens
    for row, images in zip(input_ids, images_per_row):
        for start in (2 + i * (run + 1) for i in range(images)):
            row[start : start + run] = IMAGE_TOKEN
    return input_ids, torch.randn(sum(images_per_row), 3, 30, 30)


def logit_difference(model, reference, **options):
    """The largest absolute difference between the logits of both models on an example."""
    input_ids, pixel_values = example(model, **options)
    with torch.no_grad():
        ours = model.logits(model(input_ids, pixel_values))
        theirs = reference(input_ids=input_ids, pixel_values=pixel_values).logits
    assert ours.shape == theirs.shape and theirs.std() > 0.3
    return (ours - theirs).abs().max().item()


def edit_json(path, changes):
    """Change keys of a JSON file; "section.key" reaches inside, the value `...` removes the key."""
    content = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        section = content
        for parent in parents:
            section = section[parent]
        section.pop(key, None)
        if value is not ...:
            section[key] = value
    path.write_text(json.dumps(content))


def edit_weights(folder, change):
    """Rewrite model.safetensors after `change` has edited its dictionary of tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def our_name(name):
    """A parameter's name in a running transformers model -> in ours."""
    return name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward

VARIANTS = {
    "grouped-query": {},
    "multi-head": dict(text_config=dict(num_key_value_heads=4)),
    "multi-query": dict(text_config=dict(num_key_value_heads=1)),
    "head_dim": dict(text_config=dict(head_dim=12)),
    "tied": dict(text_config=dict(tie_word_embeddings=True)),
    "layer -1": dict(vision_feature_layer=-1),
    "layer -3": dict(vision_feature_layer=-3),
    "layer 2": dict(vision_feature_layer=2),
    "full": dict(vision_feature_select_strategy="full"),
    "projector without bias": dict(multimodal_projector_bias=False),
    "activations": dict(projector_hidden_act="quick_gelu", vision_config=dict(hidden_act="gelu")),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("vision, text", PAIRS)
def test_logits_equal_transformers(make_checkpoint, vision, text, variant):
    """Fp32 logits equal transformers' for every pair of towers under every option of the config."""
    folder, reference = make_checkpoint(vision, text, **variant)
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


@pytest.mark.parametrize("biases", [["attention_bias"], ["mlp_bias"], ["attention_bias", "mlp_bias"]])
def test_biases_of_llama(make_checkpoint, biases):
    """LLaMA's optional biases, on the four attention projections and on the MLP, are read and added."""
    folder, reference = make_checkpoint(text_config=dict.fromkeys(biases, True))
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"text_config.rope_parameters": ..., "text_config.rope_theta": 7.0},
        {"text_config.rope_parameters": ..., "text_config.rope_theta": 7, "text_config.rope_scaling": None},
        {"text_config.rope_theta": 9.0},
    ],
    ids=["new", "old", "old integer", "new wins over old"],
)
def test_rope_theta_in_every_spelling(make_checkpoint, spelling):
    """RoPE's base comes from `rope_parameters`, else from the older key `rope_theta`."""
    folder, reference = make_checkpoint(text_config=dict(rope_parameters={"rope_type": "default", "rope_theta": 7.0}))
    edit_json(folder / "config.json", spelling)
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


OLD = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
OLD |= {"model.multi_modal_projector.": "multi_modal_projector."}
LAYOUTS = {
    "A": OLD | {"model.vision_tower.": "vision_tower.vision_model."},
    "B": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "C": {},
    "D": OLD | {"model.vision_tower.": "vision_tower."},
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_key_layouts(make_checkpoint, vision, layout, shards):
    """The four layouts of tensor names load alike, from one file and from shards that cut layers apart."""
    folder, reference = make_checkpoint(vision)
    (folder / "model.safetensors").unlink()
    files, weight_map = [{} for _ in range(shards)], {}
    for i, (name, tensor) in enumerate(reference.state_dict().items()):
        name = "model." + our_name(name) if name.startswith("model.") else name  # layout C, whatever the version
        for prefix, replacement in LAYOUTS[layout].items():
            name = replacement + name.removeprefix(prefix) if name.startswith(prefix) else name
        weight_map[name] = (
            f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        )
        files[i % shards][name] = tensor
    for tensors in files:
        save_file(tensors, folder / weight_map[next(iter(tensors))])
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_precision_load_as_fp32(make_checkpoint, stored):
    """Weights stored in another precision are converted, value by value, to the one asked for."""
    folder, reference = make_checkpoint()
    edit_weights(folder, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(stored))
    model = Llava.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert logit_difference(model, reference) < TOLERANCE


def test_padding_on_the_right_changes_nothing(make_checkpoint):
    """A row padded on the right, with any ids, gives the hidden states of the same row alone."""
    model = Llava.from_pretrained(make_checkpoint()[0])
    input_ids, pixel_values = example(model, images_per_row=(1, 0, 1), length=40)
    lengths = (17, 5, 40)
    with torch.no_grad():
        padded = model(input_ids, pixel_values)
        for row, (length, pixels) in enumerate(zip(lengths, (pixel_values[:1], None, pixel_values[1:]))):
            alone = model(input_ids[row : row + 1, :length], pixels)[0]
            torch.testing.assert_close(padded[row, :length], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("vision, text", PAIRS)
def test_bf16_logits_are_close_to_transformers(make_checkpoint, vision, text):
    """In bf16 we are as close to transformers' bf16 as it is to its own fp32, also far into a sequence.

    A bf16 rounding is off by up to 2^-9 = 0.2 % and each logit has some dozens of them behind it, in an order that
    kernels choose, so that 2 to 3 % of the logits' norm is what two right implementations differ by.
    """
    folder, exact = make_checkpoint(vision, text)
    model = Llava.from_pretrained(folder, dtype=torch.bfloat16)
    reference = type(exact).from_pretrained(folder, dtype=torch.bfloat16).eval()
    input_ids, pixel_values = example(model, length=300)
    with torch.no_grad():
        ours = model.logits(model(input_ids, pixel_values)).float()
        theirs = reference(input_ids=input_ids, pixel_values=pixel_values).logits.float()
        truth = exact(input_ids=input_ids, pixel_values=pixel_values).logits
    assert (ours - theirs).norm() < 0.03 * truth.norm()
    assert (ours - truth).norm() < 1.2 * (theirs - truth).norm()


@pytest.mark.parametrize("variant", ["grouped-query", "tied"])
@pytest.mark.parametrize("vision, text", PAIRS)
def test_gradients_equal_transformers(make_checkpoint, vision, text, variant):
    """The gradient of a language-modelling loss equals transformers' for every parameter."""
    folder, reference = make_checkpoint(vision, text, **VARIANTS[variant])
    model = Llava.from_pretrained(folder)
    input_ids, pixel_values = example(model)
    labels = random_ids(input_ids.numel())
    F.cross_entropy(model.logits(model(input_ids, pixel_values)).flatten(0, 1), labels).backward()
    F.cross_entropy(reference(input_ids=input_ids, pixel_values=pixel_values).logits.flatten(0, 1), labels).backward()
    theirs = {our_name(name): p.grad for name, p in reference.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        # A key bias shifts all scores of a query alike: its true gradient is 0, what is left is rounding.
        size = theirs[name.replace("k_proj.bias", "q_proj.bias")].norm()
        assert (gradient - theirs[name]).norm() < 1e-4 * size, name


# ----------------------------------------------------------------------------------------------------------------------
# Generation

NEW_TOKENS = 64


@pytest.fixture
def speaker(make_checkpoint):
    """A model that never stops by itself, its reference, and three prompts of different lengths with two images."""
    folder, reference = make_checkpoint()
    edit_json(folder / "generation_config.json", {"eos_token_id": []})
    model = Llava.from_pretrained(folder)
    image = [IMAGE_TOKEN] * model.config.num_image_tokens
    texts = [random_ids(n).tolist() for n in (3, 11, 7, 2)]
    prompts = [texts[0] + image + texts[1], texts[2], texts[3] + image + texts[0]]
    return model, reference, prompts, torch.randn(2, 3, 30, 30)


def images_of(row, pixel_values):
    """The pixel values of one of the three prompts."""
    return (pixel_values[:1], None, pixel_values[1:])[row]


def test_greedy_generation_three_ways(speaker):
    """64 greedy tokens: with the cache, by the whole forward at every token, and by transformers, all the same."""
    model, reference, prompts, pixel_values = speaker
    for row, prompt in enumerate(prompts):
        pixels = images_of(row, pixel_values)
        cached = model.generate([prompt], pixels, NEW_TOKENS)[0]
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                tokens.append(model.logits(model(torch.tensor([tokens]), pixels))[0, -1].argmax().item())
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        inputs |= {} if pixels is None else {"pixel_values": pixels}
        theirs = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        assert cached == tokens[len(prompt) :] == theirs[0, len(prompt) :].tolist()
        assert len(set(cached)) > 8  # an answer that repeats itself would hide mistakes


def test_batched_generation_equals_one_by_one(speaker):
    """Prompts of different lengths in one batch get the answers that they get alone."""
    model, _, prompts, pixel_values = speaker
    alone = [model.generate([p], images_of(row, pixel_values), NEW_TOKENS)[0] for row, p in enumerate(prompts)]
    assert model.generate(prompts, pixel_values, NEW_TOKENS) == alone


@pytest.mark.parametrize("stops_early", [False, True])
@pytest.mark.parametrize("rows", [[0], [0, 2], [2, 1, 0]])
def test_second_and_third_turn_from_the_cache(speaker, rows, stops_early):
    """Later turns of conversations, from the cache and without the image, equal those computed from scratch."""
    model, _, prompts, pixel_values = speaker
    conversations = [prompts[row] for row in rows]
    pixel_values = torch.cat([images_of(row, pixel_values) for row in rows if row != 1])
    if stops_early:
        stop = model.generate(conversations, pixel_values, 20)[0][4]
        model.config = dataclasses.replace(model.config, eos_token_ids=(stop,))
    cache = model.new_cache(len(rows))
    for turn, question_length in enumerate([4, 9, 1]):
        from_cache = model.generate(conversations, pixel_values if turn == 0 else None, 20, cache=cache)
        assert from_cache == model.generate(conversations, pixel_values, 20)
        lengths = set(map(len, from_cache))
        assert turn > 0 or (min(lengths) <= 4 if stops_early else lengths == {20})
        questions = [random_ids(question_length + row).tolist() for row in range(len(rows))]
        conversations = [old + new + q for old, new, q in zip(conversations, from_cache, questions)]


def test_generation_stops_at_any_of_several_stop_tokens(make_checkpoint, speaker):
    """Each row ends in front of the first of the ids that generation_config.json lists; other rows go on."""
    model, _, prompts, pixel_values = speaker
    endless = model.generate(prompts, pixel_values, 30)
    stops = [endless[0][6], endless[1][11]]
    expected = [list(itertools.takewhile(lambda token: token not in stops, row)) for row in endless]
    assert len({len(row) for row in expected}) > 1 and max(map(len, expected[:2])) < 30
    torch.manual_seed(0)
    folder, _ = make_checkpoint()
    edit_json(folder / "generation_config.json", {"eos_token_id": stops})
    assert Llava.from_pretrained(folder).generate(prompts, pixel_values, 30) == expected


def test_sampling_is_greedy_at_tiny_top_p_and_repeats_with_its_generator(speaker):
    """A tiny top_p leaves only the likeliest token; the same generator seed gives the same sample, another another."""
    model, _, prompts, pixel_values = speaker
    assert model.generate(prompts, pixel_values, 20, temperature=1.0, top_p=1e-6) == model.generate(
        prompts, pixel_values, 20
    )
    samples = [
        model.generate(prompts, pixel_values, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_sampled_tokens_follow_the_distribution(temperature, top_p):
    """Frequencies of sampled tokens match transformers' temperature and nucleus warpers.

    Hoeffding: with n draws each of V frequencies is off by more than sqrt(log(2 V / p) / 2 n) with probability p at
    most, here 1e-9; the seed is fixed besides.
    """
    draws, logits = 100_000, torch.tensor([[1.2, -0.5, 0.3, 2.0, -1.0, 0.9, -3.0, 1.9]])
    warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    expected = transformers.TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0]
    tokens = choose_tokens(logits.expand(draws, -1), temperature, top_p, torch.Generator().manual_seed(0))
    frequencies = tokens.bincount(minlength=8) / draws
    assert (frequencies - expected).abs().max() < math.sqrt(math.log(2 * 8 / 1e-9) / (2 * draws))
    assert frequencies[expected == 0].sum() == 0


def test_wrong_calls_are_refused(speaker):
    """Calls that cannot be answered raise a ValueError that says what is wrong."""
    model, _, prompts, pixel_values = speaker
    prompt, image = prompts[0], pixel_values[:1]
    cache = model.new_cache(1)
    answer = model.generate([prompt], image, 5, cache=cache)[0]
    for other in ([4, *prompt[1:], *answer, 5], prompt[:3], cache.tokens[0]):
        with pytest.raises(ValueError, match="cache"):
            model.generate([other], cache=cache)
    with pytest.raises(ValueError, match="513 positions.* 512"):
        model.generate([prompt], image, 513 - len(prompt))
    for ids in (prompt[:-12], [IMAGE_TOKEN, *prompt]):
        with pytest.raises(ValueError, match="image tokens"):
            model(torch.tensor([ids]), image)
    with pytest.raises(ValueError, match="image tokens"):
        model.generate([prompt], pixel_values)
    with pytest.raises(ValueError, match="pixel_values.*30"):
        model(torch.tensor([prompt]), torch.randn(1, 3, 32, 30))


# ----------------------------------------------------------------------------------------------------------------------
# The real index, config defaults, tied heads

LAYER_7B = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096)}
LAYER_7B |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096)}
LAYER_7B |= {"mlp.down_proj": (4096, 11008), "input_layernorm": (4096,), "post_attention_layernorm": (4096,)}
VISION_LAYER_7B = {f"self_attn.{which}_proj": (1024, 1024) for which in ("q", "k", "v", "out")}
VISION_LAYER_7B |= {"layer_norm1": (1024,), "layer_norm2": (1024,), "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
VISION_7B = {"embeddings.class_embedding": (1024,), "embeddings.patch_embedding": (1024, 3, 14, 14)}
VISION_7B |= {"embeddings.position_embedding": (577, 1024), "pre_layrnorm": (1024,), "post_layernorm": (1024,)}
SHAPES_7B = {
    "language_model.layers.N.": LAYER_7B,
    "language_model.": {"embed_tokens": (32064, 4096), "norm": (4096,)},
    "lm_head": {"": (32064, 4096)},
    "multi_modal_projector.": {"linear_1": (4096, 1024), "linear_2": (4096, 4096)},
    "vision_tower.encoder.layers.N.": VISION_LAYER_7B,
    "vision_tower.": VISION_7B,
}
SHAPES_7B = {prefix + name: shape for prefix, names in SHAPES_7B.items() for name, shape in names.items()}


def shape_in_7b(name):
    """The shape that FORMATS.md 1.3 gives a tensor of LLaVA-1.5-7B; a bias is as long as its weight's first axis."""
    shape = SHAPES_7B[re.sub(r"layers\.\d+\.", "layers.N.", re.sub(r"\.(weight|bias)$", "", name))]
    return shape[:1] if name.endswith(".bias") else shape


def test_real_llava_7b_index(real_file):
    """All 686 names of the real index are parameters, or known to be unused, and their sizes add up to its total."""
    index = json.loads(real_file("llava-1.5-7b-hf/model.safetensors.index.json").read_text())
    with torch.device("meta"):
        model = Llava(LlavaConfig.from_pretrained(real_file("llava-1.5-7b-hf/config.json").parent))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = {canonical_name(name) for name in index["weight_map"]}
    unused = {name for name in names if re.match(r"vision_tower\.(post_layernorm|encoder\.layers\.23)\.", name)}
    assert len(names) == len(index["weight_map"]) == 686 and len(unused) == 2 + 16
    assert shapes == {name: shape_in_7b(name) for name in names - unused}
    parameters = sum(map(math.prod, shapes.values()))
    unused_parameters = sum(math.prod(shape_in_7b(name)) for name in unused)
    print(f"LLaVA-1.5-7B: {parameters:,} parameters, {unused_parameters:,} in the file that are not used")
    assert parameters + unused_parameters == index["metadata"]["total_size"] // 2
    assert model.config.num_image_tokens == 576


@pytest.mark.parametrize(
    "config",
    [
        {"image_token_index": 5},
        {"vision_config": {}, "text_config": {"vocab_size": 32064}},
        {"vision_config": {"model_type": "siglip_vision_model"}, "text_config": {"model_type": "qwen2"}},
        {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 96}, "text_config": {"vocab_size": 40000}},
        {"text_config": {"vocab_size": 40000, "num_attention_heads": 8, "num_key_value_heads": None, "head_dim": None}},
        {"text_config": {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": None}},
        {"text_config": {"vocab_size": 40000, "tie_word_embeddings": True}, "tie_word_embeddings": False},
    ],
)
def test_absent_keys_mean_what_transformers_means(tmp_path, config):
    """A config.json that omits keys, or whole sections, reads as transformers reads it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | config))
    ours, theirs = LlavaConfig.from_pretrained(tmp_path), transformers.LlavaConfig.from_pretrained(tmp_path)
    text = theirs.text_config
    text.rope_theta = text.rope_parameters["rope_theta"]
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    text.attention_bias, text.mlp_bias = getattr(text, "attention_bias", False), getattr(text, "mlp_bias", False)
    for section, reference in ((ours.vision, theirs.vision_config), (ours.text, text)):
        for name, value in vars(section).items():
            assert value == getattr(reference, name), name
    ours_only = {"vision", "text", "eos_token_ids", "pad_token_id"}
    for name in vars(ours).keys() - ours_only:
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "generation_config, text_config, stop_tokens",
    [
        ({"eos_token_id": 7}, {"eos_token_id": 8}, (7,)),
        ({"eos_token_id": [7, 9]}, {}, (7, 9)),
        ({"eos_token_id": None}, {"eos_token_id": 8}, (8,)),
        (None, {"eos_token_id": [8, 9]}, (8, 9)),
        (None, {}, (2,)),
        (None, {"model_type": "qwen2"}, ()),
    ],
)
def test_stop_tokens_come_from_the_nearest_file(tmp_path, generation_config, text_config, stop_tokens):
    """Stop tokens are generation_config.json's, else text_config's, else the default of the language model."""
    content = {"model_type": "llava", "text_config": {"vocab_size": 32064} | text_config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert LlavaConfig.from_pretrained(tmp_path).eos_token_ids == stop_tokens


@pytest.mark.parametrize("flag", ["tie_word_embeddings", "text_config.tie_word_embeddings"])
@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_tied_heads(make_checkpoint, head, flag):
    """With the flag at either level an absent or equal head is the embedding itself, a different one is kept."""
    folder, reference = make_checkpoint()
    embedding = reference.get_input_embeddings().weight
    if head != "different":
        reference.lm_head.weight = embedding
    stored = {"absent": {}, "equal": {"lm_head.weight": embedding.data}, "different": {}}[head]
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith("lm_head.weight"))
    if head != "different":
        edit_weights(folder, lambda tensors: (tensors.pop(name), tensors.update(stored)))
    edit_json(
        folder / "config.json", {"tie_word_embeddings": ..., "text_config.tie_word_embeddings": ...} | {flag: True}
    )
    model = Llava.from_pretrained(folder)
    assert (model.lm_head.weight is model.language_model.embed_tokens.weight) == (head != "different")
    assert logit_difference(model, reference) < TOLERANCE


def test_untied_heads(make_checkpoint):
    """Without the flag the file's head is used, equal or not, and an absent one is missing: never made up."""
    folder, reference = make_checkpoint()
    model = Llava.from_pretrained(folder)
    assert model.lm_head.weight is not model.language_model.embed_tokens.weight
    assert logit_difference(model, reference) < TOLERANCE
    edit_weights(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        Llava.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Strict loading, refused files


def test_all_faulty_tensors_are_listed_in_one_error(make_checkpoint):
    """Missing, unexpected and mis-shaped tensors appear together in one message, with names and shapes."""
    folder, _ = make_checkpoint()

    def spoil(tensors):
        tensors.pop("language_model.model.norm.weight")
        tensors["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(56, 32)
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(31)

    edit_weights(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        Llava.from_pretrained(folder)
    lines = str(caught.value).splitlines()
    assert str(folder) in lines[0] and len(lines) == 4
    for kind, name, shape in (
        ("missing", "norm.weight", "(32,)"),
        ("unexpected", "layers.2.mlp.up_proj.weight", "(56, 32)"),
        ("shape", "linear_1.bias", "(31,)"),
    ):
        assert any(kind in line and name in line and shape in line for line in lines[1:]), kind


def test_a_tensor_under_two_names_is_refused(make_checkpoint):
    """A file that holds one parameter in two layouts at once is ambiguous."""
    folder, _ = make_checkpoint()
    edit_weights(folder, lambda tensors: tensors.update({"model.language_model.norm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match="model.language_model.norm.weight"):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_known_unused_tensors_are_neither_needed_nor_held(make_checkpoint, vision):
    """What LLaVA never reads may be in the file, or not: the vision tower's end, its pooling head, old buffers."""
    folder, reference = make_checkpoint(vision)
    names = load_file(folder / "model.safetensors").keys()
    unused = [name for name in names if "post_layernorm" in name or "encoder.layers.2." in name]
    assert len(unused) == 18
    leftovers = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    leftovers["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    leftovers |= {"vision_tower.vision_model.head.probe": torch.ones(1, 1, 32)} if vision == "siglip" else {}
    edit_weights(folder, lambda tensors: tensors.update(leftovers))
    model = Llava.from_pretrained(folder)
    assert len(model.vision_tower.encoder.layers) == 2
    assert logit_difference(model, reference) < TOLERANCE
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in unused])
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", {k.replace("__", "."): v for k, v in changes.items()})


def add_tensor(name, tensor):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update({name: tensor}))


def shard_named(shard):
    """Move the weights to where an index points that was written to read them from there."""

    def spoil(folder):
        (folder / "sub").mkdir()
        target = folder / shard.replace("/abs", "abs")
        (folder / "model.safetensors").rename(target)
        shard_name = str(target.resolve()) if shard.startswith("/") else shard
        index = {"metadata": {}, "weight_map": {"language_model.model.norm.weight": shard_name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {str(i): f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 14126854144\n"
HTML = b"<!DOCTYPE html><html><body>Access to this model is restricted</body></html>"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"
LIUHAOTIAN = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": 4096}
LIUHAOTIAN |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
REFUSED = {
    "truncated": (truncated, ["model.safetensors", "download"]),
    "weights are an LFS pointer": (write("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "weights are HTML": (write("model.safetensors", HTML), ["model.safetensors", "HTML", "download"]),
    "weights are empty": (write("model.safetensors", b""), ["model.safetensors", "download"]),
    "config is an LFS pointer": (write("config.json", POINTER), ["config.json", "git lfs pull"]),
    "config is HTML": (write("config.json", HTML), ["config.json", "HTML", "download"]),
    "config is cut": (write("config.json", b'{"model_type": "lla'), ["config.json", "download"]),
    "config is no text": (write("config.json", b"\x80\x02\xff"), ["config.json", "download"]),
    "config is nested without end": (write("config.json", b"[" * 10**5), ["config.json"]),
    "config is a list": (write("config.json", b'["llava"]'), ["config.json", "object"]),
    "generation config is a list": (write("generation_config.json", b"[2]"), ["generation_config.json", "object"]),
    "stop token is text": (write("generation_config.json", b'{"eos_token_id": "2"}'), ["eos_token_id", "'2'"]),
    "empty folder": (emptied, ["config.json", "Hugging Face"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors", "nothing"]),
    "missing shard": (missing_shard, ["model-00002-of-00002.safetensors", "download"]),
    "shard above": (shard_named("../x.safetensors"), ["index.json", "'../x.safetensors'", "in this folder"]),
    "shard anywhere": (shard_named("/abs.safetensors"), ["index.json", "abs.safetensors'", "in this folder"]),
    "shard below": (shard_named("sub/x.safetensors"), ["index.json", "'sub/x.safetensors'", "in this folder"]),
    "shard is pickle": (shard_named("pytorch_model.bin"), ["index.json", "'pytorch_model.bin'", "safetensors"]),
    "index without map": (
        lambda folder: (shard_named("x.safetensors")(folder), write("model.safetensors.index.json", b"{}")(folder)),
        ["index.json", "weight_map"],
    ),
    "GPTQ": (add_tensor(f"{Q_PROJ}.qweight", torch.zeros(4, 32, dtype=torch.int32)), ["qweight", "fp16"]),
    "int8": (add_tensor(f"{Q_PROJ}.weight", torch.zeros(32, 32, dtype=torch.int8)), ["q_proj.weight", "I8", "fp16"]),
    "quantised": (config(quantization_config={"quant_method": "awq"}), ["config.json", "quantised", "fp16"]),
    "RoPE scaling": (
        config(text_config__rope_parameters=..., text_config__rope_scaling={"type": "linear", "factor": 2.0}),
        ["config.json", "text_config", "linear"],
    ),
    "RoPE parameters": (
        config(text_config__rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ["config.json", "text_config", "llama3"],
    ),
    "sliding window": (
        config(text_config__model_type="qwen2", text_config__use_sliding_window=True),
        ["config.json", "text_config", "sliding"],
    ),
    "llava_next": (config(model_type="llava_next"), ["config.json", "'llava_next'", "'llava'"]),
    "other model": (config(model_type="qwen2_vl"), ["config.json", "'qwen2_vl'", "'llava'"]),
    "no model type": (config(model_type=...), ["config.json", "model_type", "'llava'"]),
    "other language model": (config(text_config__model_type="mistral"), ["text_config", "'mistral'", "llama", "qwen2"]),
    "other vision tower": (config(vision_config__model_type="dinov2"), ["vision_config", "'dinov2'", "clip", "siglip"]),
    "original layout": (
        write("config.json", json.dumps(LIUHAOTIAN).encode()),
        ["original", "llava-hf/llava-1.5-7b-hf"],
    ),
    "several feature layers": (config(vision_feature_layer=[-2, -5]), ["config.json", "vision_feature_layer", "one"]),
    "no such feature layer": (config(vision_feature_layer=-9), ["config.json", "-9"]),
    "other strategy": (config(vision_feature_select_strategy="cls"), ["config.json", "strategy", "'cls'"]),
    "other activation": (config(text_config__hidden_act="relu"), ["config.json", "hidden_act", "'relu'"]),
    "text for a number": (config(text_config__hidden_size="32"), ["config.json", "text_config.hidden_size", "'32'"]),
    "negative number": (config(vision_config__num_hidden_layers=-3), ["vision_config.num_hidden_layers", "-3"]),
    "truth for a number": (config(text_config__vocab_size=True), ["text_config.vocab_size", "True"]),
    "number for a truth": (config(multimodal_projector_bias=1), ["config.json", "multimodal_projector_bias", "1"]),
    "section is a list": (config(vision_config=[1]), ["config.json", "vision_config"]),
    "no heads": (config(vision_config__num_attention_heads=0), ["config.json", "num_attention_heads", "0"]),
    "no patches": (config(vision_config__patch_size=0), ["config.json", "patch_size", "0"]),
    "architectures is a number": (config(architectures=1), ["config.json", "architectures"]),
}


@pytest.mark.parametrize("spoil, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_with_advice(make_checkpoint, spoil, words):
    """Every broken, foreign or dangerous folder raises CheckpointError, naming the file or tensor and what to do."""
    folder, _ = make_checkpoint()
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Llava.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


class Bomb:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_pickle_is_never_opened(make_checkpoint, monkeypatch):
    """A folder with only pickle files is refused by their names, and nothing opens them."""
    folder, _ = make_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    opened = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors"):
        Llava.from_pretrained(folder)
    assert any(name.endswith("config.json") for name in opened)
    assert not any(name.endswith(".bin") for name in opened) and not (folder / "exploded").exists()


JUNK = ["x", "", -1, 0, 1.5, 10**30, float("nan"), True, None, [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("section", [None, "vision_config", "text_config"])
def test_no_value_in_config_json_escapes_as_another_exception(make_checkpoint, section):
    """Whatever one key of config.json is set to, reading it works or raises CheckpointError naming the file."""
    path = make_checkpoint()[0] / "config.json"
    content, escaped = path.read_text(), []
    keys = json.loads(content)[section] if section else json.loads(content)
    for key, value in itertools.product([*keys, "rope_theta", "rope_scaling", "image_token_id"], JUNK):
        edit_json(path, {f"{section}.{key}" if section else key: value})
        try:
            LlavaConfig.from_pretrained(path.parent)
        except CheckpointError as error:
            assert str(path) in str(error)
        except Exception as error:
            escaped.append((key, value, repr(error)))
        path.write_text(content)
    assert escaped == []


# ----------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vision, text", PAIRS)
def test_transformers_opens_what_we_save(make_checkpoint, tmp_path, vision, text, tied, max_shard_bytes):
    """A saved folder opens in transformers with nothing missing or left over and the same logits."""
    folder, reference = make_checkpoint(vision, text, text_config=dict(tie_word_embeddings=tied))
    Llava.from_pretrained(folder).save_pretrained(tmp_path / "saved", max_shard_bytes)
    files = list((tmp_path / "saved").glob("*.safetensors"))
    index_path = tmp_path / "saved" / "model.safetensors.index.json"
    assert (len(files) > 5) == index_path.exists() == (max_shard_bytes == 20_000)
    if index_path.exists():
        index, shards = json.loads(index_path.read_text()), {file.name: load_file(file) for file in files}
        assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())
        assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
        assert all(sum(t.nbytes for t in shard.values()) <= 20_000 for shard in shards.values())
    reopened, report = type(reference).from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert logit_difference(Llava.from_pretrained(folder), reopened) < TOLERANCE
    assert logit_difference(Llava.from_pretrained(tmp_path / "saved"), reference) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_reloaded_is_bitwise_equal(make_checkpoint, tmp_path, tied, dtype):
    """Our own reload has the same parameters, bit for bit, the same tying and the same stop tokens."""
    folder, _ = make_checkpoint("siglip", "qwen2", text_config=dict(tie_word_embeddings=tied))
    edit_json(folder / "generation_config.json", {"eos_token_id": [5, 6]})
    model = Llava.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_bytes=30_000)
    again = Llava.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert again.config.text == model.config.text and again.config.eos_token_ids == (5, 6)
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) == (not tied)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_saving_never_touches_an_existing_model(make_checkpoint):
    """save_pretrained refuses a folder that holds a model; training in place does not write through to the file."""
    folder, _ = make_checkpoint()
    before = (folder / "model.safetensors").read_bytes()
    model = Llava.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(FileExistsError, match=re.escape(str(folder))):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# Memory

CHECKPOINT_BYTES = 200 * 2**20
MEASURE = """
import sys, torch
from model import Llava

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def load(folder):
    model = Llava.from_pretrained(folder, dtype=getattr(torch, sys.argv[3]))
    sum(parameter.detach().sum().item() for parameter in model.parameters())  # touches every page
    return sum(parameter.nbytes for parameter in model.parameters())

load(sys.argv[1])  # a tiny one: what the libraries take once is not the checkpoint's
before = status("VmRSS")
weights = load(sys.argv[2])
print(weights, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "stored, loaded", [("float32", "float32"), ("float16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_loading_takes_the_memory_of_the_weights_once(make_checkpoint, tmp_path, stored, loaded):
    """The peak of resident memory rises by at most 1.15 times the weights, converted to another precision or not."""
    hidden = 512
    vision = VisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    text = TextConfig(vocab_size=1000, hidden_size=hidden, intermediate_size=2048, num_attention_heads=8)
    largest = max(getattr(torch, stored).itemsize, getattr(torch, loaded).itemsize)
    text.num_hidden_layers = CHECKPOINT_BYTES // largest // (4 * hidden**2 + 3 * hidden * 2048)
    torch.set_default_dtype(getattr(torch, stored))
    try:
        Llava(LlavaConfig(vision=vision, text=text, image_token_id=7)).save_pretrained(tmp_path / "large")
    finally:
        torch.set_default_dtype(torch.float32)
    arguments = [make_checkpoint()[0], tmp_path / "large", loaded]
    output = subprocess.check_output([sys.executable, "-c", MEASURE, *map(str, arguments)], cwd=PROJECT, text=True)
    weights, rise = map(int, output.split())
    print(f"{stored} -> {loaded}: weights {weights / 2**20:.0f} MiB, peak rises by {rise / weights:.2f} times that")
    assert weights > 0.4 * CHECKPOINT_BYTES
    assert rise <= 1.15 * weights
