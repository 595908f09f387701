"""lora.py against the base model, its own algebra, and peft."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import (
    AdapterError,
    Int8Linear,
    LeanLoRA,
    LoRAConfig,
    LoRALinear,
    SoftPrompt,
    adapters_disabled,
    add_lora,
    add_soft_prompts,
    freeze,
    load_adapter,
    lora_linear,
    merge_lora,
    quantize,
    save_adapter,
    trainable_parameters,
)
from model import Llava, LlavaConfig, TextConfig

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
    """After training, `adapters_disabled` gives exactly what was there before; outside it, something else."""
    model, _, _ = base
    expected = run(model, [1, 2, *IMAGE_PROMPT, 3, *TEXT_PROMPT])
    shake(adapted(model))
    soft = [1, 2, 99, 100, 101, 3, 102, 103]
    with adapters_disabled(model):
        assert torch.equal(run(model, soft), expected)
    assert not torch.allclose(run(model, soft), expected, atol=1e-3)


def test_only_adapters_train(base):
    """All seven linear layers of every block and both prompts get a gradient; nothing else has one."""
    model, _, _ = base
    shake(adapted(model))
    model.logits(model(torch.tensor([[1, 99, 100, 101, 102, 103]]))).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
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
NAMINGS = [NEW, "base_model.model.language_model.model.", "base_model.model.model.", "base_model.model."]


@pytest.mark.parametrize("prefix", NAMINGS)
@pytest.mark.parametrize("default", ["", ".default"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_pefts(base, tmp_path, prefix, default, use_rslora):
    """An adapter that peft trained and saved, under the new, the old and a bare language model's names, computes the
    same logits here."""
    model, _, reference = base
    wrapped = trained_by_peft(reference, tmp_path, target_modules=LANGUAGE, use_rslora=use_rslora)
    edit_names(tmp_path, lambda name: name.replace(NEW, prefix).replace(".weight", f"{default}.weight"))
    config = load_adapter(model, tmp_path, [], [], {"base": "unknown to peft"})
    assert config == LoRAConfig(3, 5.0, 0.0, ("q_proj", "v_proj", "down_proj"), use_rslora)
    ids = [1, 2, 3, 4, 5]
    assert (run(model, ids) - their_logits(wrapped, ids)).abs().max() < 1e-4


def test_targets_as_a_list_leak_into_the_vision_tower(base, tmp_path):
    """peft makes LoRA for q_proj of the vision tower too. What learned nothing there is left out, what did is refused
    by name."""
    model, folder, reference = base
    wrapped = trained_by_peft(reference, tmp_path, target_modules=["q_proj", "v_proj"])
    leaked = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "vision_tower" in name]
    assert len(leaked) == 3 * 2 * 2
    with pytest.raises(AdapterError, match="unexpected: base_model.model.model.vision_tower"):
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
    with pytest.raises(AdapterError) as error:
        load_adapter(model, tmp_path, [], [])
    assert "unexpected: base_model.model.lm_head.lora_A" in str(error.value)
    assert "unexpected: base_model.model.model.multi_modal_projector.linear_1.lora_B" in str(error.value)


def test_a_tensor_under_two_names_is_refused(base, tmp_path):
    """Old and bare names in one file could mean either."""
    model, _, reference = base
    trained_by_peft(reference, tmp_path, target_modules=LANGUAGE)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name.replace(NEW, NAMINGS[2]): tensor + 1 for name, tensor in tensors.items()}, file)
    with pytest.raises(AdapterError, match="twice, under different names"):
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
    with pytest.raises(AdapterError, match=message):
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
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(Llava.from_pretrained(folder), tmp_path, [], [])
    assert str(tmp_path) in str(error.value)


def test_renamed_and_missing_tensors_are_listed(base, tmp_path):
    """A renamed soft prompt is reported as missing and unexpected in one message; an empty folder is no adapter."""
    model, folder, _ = base
    freeze(model)
    add_soft_prompts(model, IMAGE_PROMPT, TEXT_PROMPT)
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "soft_prompts.safetensors"
    save_file({name.replace("image", "picture"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="missing: soft_prompt.image[^$]*unexpected: soft_prompt.picture"):
        load_adapter(Llava.from_pretrained(folder), tmp_path / "adapter", IMAGE_PROMPT, TEXT_PROMPT)
    with pytest.raises(AdapterError, match="not an adapter"):
        load_adapter(Llava.from_pretrained(folder), tmp_path, [], [])


def test_adapters_know_what_they_were_trained_on(base, tmp_path):
    """Another base model or prompt is refused with both values and what to do, in either file; so is a renamed key."""
    model, folder, _ = base
    notes = {"image_prompt": "In one word:", "template": "USER: ", "base": "0123"}
    adapted(model)
    save_adapter(model, tmp_path, notes)
    load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, notes)
    other_base = notes | {"base": "4567"}
    with pytest.raises(
        AdapterError, match="adapter_model.safetensors: base was '0123' and is '4567'; use the base model"
    ):
        load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, other_base)
    (tmp_path / "adapter_config.json").unlink()
    soft = tmp_path / "soft_prompts.safetensors"
    with pytest.raises(AdapterError, match="soft_prompts.safetensors: image_prompt was 'In one word:' and is 'Why'"):
        load_adapter(
            Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, notes | {"image_prompt": "Why"}
        )
    renamed = json.dumps({key.replace("template", "model"): note for key, note in notes.items()})
    save_file(load_file(soft), soft, metadata={"trained_on": renamed})
    with pytest.raises(AdapterError, match="template was None and is 'USER: '"):
        load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, notes)
    for broken in ("{", "[1]", '"x"'):
        save_file(load_file(soft), soft, metadata={"trained_on": broken})
        with pytest.raises(AdapterError, match="not a safetensors file of an adapter"):
            load_adapter(Llava.from_pretrained(folder), tmp_path, IMAGE_PROMPT, TEXT_PROMPT, notes)


def group(layers, bias, dtype=torch.float32):
    """The tensors of several LoRA layers with one input of 6: weight (out, 6), absmax, bias, A (3, 6), B (out, 3)."""
    made = []
    for out in range(4, 4 + layers):
        made += [torch.randn(out, 6), None, torch.randn(out) if bias else None, torch.randn(3, 6), torch.randn(out, 3)]
    return [None if tensor is None else tensor.to(dtype) for tensor in made]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_recipe", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_lean_lora_is_the_reference(layers, bias, with_recipe, shape):
    """Outputs and all gradients of LeanLoRA against the line that it stands for, one layer and several."""
    source, tensors, results = torch.randn(*shape, 6), group(layers, bias), []
    for lean in (True, False):
        inputs = [source.clone().requires_grad_()]
        flat = [
            None if tensor is None else tensor.clone().requires_grad_(i % 5 > 2) for i, tensor in enumerate(tensors)
        ]
        inputs += [tensor for tensor in flat if tensor is not None and tensor.requires_grad]
        x = torch.sin(inputs[0])
        if lean:
            outputs = LeanLoRA.apply(x, (torch.sin, (inputs[0],)) if with_recipe else None, 0.7, *flat)
        else:
            outputs = [lora_linear(x, *flat[i : i + 5], 0.7) for i in range(0, len(flat), 5)]
        sum((y.square() * (i + 1)).sum() for i, y in enumerate(outputs)).backward()
        results.append((*outputs, *(tensor.grad for tensor in inputs)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_lean_lora_passes_gradcheck(layers):
    x, tensors = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), group(layers, False, torch.float64)
    trained = [tensor.requires_grad_() for i, tensor in enumerate(tensors) if i % 5 > 2]

    def run(x, *trained):
        flat = [trained[i // 5 * 2 + i % 5 - 3] if i % 5 > 2 else tensor for i, tensor in enumerate(tensors)]
        return LeanLoRA.apply(x, None, 0.5, *flat)

    assert torch.autograd.gradcheck(run, (x, *trained))


def test_lean_lora_on_the_first_layer_that_needs_gradients():
    """An input without gradient, as embeddings are without soft prompts, gets none; A and B get theirs."""
    x, (weight, _, _, A, B) = torch.randn(4, 6), group(1, False)
    A.requires_grad_(), B.requires_grad_()
    LeanLoRA.apply(x, None, 0.5, weight, None, None, A, B)[0].square().sum().backward()
    ours = A.grad.clone(), B.grad.clone()
    A.grad = B.grad = None
    lora_linear(x, weight, None, None, A, B, 0.5).square().sum().backward()
    torch.testing.assert_close(ours, (A.grad, B.grad))


def test_what_has_a_recipe_is_not_kept(base):
    """Between the norms, the product of the MLP and the layers that read them, nothing is kept twice: a layer keeps
    its two norms' inputs, q, k and v, what attention returned, gate and up, and what the A's made."""
    model, _, _ = base
    adapted(model)
    ids, sizes = torch.tensor([[1, 2, 3, 4, 5, 99, 100]]), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
    ):
        kept = model(ids)
    assert kept.requires_grad
    D, heads, hidden, rank, T = 32, 4 * 8 + 2 * 2 * 8 + 4 * 8, 56, 7 * 4, 7
    A = 5 * D * 4 + (D + hidden) * 4  # the concatenated A's of q, k, v and of gate, up; those of o and down
    layer = T * (2 * D + heads + 2 * hidden + rank + 4 + 2) + A  # 4: log-sum-exp of the heads, 2: both norms
    total = sum(size for address, size in sizes.items() if address not in weights)
    assert abs(total - 2 * layer) < 0.1 * layer + T * D * 2


def test_a_trainable_weight_below_lora_gets_its_gradient(base):
    """LeanLoRA is for frozen weights; where one trains, the reference is used."""
    model, _, _ = base
    add_lora(model, LoRAConfig(rank=4))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    layer = model.language_model.layers[0].mlp.down_proj
    assert layer.weight.grad.abs().sum() > 0 and layer.lora_B.weight.grad.abs().sum() > 0


# ---- Int8


def int8_group(layers, bias, dtype=torch.float32):
    """`group` with int8 weights, and the same with the weights that these stand for."""
    quantized = group(layers, bias, dtype)
    plain = list(quantized)
    for i in range(0, len(quantized), 5):
        linear = torch.nn.Linear(*quantized[i].shape[::-1], bias=False, dtype=dtype)
        linear.weight.data = quantized[i]
        layer = Int8Linear(linear)
        quantized[i : i + 2] = layer.weight.data, layer.absmax.data
        plain[i] = layer.weight.to(dtype) * (layer.absmax.data / 127)
    return quantized, plain


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_int8_is_lora_on_the_dequantized_weight(layers, bias, dropout):
    """Outputs and gradients of x, A and B over int8 weights against the reference over whole ones, 1e-5 relative."""
    quantized, plain = int8_group(layers, bias)
    source, results = torch.randn(2, 5, 6), []
    for lean, tensors in ((True, quantized), (False, plain)):
        x = source.clone().requires_grad_()
        flat = [t if i % 5 < 3 else t.clone().requires_grad_() for i, t in enumerate(tensors)]
        torch.manual_seed(1)
        if lean and not dropout:
            outputs = LeanLoRA.apply(torch.sin(x), (torch.sin, (x,)), 0.7, *flat)
        else:
            outputs = [lora_linear(torch.sin(x), *flat[i : i + 5], 0.7, dropout) for i in range(0, len(flat), 5)]
        sum((y.square() * (i + 1)).sum() for i, y in enumerate(outputs)).backward()
        results.append((*outputs, x.grad, *(t.grad for t in flat if t is not None and t.requires_grad)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_int8_rounds_to_the_nearest_step():
    """Every weight within half a step of its row, the largest of each row exact but for the step's own rounding, rows
    of zeros and rows of one sign included."""
    linear = torch.nn.Linear(40, 6)
    with torch.no_grad():
        linear.weight[1] = 0
        linear.weight[2].abs_()
        linear.weight[3] *= 1e-6
    layer = Int8Linear(linear)
    step = layer.absmax / 127
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().amax() == 127
    difference = (layer.weight * step - linear.weight).abs()
    assert (difference <= 0.5001 * step).all() and (difference[1] == 0).all() and difference.max() > 0
    assert torch.equal(layer.absmax, linear.weight.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("rank", [4, 0])
def test_int8_model_trains_and_keeps_no_whole_weights(base, rank):
    """On int8 layers, with LoRA and with soft prompts alone, gradients are those of the model with the same values as
    whole weights; autograd keeps no tensor of a weight's size but the int8 ones."""
    model, folder, _ = base
    quantize(model)
    whole = Llava.from_pretrained(folder)
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            whole.get_submodule(name).weight.data = module.weight * (module.absmax.data / 127)
    results, large = [], []

    def note(tensor):
        large.append(tensor.dtype) if tensor.shape in [(32, 32), (16, 32), (56, 32), (32, 56)] else None
        return tensor

    for each in (model, whole):
        freeze(each)
        torch.manual_seed(0)
        if rank:
            add_lora(each, LoRAConfig(rank, 6))
        add_soft_prompts(each, IMAGE_PROMPT, TEXT_PROMPT)
        shake(each)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = each.logits(each(torch.tensor([[1, 99, 100, 101, 102, 103]]))).square().mean()
        if each is model:
            assert large.count(torch.int8) == len(large) == 14
        loss.backward()
        results.append({name: p.grad for name, p in trainable_parameters(each).items()} | {"loss": loss.detach()})
    assert results[0].keys() == results[1].keys()
    assert all((results[0][name] - theirs).norm() <= 1e-5 * theirs.norm() for name, theirs in results[1].items())


