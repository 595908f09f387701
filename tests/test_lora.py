"""lora.py and formats/peft.py against the base model, their own algebra, and peft."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.files import InputError
from lora import (
    LoRAConfig,
    LoRALinear,
    SoftPrompt,
    adapters,
    adapters_disabled,
    add_lora,
    add_soft_prompts,
    add_temperature,
    freeze,
    load_adapter,
    merge_lora,
    save_adapter,
    trainable_parameters,
)
from model import Llava

IMAGE_PROMPT, TEXT_PROMPT = [5, 6, 7], [8, 9]


def shake(model):
    """Give every trainable tensor values that matter (LoRA's B starts at zero)."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def base(make_checkpoint):
    folder, reference = make_checkpoint()
    return Llava.from_pretrained(folder), folder, reference


def adapted(model, config=None):
    freeze(model)
    add_lora(model, config or LoRAConfig(rank=4, alpha=6))
    add_soft_prompts(model, IMAGE_PROMPT, TEXT_PROMPT)
    return model


def run(model, ids):
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids])))


def test_start_is_the_base_model(base):
    """Before any step, LoRA adds nothing and the soft prompts are the hand-written ones."""
    model, _, _ = base
    expected = run(model, [1, 2, *IMAGE_PROMPT, 3, *TEXT_PROMPT])
    adapted(model)
    assert torch.equal(run(model, [1, 2, 99, 100, 101, 3, 102, 103]), expected)


def test_disabled_is_bitwise_the_base_model(base):
    """After training, `adapters_disabled` gives exactly what was there before."""
    model, _, _ = base
    expected = run(model, [1, 2, *IMAGE_PROMPT, 3, *TEXT_PROMPT])
    shake(adapted(model))
    soft = [1, 2, 99, 100, 101, 3, 102, 103]
    with adapters_disabled(model):
        assert torch.equal(run(model, soft), expected)
    assert not torch.allclose(run(model, soft), expected, atol=1e-3)


def test_only_adapters_train(base):
    """All seven linear layers of every block and both prompts get a gradient, nothing else."""
    model, _, _ = base
    shake(adapted(model))
    model.logits(model(torch.tensor([[1, 99, 100, 101, 102, 103]]))).sum().backward()
    with_gradient = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().sum() > 0:
            with_gradient.add(name)
    assert with_gradient == trainable_parameters(model).keys()
    assert len(with_gradient) == 2 * 7 * 2 + 2  # layers x linears x (A, B), and two prompts


def test_lora_is_its_formula(base):
    """y = W x + alpha / r * B A x, with rank-stabilised scaling on demand."""
    linear = torch.nn.Linear(6, 5)
    for config, scale in ((LoRAConfig(4, 6), 1.5), (LoRAConfig(4, 6, use_rslora=True), 3.0)):
        layer = LoRALinear(linear, config)
        torch.nn.init.normal_(layer.lora_B.weight)
        x = torch.randn(3, 6)
        expected = linear(x) + scale * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
        torch.testing.assert_close(layer(x), expected)


def test_dropout_only_while_training(base):
    """In training, dropout hits LoRA's input alone; in evaluation nothing is random."""
    layer = LoRALinear(torch.nn.Linear(64, 8), LoRAConfig(4, dropout=0.5))
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(2, 64)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_a_trainable_weight_below_lora_gets_its_gradient(base):
    """LoRA does not freeze: whoever leaves the base weights trainable trains them too."""
    model, _, _ = base
    add_lora(model, LoRAConfig(rank=4))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    layer = model.language_model.layers[0].mlp.down_proj
    assert layer.base_layer.weight.grad.abs().sum() > 0
    assert layer.lora_B.weight.grad.abs().sum() > 0


