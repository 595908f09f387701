"""fast/ against the plain forms: the same values and gradients, less memory, and never in the place
of a form that someone has edited."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
import losses
from fast import int8
from fast.chunked import linear_cross_entropy, tiled_contrastive_loss
from fast.int8 import Int8Linear, quantize
from fast.lean import LeanDecoderLayer, LeanLoRA, SwiGLU, keep_x, project
from lora import (
    LoRAConfig,
    LoRALinear,
    adapters_disabled,
    add_lora,
    add_soft_prompts,
    freeze,
    load_adapter,
    merge_lora,
    save_adapter,
    trainable_parameters,
)
from model import MLP, Attention, DecoderLayer, Llava, LlavaConfig, TextConfig, split_heads

IMAGE_PROMPT, TEXT_PROMPT = [5, 6, 7], [8, 9]
SOFT = [1, 2, 99, 100, 101, 3, 102, 103]
HARD = [1, 2, *IMAGE_PROMPT, 3, *TEXT_PROMPT]


def shake(model):
    """Give every trainable tensor values that matter (LoRA's B starts at zero)."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def adapted(folder, config=None, dtype=torch.float32, in_int8=False):
    """A tiny model with LoRA and soft prompts that have learned something."""
    model = Llava.from_pretrained(folder, dtype=dtype)
    freeze(model)
    if in_int8:
        quantize(model)
    add_lora(model, config or LoRAConfig(rank=4, alpha=6))
    add_soft_prompts(model, IMAGE_PROMPT, TEXT_PROMPT)
    shake(model)
    return model


def with_lean_layers(model):
    """A copy of the model with fast layers, put there without asking the guard."""
    model = copy.deepcopy(model)
    layers = model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = LeanDecoderLayer(layer)
    return model


def run(model, ids):
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids])))


def values_and_gradients(model, ids=SOFT):
    """Logits, and the gradients of their squares by name."""
    model.zero_grad()
    logits = model.logits(model(torch.tensor([ids])))
    logits.float().square().mean().backward()
    found = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    return found | {"logits": logits.detach()}


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert (found[name] - theirs).norm() <= tolerance * theirs.norm(), name


# ---- LeanLoRA and SwiGLU: their formulas


def lora_layers(count, bias, in_int8=False):
    """LoRA layers with one input of 6, that have learned something; their base is frozen."""
    layers = []
    for out in range(4, 4 + count):
        base = nn.Linear(6, out, bias=bias).requires_grad_(False)
        layer = LoRALinear(Int8Linear(base) if in_int8 else base, LoRAConfig(rank=3, alpha=2))
        nn.init.normal_(layer.lora_B.weight)
        layers.append(layer)
    return layers


def results(outputs, x, layers):
    """Outputs and all gradients of a loss that weighs the layers differently."""
    for layer in layers:
        layer.zero_grad()
    sum((y.square() * (i + 1)).sum() for i, y in enumerate(outputs)).backward()
    grads = [layer.lora_A.weight.grad for layer in layers]
    grads += [layer.lora_B.weight.grad for layer in layers]
    return [y.detach() for y in outputs] + grads + ([] if x.grad is None else [x.grad])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [torch.sin, keep_x])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("in_int8", [True, False])
def test_project_is_the_plain_layers(count, bias, function, shape, in_int8):
    """Outputs and all gradients against the lines that it stands for."""
    layers = lora_layers(count, bias, in_int8)
    source = torch.randn(*shape, 6)
    plain_x = source.clone().requires_grad_()
    expected = results([layer(function(plain_x)) for layer in layers], plain_x, layers)
    lean_x = source.clone().requires_grad_()
    found = results(project(layers, function, lean_x), lean_x, layers)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_lean_lora_passes_gradcheck(count):
    layers = [layer.double() for layer in lora_layers(count, True)]
    bases = [layer.base_layer for layer in layers]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    A = torch.cat([layer.lora_A.weight.detach() for layer in layers]).requires_grad_()
    Bs = [layer.lora_B.weight for layer in layers]

    def of_tensors(x, A, *Bs):
        return LeanLoRA.apply(x, A, 0.5, bases, keep_x, (x,), *Bs)

    assert torch.autograd.gradcheck(of_tensors, (x, A, *Bs))


