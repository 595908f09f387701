"""model.py, formats/hf.py and backbones/ against transformers.

Logits, gradients, generation, and every way a checkpoint can be spelled, saved or broken. The
oracle is a random tiny model that transformers writes (tests/conftest.py), so that no agreement is
one of zeros.

    python -m pytest tests/test_model.py
"""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_TOKEN, PROJECT, edit_json, edit_weights
from safetensors.torch import load_file, save_file

import backbones
from formats.files import InputError
from formats.hf import canonical_name, is_unused
from lora import LoRAConfig, add_lora, add_temperature, merge_lora
from model import Llava, LlavaConfig, choose_tokens

transformers = pytest.importorskip("transformers", minversion="5.0")

HEAD = "language_model.lm_head.weight"  # as transformers 5 writes it
PAIRS = list(itertools.product(["clip", "siglip"], ["llama", "qwen2"]))
TOLERANCE = 1e-4  # of logits of size 1 in fp32; the most that was measured is 4e-6


def random_ids(*shape):
    """Token ids, none of them special."""
    return torch.randint(3, IMAGE_TOKEN, shape)


def example(model, images_per_row=(2, 0, 1), length=28):
    """Ids (B, length) that hold runs of image tokens, and the images."""
    input_ids = random_ids(len(images_per_row), length)
    run = model.config.num_image_tokens
    for row, images in zip(input_ids, images_per_row):
        for image in range(images):
            start = 2 + image * (run + 1)
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


def our_name(name):
    """A parameter's name in a running transformers model -> in ours."""
    return name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")


# ------------------------------------------------------------------------------
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vision, text", PAIRS)
def test_logits_equal_transformers(make_checkpoint, vision, text, variant):
    """Fp32 logits equal transformers' for every pair of towers under every option of the config."""
    folder, reference = make_checkpoint(vision, text, **VARIANTS[variant])
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


SEVEN = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
TEXT_OPTIONS = [  # how transformers is told, and how else the same may stand in config.json
    ({"attention_bias": True}, {}),
    ({"mlp_bias": True}, {}),
    ({"attention_bias": True, "mlp_bias": True}, {}),
    (SEVEN, {"text_config.rope_theta": 9.0}),
    (SEVEN, {"text_config.rope_parameters": ..., "text_config.rope_theta": 7.0}),
    (
        SEVEN,
        {
            "text_config.rope_parameters": ...,
            "text_config.rope_theta": 7,
            "text_config.rope_scaling": None,
        },
    ),
]