def test_int8_disabled_merged_and_saved(base, tmp_path):
    """Adapters off is bitwise the int8 model; merging keeps the function in whole weights; a run's files fit again."""
    model, folder, _ = base
    quantize(model)
    soft, hard = [1, 2, 99, 100, 101, 3, 102, 103], [1, 2, *IMAGE_PROMPT, 3, *TEXT_PROMPT]
    expected = run(model, hard)
    shake(adapted(model, LoRAConfig(rank=4, alpha=6, targets=("q_proj", "down_proj"))))
    with adapters_disabled(model):
        assert torch.equal(run(model, soft), expected)
    trained = run(model, soft)
    assert not torch.allclose(trained, expected, atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    again = Llava.from_pretrained(folder)
    quantize(again)
    load_adapter(again, tmp_path / "adapter", IMAGE_PROMPT, TEXT_PROMPT)
    assert torch.equal(run(again, soft), trained)
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(isinstance(module, LoRALinear | Int8Linear) for module in model.modules())
    torch.testing.assert_close(run(model, soft), trained, rtol=1e-4, atol=1e-5)


LLAVA_7B = LlavaConfig(text=TextConfig(vocab_size=32064))


def test_int8_halves_the_weights_of_7b():
    """LLaVA-1.5-7B by its shapes: at most 0.55 of bf16, absmax included."""
    with torch.device("meta"):
        model = Llava(LLAVA_7B)
    held = sum(p.numel() for p in model.parameters())
    quantize(model)
    size = sum(p.numel() * (1 if p.dtype == torch.int8 else 2) for p in model.parameters())
    assert 0.5 < size / (2 * held) < 0.55


def test_shapes_of_7b_are_the_real_ones(real_file):
    """Bytes of the weights above against the released model's config and index of tensors."""
    config = LlavaConfig.from_pretrained(real_file("llava-1.5-7b-hf/config.json").parent)
    index = json.loads(real_file("llava-1.5-7b-hf/model.safetensors.index.json").read_text())
    totals = []
    for each in (LLAVA_7B, config):
        with torch.device("meta"):
            totals.append(sum(p.numel() for p in Llava(each).parameters()))
    unused = 12_596_224 + 2 * 1024  # the vision tower's last layer and the norm behind it
    assert totals[0] == totals[1] and 2 * (totals[1] + unused) == index["metadata"]["total_size"]