def test_swiglu_passes_gradcheck():
    gate = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(SwiGLU.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


def test_the_first_layer_that_needs_gradients():
    """An input without gradient, as embeddings are without soft prompts, gets none; A and B do."""
    layers = lora_layers(2, False)
    x = torch.randn(4, 6)
    expected = results([layer(x) for layer in layers], x, layers)
    found = results(project(layers, keep_x, x), x, layers)
    torch.testing.assert_close(found, expected)


def test_layers_that_cannot_be_lean_are_computed_as_they_are():
    """Among three layers one is an nn.Linear, one someone's own, and one has another rank."""

    class Own(LoRALinear):
        def forward(self, x):
            return super().forward(x) + 1

    first, second = lora_layers(2, True)
    own = Own(nn.Linear(6, 4).requires_grad_(False), first.config)
    other = LoRALinear(nn.Linear(6, 5).requires_grad_(False), LoRAConfig(rank=2))
    nn.init.normal_(other.lora_B.weight)
    linear = nn.Linear(6, 3)
    for group in ([first, linear, second], [first, own, second], [first, other, second]):
        x = torch.randn(3, 6)
        expected = [layer(torch.sin(x)) for layer in group]
        torch.testing.assert_close(project(group, torch.sin, x), expected)


# ---- The lean layer in a model


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", ["all", "some"])
@pytest.mark.parametrize("in_int8", [True, False])
def test_lean_layers_are_the_plain_ones(make_checkpoint, text, targets, in_int8):
    """Logits and all gradients; without gradients; with the adapters disabled: bitwise there."""
    folder, _ = make_checkpoint(text=text)
    config = LoRAConfig(rank=4, alpha=6)
    if targets == "some":
        config.targets = ("v_proj", "q_proj", "down_proj")
    plain = adapted(folder, config, in_int8=in_int8)
    fast_model = with_lean_layers(plain)
    assert_close(values_and_gradients(fast_model), values_and_gradients(plain))
    torch.testing.assert_close(run(fast_model, SOFT), run(plain, SOFT), rtol=1e-5, atol=1e-5)
    with adapters_disabled(plain), adapters_disabled(fast_model):
        assert torch.equal(run(fast_model, SOFT), run(plain, SOFT))


@pytest.mark.parametrize("in_int8", [True, False])
def test_lean_layers_with_soft_prompts_alone(make_checkpoint, in_int8):
    """Without LoRA: the logits are bitwise the plain layers', the gradients close to theirs."""
    folder, _ = make_checkpoint()
    plain = Llava.from_pretrained(folder)
    freeze(plain)
    if in_int8:
        quantize(plain)
    add_soft_prompts(plain, IMAGE_PROMPT, TEXT_PROMPT)
    found = values_and_gradients(with_lean_layers(plain))
    expected = values_and_gradients(plain)
    assert torch.equal(found["logits"], expected["logits"])
    assert_close(found, expected)


def test_lean_layers_in_bf16(make_checkpoint):
    """As close to the fp32 gradients as the plain layers in bf16 are, within a half."""
    folder, _ = make_checkpoint()
    exact = adapted(folder)
    plain = copy.deepcopy(exact)
    for parameter in plain.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    fast_model = with_lean_layers(plain)
    expected = values_and_gradients(exact)
    errors = []
    for model in (plain, fast_model):
        found = values_and_gradients(model)
        assert found["logits"].dtype == torch.bfloat16
        differences = [(found[name] - theirs).norm() for name, theirs in expected.items()]
        norms = [theirs.norm() for theirs in expected.values()]
        errors.append((torch.stack(differences) / torch.stack(norms)).mean())
    assert errors[1] < 1.5 * errors[0] < 0.1


def test_lean_layers_generate_with_a_cache(make_checkpoint):
    """Hidden states of a conversation in two parts, and greedy answers."""
    folder, _ = make_checkpoint()
    plain = adapted(folder).eval()
    fast_model = with_lean_layers(plain)
    states = []
    with torch.no_grad():
        for model in (plain, fast_model):
            cache = model.new_cache(1)
            first = model(torch.tensor([SOFT]), cache=cache)
            cache.tokens = [list(SOFT)]
            states.append((first, model(torch.tensor([[4, 5]]), cache=cache)))
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)
    prompts = [SOFT, [1, 2]]
    answers = plain.generate(prompts, max_new_tokens=8)
    assert fast_model.generate(prompts, max_new_tokens=8) == answers