@pytest.mark.parametrize("options, edits", TEXT_OPTIONS)
def test_options_of_llama(make_checkpoint, options, edits):
    """LLaMA's optional biases are added; RoPE's base is that of `rope_parameters`, else the older
    `rope_theta`."""
    folder, reference = make_checkpoint(text_config=options)
    edit_json(folder / "config.json", edits)
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
    """The four layouts of tensor names load alike, from one file and from shards that cut layers
    apart."""
    folder, reference = make_checkpoint(vision)
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(shards)]
    files = {name: {} for name in names}
    weight_map = {}
    for i, (name, tensor) in enumerate(reference.state_dict().items()):
        if name.startswith("model."):
            name = "model." + our_name(name)  # layout C, whatever the version
        for prefix, replacement in LAYOUTS[layout].items():
            if name.startswith(prefix):
                name = replacement + name.removeprefix(prefix)
        weight_map[name] = names[i % shards]
        files[names[i % shards]][name] = tensor
    (folder / "model.safetensors").unlink()
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_precision_load_as_fp32(make_checkpoint, stored):
    """Weights stored in another precision are converted, value by value, to the one asked for."""
    folder, reference = make_checkpoint()

    def convert(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(stored)

    edit_weights(folder, convert)
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
    images = (pixel_values[:1], None, pixel_values[1:])
    with torch.no_grad():
        padded = model(input_ids, pixel_values)
        for row, length in enumerate(lengths):
            alone = model(input_ids[row : row + 1, :length], images[row])[0]
            torch.testing.assert_close(padded[row, :length], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("vision, text", PAIRS)
def test_bf16_logits_are_close_to_transformers(make_checkpoint, vision, text):
    """In bf16 we are as close to transformers' bf16 as it is to its own fp32, also far into a
    sequence.

    A bf16 rounding is off by up to 2^-9 = 0.2 % and each logit has some dozens of them behind it,
    in an order that kernels choose, so that 2 to 3 % of the logits' norm is what two right
    implementations differ by.
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
    our_logits = model.logits(model(input_ids, pixel_values))
    F.cross_entropy(our_logits.flatten(0, 1), labels).backward()
    their_logits = reference(input_ids=input_ids, pixel_values=pixel_values).logits
    F.cross_entropy(their_logits.flatten(0, 1), labels).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    theirs = {}
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            theirs[our_name(name)] = parameter.grad
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        # A key bias in the vision tower shifts all scores of a query alike: its gradient is 0 but
        # for rounding, so it is compared with the query bias's.
        size = theirs[re.sub(r"(vision.*)k_proj.bias", r"\1q_proj.bias", name)].norm()
        assert (gradient - theirs[name]).norm() < 1e-4 * size, name


# ------------------------------------------------------------------------------
# Generation

NEW_TOKENS = 64


@pytest.fixture
def speaker(make_checkpoint):
    """A model that never stops by itself, its reference, and three prompts of different lengths
    with two images."""
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
    """64 greedy tokens: with the cache, by the whole forward at every token, and by transformers,
    all the same."""
    model, reference, prompts, pixel_values = speaker
    for row, prompt in enumerate(prompts):
        pixels = images_of(row, pixel_values)
        cached = model.generate([prompt], pixels, NEW_TOKENS)[0]
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([tokens]), pixels))
            tokens.append(logits[0, -1].argmax().item())
        inputs = {
            "input_ids": torch.tensor([prompt]),
            "attention_mask": torch.ones(1, len(prompt), dtype=torch.long),
        }
        if pixels is not None:
            inputs["pixel_values"] = pixels
        theirs = reference.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        assert cached == tokens[len(prompt) :] == theirs[0, len(prompt) :].tolist()
        assert len(set(cached)) > 8  # an answer that repeats itself would hide mistakes


def test_batched_generation_equals_one_by_one(speaker):
    """Prompts of different lengths in one batch get the answers that they get alone."""
    model, _, prompts, pixel_values = speaker
    alone = [
        model.generate([p], images_of(row, pixel_values), NEW_TOKENS)[0]
        for row, p in enumerate(prompts)
    ]
    assert model.generate(prompts, pixel_values, NEW_TOKENS) == alone


@pytest.mark.parametrize("stops_early", [False, True])
@pytest.mark.parametrize("rows", [[0], [0, 2], [2, 1, 0]])
def test_second_and_third_turn_from_the_cache(speaker, rows, stops_early):
    """Later turns of conversations, from the cache and without the image, equal those computed from
    scratch."""
    model, _, prompts, pixel_values = speaker
    conversations = [prompts[row] for row in rows]
    pixel_values = torch.cat([images_of(row, pixel_values) for row in rows if row != 1])
    if stops_early:
        stop = model.generate(conversations, pixel_values, 20)[0][4]
        model.config = dataclasses.replace(model.config, eos_token_ids=(stop,))
    cache = model.new_cache(len(rows))
    for turn, question_length in enumerate([4, 9, 1]):
        images = pixel_values if turn == 0 else None
        from_cache = model.generate(conversations, images, 20, cache=cache)
        assert from_cache == model.generate(conversations, pixel_values, 20)
        lengths = set(map(len, from_cache))
        if turn == 0:  # the first row stops after 4 tokens at most, and others go on
            assert min(lengths) <= 4 if stops_early else lengths == {20}
            assert not stops_early or len(rows) == 1 or len(lengths) > 1
        questions = [random_ids(question_length + row).tolist() for row in range(len(rows))]
        conversations = [old + new + q for old, new, q in zip(conversations, from_cache, questions)]


def test_generation_stops_at_any_of_several_stop_tokens(make_checkpoint, speaker):
    """Each row ends in front of the first of the ids that generation_config.json lists; other rows
    go on."""
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
    """A tiny top_p leaves only the likeliest token; the same generator seed gives the same sample,
    another another."""
    model, _, prompts, pixel_values = speaker
    greedy = model.generate(prompts, pixel_values, 20)
    assert model.generate(prompts, pixel_values, 20, temperature=1.0, top_p=1e-6) == greedy
    samples = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        samples.append(
            model.generate(prompts, pixel_values, 20, temperature=1.0, generator=generator)
        )
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.5, 0.9)]
)
def test_sampled_tokens_follow_the_distribution(temperature, top_p):
    """Frequencies of sampled tokens match transformers' temperature and nucleus warpers.

    Hoeffding: with n draws each of V frequencies is off by more than sqrt(log(2 V / p) / 2 n) with
    probability p at most, here 1e-9; the seed is fixed besides.
    """
    draws = 100_000
    logits = torch.tensor([[1.2, -0.5, 0.3, 2.0, -1.0, 0.9, -3.0, 1.9]])
    warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    expected = transformers.TopPLogitsWarper(top_p)(None, warped).softmax(-1)[0]
    tokens = choose_tokens(
        logits.expand(draws, -1), temperature, top_p, torch.Generator().manual_seed(0)
    )
    frequencies = tokens.bincount(minlength=8) / draws
    assert (frequencies - expected).abs().max() < math.sqrt(math.log(2 * 8 / 1e-9) / (2 * draws))
    assert frequencies[expected == 0].sum() == 0


def test_the_cache_is_allocated_once(speaker):
    """Generation into a cache that has room writes in place: no token pays for a copy of all keys
    and values."""
    model, _, prompts, pixel_values = speaker
    cache = model.new_cache(1)
    cache.reserve(100)
    before = cache.keys.data_ptr(), cache.values.data_ptr()
    model.generate(prompts[:1], pixel_values[:1], 20, cache=cache)
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == before


def test_wrong_calls_are_refused(speaker):
    """Calls that cannot be answered raise a ValueError that says what is wrong."""
    model, _, prompts, pixel_values = speaker
    prompt = prompts[0]
    image = pixel_values[:1]
    cache = model.new_cache(1)
    answer = model.generate([prompt], image, 5, cache=cache)[0]
    for other in ([4, *prompt[1:], *answer, 5], prompt[:3], cache.tokens[0]):
        with pytest.raises(ValueError, match="cache"):
            model.generate([other], cache=cache)
    with pytest.raises(ValueError, match="2 prompts for a cache of 1 rows"):
        model.generate([prompt, prompt], pixel_values, cache=cache)
    with pytest.raises(ValueError, match="513 positions.* 512"):
        model.generate([prompt], image, 513 - len(prompt))
    for ids in (prompt[:-12], [IMAGE_TOKEN, *prompt]):
        with pytest.raises(ValueError, match="image tokens"):
            model(torch.tensor([ids]), image)
    for wrong_images in (pixel_values, None):
        with pytest.raises(ValueError, match="image tokens"):
            model.generate([prompt], wrong_images)
    with pytest.raises(ValueError, match="pixel_values.*30"):
        model(torch.tensor([prompt]), torch.randn(1, 3, 32, 30))


# ------------------------------------------------------------------------------
# The real index, config defaults, tied heads

# The shapes of LLaVA-1.5-7B's weights; a bias is as long as its weight's first axis.
SHAPES_7B = {
    "language_model.embed_tokens": (32064, 4096),
    "language_model.layers.N.self_attn.q_proj": (4096, 4096),
    "language_model.layers.N.self_attn.k_proj": (4096, 4096),
    "language_model.layers.N.self_attn.v_proj": (4096, 4096),
    "language_model.layers.N.self_attn.o_proj": (4096, 4096),
    "language_model.layers.N.mlp.gate_proj": (11008, 4096),
    "language_model.layers.N.mlp.up_proj": (11008, 4096),
    "language_model.layers.N.mlp.down_proj": (4096, 11008),
    "language_model.layers.N.input_layernorm": (4096,),
    "language_model.layers.N.post_attention_layernorm": (4096,),
    "language_model.norm": (4096,),
    "lm_head": (32064, 4096),
    "multi_modal_projector.linear_1": (4096, 1024),
    "multi_modal_projector.linear_2": (4096, 4096),
    "vision_tower.embeddings.class_embedding": (1024,),
    "vision_tower.embeddings.patch_embedding": (1024, 3, 14, 14),
    "vision_tower.embeddings.position_embedding": (577, 1024),
    "vision_tower.encoder.layers.N.self_attn.q_proj": (1024, 1024),
    "vision_tower.encoder.layers.N.self_attn.k_proj": (1024, 1024),
    "vision_tower.encoder.layers.N.self_attn.v_proj": (1024, 1024),
    "vision_tower.encoder.layers.N.self_attn.out_proj": (1024, 1024),
    "vision_tower.encoder.layers.N.mlp.fc1": (4096, 1024),
    "vision_tower.encoder.layers.N.mlp.fc2": (1024, 4096),
    "vision_tower.encoder.layers.N.layer_norm1": (1024,),
    "vision_tower.encoder.layers.N.layer_norm2": (1024,),
    "vision_tower.pre_layrnorm": (1024,),
    "vision_tower.post_layernorm": (1024,),
}


def shape_in_7b(name):
    """The shape of a tensor of LLaVA-1.5-7B."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    shape = SHAPES_7B[re.sub(r"layers\.\d+\.", "layers.N.", module)]
    return shape[:1] if name.endswith(".bias") else shape


def test_real_llava_7b_index(real_file):
    """All 686 names of the real index are parameters, or known to be unused, and their sizes add up
    to its total."""
    index = json.loads(real_file("llava-1.5-7b-hf/model.safetensors.index.json").read_text())
    config = LlavaConfig.from_pretrained(real_file("llava-1.5-7b-hf/config.json").parent)
    with torch.device("meta"):
        model = Llava(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = {canonical_name(name) for name in index["weight_map"]}
    unused = {name for name in names if is_unused(name, config)}
    behind = r"vision_tower\.(post_layernorm|encoder\.layers\.23)\."
    assert all(re.match(behind, name) for name in unused)
    assert len(names) == len(index["weight_map"]) == 686 and len(unused) == 2 + 16
    assert shapes == {name: shape_in_7b(name) for name in names - unused}
    parameters = sum(map(math.prod, shapes.values()))
    unused_parameters = sum(math.prod(shape_in_7b(name)) for name in unused)
    print(f"LLaVA-1.5-7B: {parameters:,} parameters, {unused_parameters:,} more in the file")
    assert parameters + unused_parameters == index["metadata"]["total_size"] // 2
    assert model.config.num_image_tokens == 576


ABSENT = [
    {"image_token_index": 5},
    {"vision_config": {}, "text_config": {"vocab_size": 32064}},
    {
        "vision_config": {"model_type": "siglip_vision_model"},
        "text_config": {"model_type": "qwen2"},
    },
    {
        "vision_config": {"hidden_size": 96},
        "text_config": {"vocab_size": 40000, "num_attention_heads": 8},
    },
    {"text_config": {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": None}},
    {
        "text_config": {"vocab_size": 40000, "tie_word_embeddings": True},
        "tie_word_embeddings": False,
    },
]


@pytest.mark.parametrize("config", ABSENT)
def test_absent_keys_mean_what_transformers_means(tmp_path, config):
    """A config.json that omits keys, or whole sections, reads as transformers reads it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | config))
    ours = LlavaConfig.from_pretrained(tmp_path)
    theirs = transformers.LlavaConfig.from_pretrained(tmp_path)
    text = theirs.text_config
    text.rope_theta = text.rope_parameters["rope_theta"]
    text.rope_scaling = None
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    text.attention_bias = getattr(text, "attention_bias", False)
    text.mlp_bias = getattr(text, "mlp_bias", False)
    for section, reference in ((ours.vision, theirs.vision_config), (ours.text, text)):
        for name, value in vars(section).items():
            assert value == getattr(reference, name), name
    for name in vars(ours).keys() - {"vision", "text", "eos_token_ids", "pad_token_id"}:
        assert getattr(ours, name) == getattr(theirs, name), name


STOP_TOKENS = [
    ({"eos_token_id": 7}, {"eos_token_id": 8}, (7,)),
    ({"eos_token_id": [7, 9]}, {}, (7, 9)),
    ({"eos_token_id": None}, {"eos_token_id": 8}, (8,)),
    ({}, {"eos_token_id": [8, 9]}, (8, 9)),
    ({}, {}, (2,)),
    ({}, {"model_type": "qwen2"}, ()),
]


@pytest.mark.parametrize("generation_config, text_config, stop_tokens", STOP_TOKENS)
def test_stop_tokens_come_from_the_nearest_file(
    tmp_path, generation_config, text_config, stop_tokens
):
    """Stop tokens are generation_config.json's, else text_config's, else the default of the
    language model."""
    content = {"model_type": "llava", "text_config": {"vocab_size": 32064} | text_config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    if generation_config:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert LlavaConfig.from_pretrained(tmp_path).eos_token_ids == stop_tokens


TYING = [  # the file's head, and whether it becomes the embedding: without the flag, with it
    ("absent", None, True),
    ("equal", False, True),
    ("different", False, False),
]


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("head, untied, tied", TYING)
def test_tied_heads(make_checkpoint, head, untied, tied, flags):
    """A flag at either level ties an absent or equal head, and a head is never made up."""
    folder, reference = make_checkpoint()
    embedding = reference.get_input_embeddings().weight
    if head != "different":
        reference.lm_head.weight = embedding
        edit_weights(folder, lambda tensors: tensors.pop(HEAD))
    if head == "equal":
        edit_weights(folder, lambda tensors: tensors.update({HEAD: embedding.data}))
    names = ["tie_word_embeddings", "text_config.tie_word_embeddings"]
    edit_json(folder / "config.json", dict(zip(names, flags)))
    if head == "absent" and not any(flags):
        with pytest.raises(InputError, match="missing: lm_head.weight"):
            Llava.from_pretrained(folder)
        return
    model = Llava.from_pretrained(folder)
    is_tied = model.lm_head.weight is model.language_model.embed_tokens.weight
    assert is_tied == (tied if any(flags) else untied)
    assert model.config.text.tie_word_embeddings == is_tied
    assert logit_difference(model, reference) < TOLERANCE


# ------------------------------------------------------------------------------
# Strict loading, refused files


def test_all_faulty_tensors_are_listed_in_one_error(make_checkpoint):
    """Missing, unexpected and mis-shaped tensors appear together in one message, with names and
    shapes."""
    folder, _ = make_checkpoint()

    def spoil(tensors):
        tensors.pop("language_model.model.norm.weight")
        tensors["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(56, 32)
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(31)

    edit_weights(folder, spoil)
    with pytest.raises(InputError) as caught:
        Llava.from_pretrained(folder)
    lines = str(caught.value).splitlines()
    assert str(folder) in lines[0] and len(lines) == 4
    for kind, name, shape in (
        ("missing", "norm.weight", "(32,)"),
        ("unexpected", "layers.2.mlp.up_proj.weight", "(56, 32)"),
        ("shape", "linear_1.bias", "(31,)"),
    ):
        assert any(kind in line and name in line and shape in line for line in lines[1:]), kind


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_known_unused_tensors_are_neither_needed_nor_held(make_checkpoint, vision):
    """What LLaVA never reads may be in the file, or not: the vision tower's end, its pooling head,
    old buffers."""
    folder, reference = make_checkpoint(vision)
    names = load_file(folder / "model.safetensors").keys()
    unused = [name for name in names if "post_layernorm" in name or "encoder.layers.2." in name]
    assert len(unused) == 18
    leftovers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    if vision == "siglip":
        leftovers["vision_tower.vision_model.head.probe"] = torch.ones(1, 1, 32)
    edit_weights(folder, lambda tensors: tensors.update(leftovers))
    model = Llava.from_pretrained(folder)
    assert len(model.vision_tower.encoder.layers) == 2
    assert logit_difference(model, reference) < TOLERANCE
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in unused])
    assert logit_difference(Llava.from_pretrained(folder), reference) < TOLERANCE


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def config(key, value):
    return lambda folder: edit_json(folder / "config.json", {key: value})


def tensor(name, dtype):
    added = {name: torch.ones(32, 32, dtype=dtype)}
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update(added))


def shards(*names):
    """Move the weights to the first of the places that an index names."""

    def spoil(folder):
        names_here = [name.replace("FOLDER", str(folder)) for name in names]
        (folder / "sub").mkdir()
        (folder / "model.safetensors").rename(folder / names_here[0])
        weight_map = {f"tensor {i}": name for i, name in enumerate(names_here)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 14126854144\n"
HTML = b"<!DOCTYPE html><html><body>Access to this model is restricted</body></html>"
ORIGINAL = b'{"model_type": "llava", "mm_vision_tower": "openai/clip"}'
ORIGINAL_TOO = b'{"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}'
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"
REFUSED = [  # what is wrong, and what the message must name
    (truncate, "model.safetensors|download"),
    (write("model.safetensors", POINTER), "model.safetensors|git lfs pull"),
    (write("model.safetensors", HTML), "model.safetensors|HTML|download"),
    (write("model.safetensors", b""), "model.safetensors|download"),
    (write("config.json", POINTER), "config.json|git lfs pull"),
    (write("config.json", HTML), "config.json|HTML|download"),
    (write("config.json", b'{"model_type": "lla'), "config.json|download"),
    (write("config.json", b"\x80\x02\xff"), "config.json|download|utf-8"),
    (write("config.json", b"[" * 10**5), "config.json|recursion"),
    (write("config.json", b'["llava"]'), "config.json|JSON list"),
    (write("config.json", ORIGINAL), "config.json|original|llava-hf/llava-1.5-7b-hf"),
    (write("config.json", ORIGINAL_TOO), "config.json|original|pickled"),
    (write("generation_config.json", b"[2]"), "generation_config.json|JSON list"),
    (
        write("generation_config.json", b'{"eos_token_id": "2"}'),
        "generation_config.json|eos_token_id|'2'",
    ),
    (remove("*"), "config.json|Hugging Face"),
    (remove("model.safetensors"), "model.safetensors|nothing"),
    (shards("model-1.safetensors", "model-2.safetensors"), "model-2.safetensors|download"),
    (shards("../x.safetensors"), "index.json|'../x.safetensors'|in this folder"),
    (shards("FOLDER/abs.safetensors"), "index.json|/abs.safetensors'|in this folder"),
    (shards("sub/x.safetensors"), "index.json|'sub/x.safetensors'|in this folder"),
    (shards("pytorch_model.bin"), "index.json|'pytorch_model.bin'|safetensors"),
    (tensor(f"{Q_PROJ}.qweight", torch.int32), "model.safetensors|q_proj.qweight|quantised|fp16"),
    (tensor(f"{Q_PROJ}.weight", torch.int8), "model.safetensors|q_proj.weight|I8|quantised|fp16"),
    (
        tensor("model.language_model.layers.0.self_attn.q_proj.weight", torch.float32),
        "twice|q_proj.weight",
    ),
    (config("quantization_config", {"quant_method": "awq"}), "config.json|quantised|fp16"),
    (
        config("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        "text_config|rope_scaling|linear|only",
    ),
    (
        config("text_config.rope_parameters", {"rope_type": "llama3"}),
        "text_config|rope_parameters|llama3|only",
    ),
    (config("text_config.rope_scaling", "default"), "text_config|rope_scaling|'default'|only"),
    (config("text_config.use_sliding_window", True), "text_config|sliding"),
    (config("model_type", "llava_next"), "model_type|'llava_next'|only 'llava'"),
    (config("model_type", "qwen2_vl"), "model_type|'qwen2_vl'|only 'llava'"),
    (config("model_type", ...), "model_type|None|only 'llava'"),
    (config("vision_config.model_type", ""), "vision_config.model_type|''|clip_vision_model"),
    (config("text_config.model_type", "mistral"), "text_config.model_type|'mistral'|llama|qwen2"),
    (
        config("vision_config.model_type", "dinov2"),
        "vision_config.model_type|'dinov2'|clip_vision_model|siglip",
    ),
    (config("vision_feature_layer", [-2, -5]), "vision_feature_layer|only one"),
    (config("vision_feature_layer", -9), "layer -9"),
    (config("vision_feature_select_strategy", "cls"), "vision_feature_select_strategy|'cls'"),
    (config("text_config.hidden_act", "relu"), "text_config.hidden_act|'relu'"),
    (config("text_config.hidden_size", "32"), "text_config.hidden_size|'32'|int"),
    (config("vision_config.num_hidden_layers", -3), "vision_config.num_hidden_layers|-3|int"),
    (config("text_config.vocab_size", True), "text_config.vocab_size|True|int"),
    (config("multimodal_projector_bias", 1), "multimodal_projector_bias|1|bool"),
    (config("vision_config", [1]), "vision_config|[1]|object"),
    (config("vision_config.num_attention_heads", 0), "num_attention_heads|0"),
    (config("vision_config.patch_size", 0), "patch_size|0"),
]


@pytest.mark.parametrize("spoil, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_read_is_refused_with_advice(make_checkpoint, spoil, words):
    """Every broken, foreign or dangerous folder raises InputError, naming the file or tensor and
    what to do."""
    folder, _ = make_checkpoint()
    spoil(folder)
    with pytest.raises(InputError) as caught:
        Llava.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message and all(word in message for word in words.split("|")), message


def test_pickle_is_never_opened(make_checkpoint):
    """A folder with only pickle files is refused by their names, and nothing opens them."""
    folder, _ = make_checkpoint()
    (folder / "model.safetensors").unlink()
    # Unpickling this makes a folder.
    (folder / "pytorch_model.bin").write_text(f"cos\nmkdir\n(V{folder}/exploded\ntR.")
    opened = []

    def watch(event, arguments):
        if str(folder) in str(arguments[:1]):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*safetensors"):
        Llava.from_pretrained(folder)
    assert any(name.endswith("config.json") for name in opened)
    assert not any(name.endswith(".bin") for name in opened) and not (folder / "exploded").exists()


JUNK = ["x", "default", "", -1, 0, 1.5, 10**30, float("nan"), True, None]
JUNK += [[], [1], {}, {"a": 1}]


@pytest.mark.parametrize("section", [None, "vision_config", "text_config"])
def test_no_value_in_config_json_escapes_as_another_exception(make_checkpoint, section):
    """Whatever one key of config.json is set to, reading it works or raises InputError naming the
    file."""
    path = make_checkpoint()[0] / "config.json"
    content = path.read_text()
    escaped = []
    keys = json.loads(content)
    if section:
        keys = keys[section]
    keys = [*keys, "rope_theta", "rope_scaling", "image_token_id"]
    for key, value in itertools.product(keys, JUNK):
        edit_json(path, {f"{section}.{key}" if section else key: value})
        try:
            LlavaConfig.from_pretrained(path.parent)
        except InputError as error:
            assert str(path) in str(error)
        except Exception as error:
            escaped.append((key, value, repr(error)))
        path.write_text(content)
    assert escaped == []


# ------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vision, text", PAIRS)
def test_transformers_opens_what_we_save(
    make_checkpoint, tmp_path, vision, text, tied, max_shard_bytes
):
    """A saved folder opens in transformers with nothing missing or left over and the same
    logits."""
    folder, reference = make_checkpoint(vision, text, text_config=dict(tie_word_embeddings=tied))
    Llava.from_pretrained(folder).save_pretrained(tmp_path / "saved", max_shard_bytes)
    shards = {file.name: load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")}
    assert (len(shards) > 5) == (max_shard_bytes == 30_000)
    if len(shards) > 1:
        index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
        sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
        assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= max_shard_bytes
        for file, shard in shards.items():
            assert all(index["weight_map"].pop(name) == file for name in shard)
        assert index["weight_map"] == {}
    reopened, report = type(reference).from_pretrained(
        tmp_path / "saved", dtype="float32", output_loading_info=True
    )
    assert not any(report.values()), report
    assert logit_difference(Llava.from_pretrained(folder), reopened) < TOLERANCE
    assert logit_difference(Llava.from_pretrained(tmp_path / "saved"), reference) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_reloaded_is_bitwise_equal(make_checkpoint, tmp_path, tied, dtype):
    """Our own reload has the same parameters, bit for bit, the same tying and the same stop
    tokens."""
    folder, _ = make_checkpoint("siglip", "qwen2", text_config=dict(tie_word_embeddings=tied))
    edit_json(folder / "generation_config.json", {"eos_token_id": [5, 6]})
    model = Llava.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_bytes=30_000)
    again = Llava.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert again.config.text == model.config.text and again.config.eos_token_ids == (5, 6)
    ours = dict(model.named_parameters())
    theirs = dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) == (not tied)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_saving_never_touches_an_existing_model(make_checkpoint):
    """save_pretrained refuses a folder that holds a model; training in place does not write through
    to the file."""
    folder, _ = make_checkpoint()
    before = (folder / "model.safetensors").read_bytes()
    model = Llava.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(FileExistsError, match=re.escape(str(folder))):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_only_the_base_model_is_saved(make_checkpoint, tmp_path):
    """The temperature that training adds is left out; LoRA must be merged before."""
    folder, _ = make_checkpoint()
    model = Llava.from_pretrained(folder)
    model.save_pretrained(tmp_path / "before")
    add_temperature(model, 0.07)
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="merge_lora first"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    merge_lora(model)  # B is zero: the weights are what they were
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        before = (tmp_path / "before" / name).read_bytes()
        assert (tmp_path / "after" / name).read_bytes() == before


# ------------------------------------------------------------------------------
# The contract (backbones/__init__.py)


def test_llava_fulfils_the_contract(make_checkpoint):
    """Every member of the contract is there, and what it computes has the shapes it promises."""
    folder, _ = make_checkpoint("siglip", "qwen2")
    model = backbones.load(folder)
    config = model.config
    assert isinstance(model, Llava) and isinstance(model, backbones.Backbone)
    assert isinstance(config, backbones.BackboneConfig) and isinstance(config, model.config_class)
    assert isinstance(config.text, backbones.TextSizes)
    assert isinstance(config.vision, backbones.VisionSizes)
    assert isinstance(model.language_model, backbones.LanguagePart)
    assert backbones.read_config(folder) == config
    D = config.text.hidden_size
    V = config.text.vocab_size
    assert model.lm_head.weight.shape == (V, D)
    assert model.language_model.embed_tokens.weight.shape == (V, D)
    assert len(model.language_model.layers) == config.text.num_hidden_layers
    assert not model.training

    input_ids, pixel_values = example(model)
    B, T = input_ids.shape
    images = len(pixel_values)
    assert pixel_values.shape[-2:] == (config.vision.image_size, config.vision.image_size)
    with torch.no_grad():
        features = model.image_features(pixel_values)
        hidden = model(input_ids, image_features=features)
        text = model(input_ids[1:2])  # the row without images
        logits = model.logits(hidden)
    assert features.shape == (images, config.num_image_tokens, D)
    assert hidden.shape == (B, T, D) and hidden.dtype == model.dtype
    assert torch.equal(hidden, model(input_ids, pixel_values))
    torch.testing.assert_close(text[0], hidden[1], rtol=0, atol=5e-6)
    assert logits.shape == (B, T, V)
    cache = model.new_cache(B)
    assert isinstance(cache, backbones.Cache) and cache.tokens == [[]] * B
    answers = model.generate(input_ids.tolist(), pixel_values, 3, cache=cache)
    assert len(answers) == B and max(map(len, answers)) <= 3
    assert [row[:T] for row in cache.tokens] == input_ids.tolist()

    # Causal: what stands behind a token does not change its hidden state.
    changed = input_ids.clone()
    changed[1, 20:] = 5
    with torch.no_grad():
        torch.testing.assert_close(model(changed[1:2])[0, :20], text[0, :20], rtol=0, atol=5e-6)


@pytest.mark.parametrize("checkpoint_layers", [1, 2])
def test_checkpointed_layers_change_no_gradient(make_checkpoint, checkpoint_layers):
    """Layers that compute their inner values twice give the same gradients, bit for bit."""
    model = Llava.from_pretrained(make_checkpoint()[0])
    input_ids, pixel_values = example(model)
    gradients = []
    for layers in (0, checkpoint_layers):
        model.language_model.checkpoint_layers = layers
        model.zero_grad()
        model.logits(model(input_ids, pixel_values)).logsumexp(-1).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients))


@pytest.mark.parametrize("read", [backbones.load, backbones.read_config])
def test_a_model_of_another_type_is_refused(tmp_path, read):
    """An unknown model_type is refused with those that there are."""
    for model_type in ("paligemma", None, ["llava"]):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        known = "only " + ", ".join(repr(name) for name in backbones.BACKBONES)
        with pytest.raises(InputError) as caught:
            read(tmp_path)
        message = str(caught.value)
        assert str(tmp_path / "config.json") in message
        assert repr(model_type) in message and known in message and "LLaVA-1.5" in message
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nothing")


# ------------------------------------------------------------------------------
# Memory

CHECKPOINT_BYTES = 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored, loaded", [("float32", "float32"), ("float16", "bfloat16")])
def test_loading_takes_the_memory_of_the_weights_once(stored, loaded):
    """The peak of resident memory rises by at most 1.15 times the weights, as they are stored or
    converted."""
    command = [sys.executable, "-m", "benchmarks.loading", "--peak-only"]
    command += ["--bytes", str(CHECKPOINT_BYTES), "--stored", stored, "--loaded", loaded]
    peak = json.loads(subprocess.check_output(command, text=True, cwd=PROJECT))
    ratio = peak["rise"] / peak["weights"]
    print(f"{stored} -> {loaded}: the peak rises by {ratio:.3f} times the weights")
    assert peak["weights"] > 0.9 * CHECKPOINT_BYTES and ratio <= 1.15