def test_names_of_parameters(base):
    """PEFT's names inside a layer, and the vocabulary's table where it always was."""
    model, _, _ = base
    add_temperature(adapted(model), 0.07)
    names = dict(model.named_parameters()).keys()
    layer = "language_model.layers.0.self_attn.q_proj"
    expected = {f"{layer}.base_layer.weight", f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
    expected |= {"language_model.embed_tokens.weight", "language_model.embed_tokens.image"}
    assert expected <= names
    assert adapters(model).keys() >= {layer, "language_model.embed_tokens"}
    assert {"log_scale", "language_model.embed_tokens.text"} <= trainable_parameters(model).keys()


def test_lora_is_added_once(base):
    """A second LoRA on the same layers, and one on none, are refused."""
    model, _, _ = base
    with pytest.raises(InputError, match="none of these"):
        add_lora(model, LoRAConfig(targets=("lm_head",)))
    add_lora(model, LoRAConfig(targets=("q_proj",)))
    with pytest.raises(InputError, match="has LoRA already"):
        add_lora(model, LoRAConfig(targets=("k_proj", "q_proj")))


def test_the_temperature_is_clips(base, tmp_path):
    """log_scale trains, in fp32; it is 1 / temperature, and stays out of the adapter's files."""
    model, _, _ = base
    model.to(torch.bfloat16)
    add_temperature(adapted(model), 0.05)
    assert model.log_scale.dtype == torch.float32 and model.log_scale.requires_grad
    torch.testing.assert_close(model.log_scale.exp().item(), 20.0)
    save_adapter(model, tmp_path)
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert stored and not any("log_scale" in name for name in stored)


def test_merge_keeps_the_function(base):
    """Merged weights compute what the adapters did, in plain linear layers."""
    model, _, _ = base
    shake(adapted(model))
    expected = run(model, [1, 99, 100, 3])
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(run(model, [1, 99, 100, 3]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_ours(base, tmp_path, use_rslora):
    """peft on transformers' LLaVA computes the same logits from what `save_adapter` writes."""
    peft = pytest.importorskip("peft")
    model, _, reference = base
    config = LoRAConfig(rank=4, alpha=6, use_rslora=use_rslora)
    freeze(model)
    add_lora(model, config)
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    ids = [1, 2, 3, 4, 5]
    with torch.no_grad():
        expected = loaded(input_ids=torch.tensor([ids])).logits
    assert not any("lora" in name and "vision" in name for name, _ in loaded.named_parameters())
    assert (run(model, ids) - expected).abs().max() < 1e-4


def trained_by_peft(reference, folder, **settings):
    """A LoRA of rank 3 made and saved by peft on transformers' model, with B away from zero."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=5, **settings)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped


def edit_names(folder, rename):
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


def their_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
NEW = "base_model.model.model.language_model."
NAMINGS = [
    NEW,
    "base_model.model.language_model.model.",
    "base_model.model.model.",
    "base_model.model.",
]


@pytest.mark.parametrize("prefix", NAMINGS)
@pytest.mark.parametrize("default", ["", ".default"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_pefts(base, tmp_path, prefix, default, use_rslora):
    """An adapter that peft trained and saved, under the new, the old and a bare language model's
    names, computes the same logits here."""
    model, _, reference = base
    wrapped = trained_by_peft(reference, tmp_path, target_modules=LANGUAGE, use_rslora=use_rslora)
    edit_names(
        tmp_path, lambda name: name.replace(NEW, prefix).replace(".weight", f"{default}.weight")
    )
    config = load_adapter(model, tmp_path, [], [], {"base": "unknown to peft"})
    assert config == LoRAConfig(3, 5.0, 0.0, ("q_proj", "v_proj", "down_proj"), use_rslora)
    ids = [1, 2, 3, 4, 5]
    assert (run(model, ids) - their_logits(wrapped, ids)).abs().max() < 1e-4


def test_targets_as_a_list_leak_into_the_vision_tower(base, tmp_path):
    """peft makes LoRA for q_proj of the vision tower too. What learned nothing there is left out,
    what did is refused by name."""
    model, folder, reference = base
    wrapped = trained_by_peft(reference, tmp_path, target_modules=["q_proj", "v_proj"])
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in stored if "vision_tower" in name]) == 3 * 2 * 2
    with pytest.raises(InputError, match="unexpected: base_model.model.model.vision_tower"):
        load_adapter(model, tmp_path, [], [])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name and "vision_tower" in name:
                parameter.zero_()
    wrapped.save_pretrained(tmp_path)
    model, ids = Llava.from_pretrained(folder), [1, 2, 3, 4, 5]
    load_adapter(model, tmp_path, [], [])
    assert (run(model, ids) - their_logits(wrapped, ids)).abs().max() < 1e-4


def test_projector_and_head_are_refused_by_name(base, tmp_path):
    """LoRA of layers that have none here is listed, not dropped."""
    model, folder, reference = base
    trained_by_peft(reference, tmp_path, target_modules=["q_proj", "linear_1", "lm_head"])
    with pytest.raises(InputError) as error:
        load_adapter(model, tmp_path, [], [])
    assert "unexpected: base_model.model.lm_head.lora_A" in str(error.value)
    assert "unexpected: base_model.model.model.multi_modal_projector.linear_1.lora_B" in str(
        error.value
    )


def test_a_tensor_under_two_names_is_refused(base, tmp_path):
    """Old and bare names in one file could mean either."""
    model, _, reference = base
    trained_by_peft(reference, tmp_path, target_modules=LANGUAGE)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    twice = {name.replace(NEW, NAMINGS[2]): tensor + 1 for name, tensor in tensors.items()}
    save_file(tensors | twice, file)
    with pytest.raises(InputError, match="twice, under different names"):
        load_adapter(model, tmp_path, [], [])


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, "layers_to_transform"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
    ],
)
def test_what_peft_has_and_we_have_not(base, tmp_path, settings, message):
    """Configs that peft itself writes."""
    model, _, reference = base
    targets = ["q_proj"] if "layers_to_transform" in settings else LANGUAGE
    trained_by_peft(reference, tmp_path, target_modules=targets, **settings)
    with pytest.raises(InputError, match=message):
        load_adapter(model, tmp_path, [], [])


def test_saved_and_loaded_is_bitwise_the_same(base, tmp_path):
    """LoRA and soft prompts survive the files exactly, with the notes that were given."""
    model, folder, _ = base
    config = LoRAConfig(rank=4, alpha=6, targets=("q_proj", "down_proj"))
    shake(adapted(model, config))
    save_adapter(model, tmp_path / "adapter", {"image_prompt": "a prompt"})
    again = Llava.from_pretrained(folder)
    assert load_adapter(again, tmp_path / "adapter", IMAGE_PROMPT, TEXT_PROMPT) == config
    ids = [1, 99, 100, 101, 102, 103, 4]
    assert torch.equal(run(model, ids), run(again, ids))
    assert isinstance(again.language_model.embed_tokens, SoftPrompt)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"a_key_of_the_future": True}, "a_key_of_the_future is True"),
        ({"lora_alpha": float("inf")}, "alpha inf"),
        ({"r": 10**12}, "rank 1000000000000"),
        ({"r": 0}, "rank 0"),
        ({"r": "x"}, "cannot be used"),
        ({"r": 5}, "wrong shape"),
        ({"lora_dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_foreign_adapters_are_refused_by_name(base, tmp_path, change, message):
    """What is not implemented is refused with the file and the field."""
    model, folder, _ = base
    freeze(model)
    add_lora(model, LoRAConfig(rank=4))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as error:
        load_adapter(Llava.from_pretrained(folder), tmp_path, [], [])
    assert str(tmp_path) in str(error.value)


def test_renamed_and_missing_tensors_are_listed(base, tmp_path):
    """A renamed soft prompt is reported as missing and unexpected in one message; an empty folder
    is no adapter."""
    model, folder, _ = base
    freeze(model)
    add_soft_prompts(model, IMAGE_PROMPT, TEXT_PROMPT)
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "soft_prompts.safetensors"
    renamed = {name.replace("image", "picture"): row for name, row in load_file(file).items()}
    save_file(renamed, file)
    message = "missing: soft_prompt.image[^$]*unexpected: soft_prompt.picture"
    with pytest.raises(InputError, match=message):
        load_adapter(Llava.from_pretrained(folder), tmp_path / "adapter", IMAGE_PROMPT, TEXT_PROMPT)
    with pytest.raises(InputError, match="not an adapter"):
        load_adapter(Llava.from_pretrained(folder), tmp_path, [], [])


def test_adapters_know_what_they_were_trained_on(base, tmp_path):
    """Another base model or prompt is refused with both values and what to do, in either file; so
    is a renamed key."""
    model, folder, _ = base
    notes = {"image_prompt": "In one word:", "template": "USER: ", "base": "0123"}
    adapted(model)
    save_adapter(model, tmp_path, notes)
    load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, notes)
    other_base = notes | {"base": "4567"}
    message = "adapter_model.safetensors: base was '0123' and is '4567'; use the base model"
    with pytest.raises(InputError, match=message):
        load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, other_base)
    (tmp_path / "adapter_config.json").unlink()
    soft = tmp_path / "soft_prompts.safetensors"
    other_prompt = notes | {"image_prompt": "Why"}
    message = "soft_prompts.safetensors: image_prompt was 'In one word:' and is 'Why'"
    with pytest.raises(InputError, match=message):
        load_adapter(
            Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, other_prompt
        )
    renamed = json.dumps({key.replace("template", "model"): note for key, note in notes.items()})
    save_file(load_file(soft), soft, metadata={"trained_on": renamed})
    with pytest.raises(InputError, match="template was None and is 'USER: '"):
        load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, notes)
    for broken in ("{", "[1]", '"x"'):
        save_file(load_file(soft), soft, metadata={"trained_on": broken})
        with pytest.raises(InputError, match="not a safetensors file of an adapter"):
            load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, notes)