def test_with_dropout_the_plain_layers_are_computed(make_checkpoint):
    """While training, bitwise and with the same masks; in evaluation the lean ones."""
    folder, _ = make_checkpoint()
    plain = adapted(folder, LoRAConfig(rank=4, dropout=0.5)).train()
    fast_model = with_lean_layers(plain)
    torch.manual_seed(1)
    expected = values_and_gradients(plain)
    torch.manual_seed(1)
    found = values_and_gradients(fast_model)
    assert torch.equal(found["logits"], expected["logits"])
    assert_close(found, expected)
    assert_close(values_and_gradients(fast_model.eval()), values_and_gradients(plain.eval()))


def test_a_trainable_weight_below_lora_gets_its_gradient(make_checkpoint):
    """LeanLoRA is for frozen weights; where one trains, the plain layer is computed."""
    folder, _ = make_checkpoint()
    plain = adapted(folder)
    for layer in plain.language_model.layers:
        layer.mlp.down_proj.base_layer.requires_grad_(True)
        layer.self_attn.k_proj.base_layer.requires_grad_(True)
    assert_close(values_and_gradients(with_lean_layers(plain)), values_and_gradients(plain))


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_lean_layers_under_activation_checkpointing(make_checkpoint, layers):
    folder, _ = make_checkpoint()
    plain = adapted(folder).train()
    fast_model = with_lean_layers(plain)
    fast_model.language_model.checkpoint_layers = layers
    assert_close(values_and_gradients(fast_model), values_and_gradients(plain))


def kept_by(model, ids):
    """Bytes of the tensors that autograd keeps of one forward pass, but for the weights."""
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model(torch.tensor([ids]))  # held until all is counted
    assert hidden.requires_grad
    return sum(size for address, size in sizes.items() if address not in weights)


def test_what_can_be_made_again_is_not_kept(make_checkpoint):
    """A lean layer keeps its two norms' inputs, q, k and v, what attention returned, gate and up,
    and what the A's made: for many tokens two thirds of what the plain layer keeps."""
    folder, _ = make_checkpoint()
    plain = adapted(folder)
    fast_model = with_lean_layers(plain)
    kept = kept_by(fast_model, [1, 2, 3, 4, 5, 99, 100])
    D, heads, hidden, T = 32, 4 * 8 + 2 * 2 * 8 + 4 * 8, 56, 7
    products = 7 * 4  # x A' of seven layers of rank 4
    # The concatenated A's of q, k, v and of gate, up; those of o and down.
    A = 5 * D * 4 + (D + hidden) * 4
    # 4: log-sum-exp of the heads, 2: both norms.
    layer = T * (2 * D + heads + 2 * hidden + products + 4 + 2) + A
    assert abs(kept / 4 - 2 * layer) < 0.1 * layer + T * D * 2
    many = [1, 2, 3, 99] * 100
    assert kept_by(fast_model, many) < 0.67 * kept_by(plain, many)


# ---- install and twin: the guard


@pytest.fixture
def model(make_checkpoint):
    folder, _ = make_checkpoint()
    return adapted(folder)


def kinds(model):
    return {type(layer) for layer in model.language_model.layers}


def test_install_changes_nothing_but_the_layers(make_checkpoint, tmp_path, capsys):
    """Names, adapters, files and merging are as before, twice installed is once installed, and
    nothing is printed."""
    folder, _ = make_checkpoint()
    model = adapted(folder)
    plain = copy.deepcopy(model)
    state = torch.get_rng_state()
    fast.install(model)
    fast.install(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert kinds(model) == {LeanDecoderLayer} and capsys.readouterr().out == ""
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(trainable_parameters(model)) == list(trainable_parameters(plain))
    assert_close(values_and_gradients(model), values_and_gradients(plain))
    save_adapter(model, tmp_path / "adapter")
    again = Llava.from_pretrained(folder)
    load_adapter(again, tmp_path / "adapter", IMAGE_PROMPT, TEXT_PROMPT)
    assert torch.equal(run(again, SOFT), run(plain, SOFT))
    expected = run(model, SOFT)
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(run(model, SOFT), expected, rtol=1e-4, atol=1e-5)


def test_install_before_lora(make_checkpoint):
    folder, _ = make_checkpoint()
    model = Llava.from_pretrained(folder)
    fast.install(model)
    freeze(model)
    add_lora(model, LoRAConfig(rank=4))
    assert kinds(model) == {LeanDecoderLayer}
    assert values_and_gradients(model, HARD).keys() == {"logits", *trainable_parameters(model)}


def twice_the_scale(self, x):
    A, B = self.lora_A.weight, self.lora_B.weight
    y = self.base_layer(x)
    return y + 2 * self.config.scale * x @ A.T @ B.T if self.enabled else y


def gelu_mlp(self, x):
    return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def parallel_layer(self, x, cos, sin, cache=None):
    y = self.input_layernorm(x)
    return x + self.self_attn(y, cos, sin, cache) + self.mlp(y)


def one_more_argument(self, x, cos, sin, cache, window):
    return x


def unrotated_attention(self, x, cos, sin, cache=None):
    q = split_heads(self.q_proj(x), self.head_dim)
    k = split_heads(self.k_proj(x), self.head_dim)
    v = split_heads(self.v_proj(x), self.head_dim)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.is_grouped)
    return self.o_proj(y.transpose(1, 2).flatten(2))


plain_attention = Attention.forward


def attention_that_stops_gradients(self, x, cos, sin, cache=None):
    return plain_attention(self, x.detach(), cos, sin, cache)


def attention_that_forgets(self, x, cos, sin, cache=None):
    """As it was, but for a conversation's second turn."""
    y = plain_attention(self, x, cos, sin, cache)
    return y if cache is None else y / 2


plain_init = DecoderLayer.__init__


def init_with_a_gain(self, *arguments):
    plain_init(self, *arguments)
    self.gain = nn.Parameter(torch.ones(1))


EDITS = [
    (LoRALinear, "forward", twice_the_scale),
    (MLP, "forward", gelu_mlp),
    (DecoderLayer, "forward", parallel_layer),
    (DecoderLayer, "forward", one_more_argument),
    (Attention, "forward", unrotated_attention),
    (Attention, "forward", attention_that_stops_gradients),
    (Attention, "forward", attention_that_forgets),
    (DecoderLayer, "__init__", init_with_a_gain),
]


@pytest.mark.parametrize("owner,name,edited", EDITS, ids=[edit[2].__name__ for edit in EDITS])
def test_edited_layers_stay(model, monkeypatch, capsys, owner, name, edited):
    """Whatever someone changes in the plain forms, that is what trains; one line says so."""
    monkeypatch.setattr(owner, name, edited)
    state = torch.get_rng_state()
    fast.install(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert kinds(model) == {DecoderLayer}
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "DecoderLayer (model.py) or LoRALinear (lora.py) and their lean twins differ" in said


def test_layers_with_parts_of_ones_own_stay(model, capsys):
    """Where a layer of this model, not its class, was changed: by a subclass or a function."""

    class OwnAttention(Attention):
        pass

    own = copy.deepcopy(model)
    layer = own.language_model.layers[1]
    layer.self_attn.__class__ = OwnAttention
    fast.install(own)
    assert kinds(own) == {DecoderLayer}
    assert "parts of them, are not those of model.py" in capsys.readouterr().out
    layer = model.language_model.layers[0]
    layer.mlp.forward = lambda x: x
    fast.install(model)
    assert kinds(model) == {DecoderLayer}
    assert "parts of them, are not those of model.py" in capsys.readouterr().out


def test_the_guard_sees_the_configs_of_the_run(make_checkpoint, monkeypatch, capsys):
    """An edit that a field of a config switches on matters where it is on, and only there."""
    folder, _ = make_checkpoint()

    def with_rslora_doubled(self, x):
        factor = 2 if self.config.use_rslora else 1
        y = plain_lora(self, x)
        return y + (factor - 1) * (y - self.base_layer(x))

    plain_lora = LoRALinear.forward
    monkeypatch.setattr(LoRALinear, "forward", with_rslora_doubled)
    model = adapted(folder, LoRAConfig(rank=4))
    fast.install(model)
    assert kinds(model) == {LeanDecoderLayer} and capsys.readouterr().out == ""
    model = adapted(folder, LoRAConfig(rank=4, use_rslora=True))
    fast.install(model)
    assert kinds(model) == {DecoderLayer} and "differ" in capsys.readouterr().out


@pytest.fixture
def unjudged():
    """The guard remembers its judgement of a loss; here it judges anew."""
    fast.losses_agree.cache_clear()
    yield
    fast.losses_agree.cache_clear()


def test_losses_have_twins(unjudged, capsys):
    """Both losses; a function without a twin, and a twin, stay themselves. No random number of the
    run is used up."""
    state = torch.get_rng_state()
    with torch.no_grad():
        assert fast.twin(losses.contrastive_loss) is tiled_contrastive_loss
    assert fast.twin(losses.cross_entropy) is linear_cross_entropy
    assert fast.twin(F.mse_loss) is F.mse_loss
    assert fast.twin(tiled_contrastive_loss) is tiled_contrastive_loss
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""


def with_margin(images, texts, scale):
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    similarity = scale * (images @ texts.T - 0.1 * torch.eye(len(images)))
    target = torch.arange(len(images))
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


plain_contrastive_loss = losses.contrastive_loss


def one_sided_gradient(images, texts, scale):
    return plain_contrastive_loss(images, texts.detach(), scale)


def capped_scale(images, texts, scale):
    return plain_contrastive_loss(images, texts, scale.clamp(max=50))


def without_duplicates(images, texts, scale):
    """Pairs with the same text are no negatives."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    same = (texts @ texts.T > 0.99) & ~torch.eye(len(texts), dtype=torch.bool)
    similarity = (scale * images @ texts.T).masked_fill(same, -torch.inf)
    target = torch.arange(len(images))
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def other_arguments(images, texts, scale, hard_negatives):
    return plain_contrastive_loss(images, texts, scale)


def broken(images, texts, scale):
    raise KeyError("what a half-finished edit does")


CONTRASTIVE_EDITS = [
    with_margin,
    one_sided_gradient,
    capped_scale,
    without_duplicates,
    other_arguments,
    broken,
]


@pytest.mark.parametrize("edited", CONTRASTIVE_EDITS)
def test_an_edited_contrastive_loss_stays(unjudged, monkeypatch, capsys, edited):
    monkeypatch.setattr(losses, "contrastive_loss", edited)
    assert fast.twin(losses.contrastive_loss) is edited
    assert fast.twin(losses.contrastive_loss) is edited
    said = capsys.readouterr().out
    assert said == (
        f"{edited.__name__} and tiled_contrastive_loss differ: "
        f"training with {edited.__name__}, as losses.py has it\n"
    )


plain_cross_entropy = losses.cross_entropy


def smoothed(hidden, weight, labels, num_tokens):
    supervised = labels != losses.IGNORE
    logits = hidden[supervised] @ weight.T
    labels = labels[supervised]
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    return total / max(num_tokens, 1)


def mean_of_the_part(hidden, weight, labels, num_tokens):
    return plain_cross_entropy(hidden, weight, labels, int((labels != losses.IGNORE).sum()))


def last_token_too(hidden, weight, labels, num_tokens):
    return plain_cross_entropy(hidden, weight, labels.masked_fill(labels < 0, 0), num_tokens)


@pytest.mark.parametrize("edited", [smoothed, mean_of_the_part, last_token_too])
def test_an_edited_cross_entropy_stays(unjudged, monkeypatch, capsys, edited):
    monkeypatch.setattr(losses, "cross_entropy", edited)
    assert fast.twin(losses.cross_entropy) is edited
    assert "linear_cross_entropy" in capsys.readouterr().out


# ---- Int8


def test_int8_rounds_to_the_nearest_step():
    """Every weight within half a step of its row, the largest of each row exact but for the step's
    own rounding, rows of zeros and rows of one sign included."""
    linear = nn.Linear(40, 6)
    with torch.no_grad():
        linear.weight[1] = 0
        linear.weight[2].abs_()
        linear.weight[3] *= 1e-6
    layer = Int8Linear(linear)
    step = layer.absmax / 127
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().amax() == 127
    difference = (layer.weight * step - linear.weight).abs()
    assert (difference <= 0.5001 * step).all()
    assert (difference[1] == 0).all() and difference.max() > 0
    assert torch.equal(layer.absmax, linear.weight.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_a_linear_layer_of_its_whole_weight(shape, bias):
    """Outputs, the input's gradient, and that of a bias that trains."""
    layer = Int8Linear(nn.Linear(5, 4, bias=bias).requires_grad_(bias))
    weight = int8.dequantize(layer.weight.data, layer.absmax.data, torch.float32)
    assert torch.equal(weight, layer.whole_weight(torch.float32))
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, layer.bias] if bias else [x]
    ours, theirs = layer(x), F.linear(x, weight, layer.bias)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad(ours.square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(theirs.square().sum(), inputs))


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("is_lean", [True, False])
def test_int8_model_trains_and_keeps_no_whole_weights(make_checkpoint, rank, is_lean):
    """On int8 layers, with LoRA and with soft prompts alone, gradients are those of the model with
    the same values as whole weights; autograd keeps no tensor of a weight's size."""
    folder, _ = make_checkpoint()
    model = Llava.from_pretrained(folder)
    quantize(model)
    whole = Llava.from_pretrained(folder)
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            whole.get_submodule(name).weight.data = module.whole_weight(torch.float32)
    found, kept = [], []

    def note(tensor):
        if tensor.shape in [(32, 32), (16, 32), (56, 32), (32, 56)]:
            kept.append(tensor.dtype)
        return tensor

    for each in (model, whole):
        freeze(each)
        torch.manual_seed(0)
        if rank:
            add_lora(each, LoRAConfig(rank, 6))
        add_soft_prompts(each, IMAGE_PROMPT, TEXT_PROMPT)
        shake(each)
        each = with_lean_layers(each) if is_lean else each
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = each.logits(each(torch.tensor([SOFT]))).square().mean()
        if not found:  # this is the int8 one
            assert set(kept) <= {torch.int8}
        loss.backward()
        grads = {name: p.grad for name, p in trainable_parameters(each).items()}
        found.append(grads | {"loss": loss.detach()})
    assert_close(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_int8_under_lora_with_dropout(dropout):
    """The masks fall on LoRA's input alone, whatever the base layer is."""
    (layer,) = lora_layers(1, True, in_int8=True)
    layer.config.dropout = dropout
    base = nn.Linear(6, 4)
    base.weight.data = layer.base_layer.whole_weight(torch.float32)
    base.bias = layer.base_layer.bias
    plain = copy.deepcopy(layer)
    plain.base_layer = base.requires_grad_(False)
    x, found = torch.randn(2, 6), []
    for each in (layer, plain):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        found.append(results(project([each], torch.sin, leaf), leaf, [each]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_quantize_before_and_after_lora(make_checkpoint):
    """The base layers alone become int8, never LoRA's A and B."""
    folder, _ = make_checkpoint()
    before = adapted(folder, in_int8=True)
    after = adapted(folder)
    quantize(after)
    after.load_state_dict(before.state_dict())
    assert torch.equal(run(after, SOFT), run(before, SOFT))
    kinds = [type(module) for module in after.language_model.layers.modules()]
    assert kinds.count(Int8Linear) == 14 and kinds.count(nn.Linear) == 28


def test_int8_disabled_merged_and_saved(make_checkpoint, tmp_path):
    """Adapters off is bitwise the int8 model; merging keeps the function in whole weights; a run's
    files fit again."""
    folder, _ = make_checkpoint()
    model = Llava.from_pretrained(folder)
    quantize(model)
    expected = run(model, HARD)
    freeze(model)
    add_lora(model, LoRAConfig(rank=4, alpha=6, targets=("q_proj", "down_proj")))
    add_soft_prompts(model, IMAGE_PROMPT, TEXT_PROMPT)
    shake(model)
    with adapters_disabled(model):
        assert torch.equal(run(model, SOFT), expected)
    trained = run(model, SOFT)
    assert not torch.allclose(trained, expected, atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    again = Llava.from_pretrained(folder)
    quantize(again)
    load_adapter(again, tmp_path / "adapter", IMAGE_PROMPT, TEXT_PROMPT)
    assert torch.equal(run(again, SOFT), trained)
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(isinstance(module, LoRALinear | Int8Linear) for module in model.modules())
    torch.testing.assert_close(run(model, SOFT), trained, rtol=1e-4, atol=1e-5)


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
    assert totals[0] == totals[1]
    assert 2 * (totals[1] + unused) == index["metadata"]["total_size"]
