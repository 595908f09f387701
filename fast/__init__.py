"""The fast room: parts of the model and the losses once more, for the same numbers in less memory.

    fast.install(model)                          # lean decoder layers, in place
    loss = fast.twin(losses.contrastive_loss)    # the same loss, a tile at a time

    lean.py      the decoder layer and LoRA, with fewer activations kept
    chunked.py   the losses, a part of the batch at a time
    int8.py      the frozen weights in 8 bits; never installed here, `quantize` is called by name

The plain forms in model.py, lora.py and losses.py are there to be edited. So before a fast form
takes the place of a plain one, both compute a small random example: 70 tokens, 40 pairs. Where
values or gradients differ, the plain form stays in use, and one line says so. An edit that shows
only in longer sequences or larger batches, such as a wide sliding window, is not seen: train that
with --no-fast.

Axes: B batch, T tokens, D hidden.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

import losses
from fast.chunked import linear_cross_entropy, tiled_contrastive_loss
from fast.lean import LeanDecoderLayer, has_lean_twin
from lora import LoRAConfig, LoRALinear, adapters_disabled, add_lora, freeze
from model import KVCache, LanguageModel


def install(model: nn.Module) -> None:
    """Replace the decoder layers of a model by their lean twins, in place.

    Parameters keep their names. Install after `add_lora`, so that the guard compares the LoRA that
    is trained, and before layers are sharded, which gives them classes of their own."""
    layers = model.language_model.layers
    if all(isinstance(layer, LeanDecoderLayer) for layer in layers):
        return
    fault = None
    if not all(has_lean_twin(layer) for layer in layers):
        fault = "this model's decoder layers, or parts of them, are not those of model.py"
    elif not lean_layers_agree(model):
        fault = "DecoderLayer (model.py) or LoRALinear (lora.py) and their lean twins differ"
    if fault is not None:
        tqdm.write(f"{fault}: training with the plain layers, not with fast/lean.py")
        return
    for index, layer in enumerate(layers):
        layers[index] = LeanDecoderLayer(layer)


def twin(function: Callable) -> Callable:
    """The fast twin of a plain loss, or the function itself: one without a twin, or one that was
    changed."""
    # Looked up at every call, for someone may have put another function in a loss's place.
    twins = {
        losses.contrastive_loss: (tiled_contrastive_loss, contrastive_examples),
        losses.cross_entropy: (linear_cross_entropy, cross_entropy_examples),
    }
    if function not in twins:
        return function
    fast, make_examples = twins[function]
    if losses_agree(function, fast, make_examples):
        return fast
    return function


# ---- The guard: do the plain and the fast form compute the same?
@contextmanager
def aside() -> Iterator[None]:
    """Inside, small things are computed on the CPU, and no random number of the run is used up."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        yield


def are_close(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether two lists of results are equal but for the rounding of float64."""
    if len(expected) != len(found):
        return False
    for a, b in zip(expected, found):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-6, atol=1e-9):
            return False
    return True


def gradients(tensors: list[Tensor]) -> list[Tensor]:
    """What `backward` left in these tensors; zeros where it left nothing."""
    found = []
    for tensor in tensors:
        # None is what a detached input gets; the fast form then must not get any either.
        found.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    return found


# ---- of losses
@functools.cache  # training asks at every step
def losses_agree(plain: Callable, fast: Callable, make_examples: Callable) -> bool:
    """Whether two losses have the same values and gradients; where not, one line is printed."""
    agree = True
    with aside():
        for arguments in make_examples(torch.Generator().manual_seed(0)):
            try:
                expected = loss_and_gradients(plain, arguments)
                found = loss_and_gradients(fast, arguments)
            # Whatever a changed function raises, it is not for us to handle: the run will show it.
            except Exception:
                agree = False
                break
            agree = agree and are_close(expected, found)
    if not agree:
        name = plain.__name__
        tqdm.write(f"{name} and {fast.__name__} differ: training with {name}, as losses.py has it")
    return agree


def loss_and_gradients(function: Callable, arguments: list) -> list[Tensor]:
    """The value of a loss, and its gradients for all arguments that are floating-point tensors."""
    copies = []
    leaves = []
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            argument = argument.clone().requires_grad_()
            leaves.append(argument)
        copies.append(argument)
    loss = function(*copies)
    loss.backward()
    return [loss.detach(), *gradients(leaves)]


def contrastive_examples(generator: torch.Generator) -> list[list]:
    """Arguments of `contrastive_loss`: a low and a high temperature, and pairs that are alike."""
    images = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    texts = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    # A loss that leaves out false negatives, or mines hard ones, differs only on such pairs.
    images[1] = images[0]
    texts[3] = texts[2]
    texts[5] = images[4]
    scales = torch.tensor([2.0, 90.0], dtype=torch.float64)  # one below a cap, one above
    return [[images, texts, scale] for scale in scales]


def cross_entropy_examples(generator: torch.Generator) -> list[list]:
    """Arguments of `cross_entropy`: a part of the labels not supervised, and a part of a batch."""
    hidden = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[0, :2] = losses.IGNORE
    labels[1, 4] = losses.IGNORE
    # 7 tokens are supervised here: alone they are a whole batch, of 20 they are a part.
    return [[hidden, weight, labels, num_tokens] for num_tokens in (7, 20)]


# ---- of decoder layers
def lean_layers_agree(model: nn.Module) -> bool:
    """Whether a small copy of a model's decoder layers computes the same as their lean twins."""
    with aside():
        generator = torch.Generator().manual_seed(0)
        try:
            plain = small_copy(model, generator)
            lean = copy.deepcopy(plain)
            layers = lean.language_model.layers
            for index, layer in enumerate(layers):
                layers[index] = LeanDecoderLayer(layer)
            x = torch.randn(2, 70, 8, generator=generator, dtype=torch.float64)  # (B, T, D)
            expected = everything_computed(plain, x)
            found = everything_computed(lean, x)
        except Exception:  # see `losses_agree`
            return False
    # A new part of the layer is one that the lean twin does not know.
    if dict(plain.named_parameters()).keys() != dict(lean.named_parameters()).keys():
        return False
    return are_close(expected, found)


def small_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same layers and LoRA as in a model, by its configs, but 8 wide and with random weights.

    All else in the configs stays, for a field that someone added may change what is computed."""
    config = replace(
        model.language_model.config,
        vocab_size=3,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        attention_bias=True,
        mlp_bias=True,
    )
    lora_config = LoRAConfig()  # where LoRA is added later
    for module in model.modules():
        if isinstance(module, LoRALinear):
            lora_config = module.config
    small = nn.Module()  # `add_lora` looks for a language model inside
    small.language_model = LanguageModel(config)
    freeze(small)
    add_lora(small, replace(lora_config, rank=2))
    small.double()
    # B would be zero, norms one: a changed use of them could not be seen.
    with torch.no_grad():
        for parameter in small.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values / 2)
    return small


def everything_computed(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a model computes of x (B, T, D) in all situations of a run: training, with gradients;
    evaluation; with the adapters disabled; with a cache, as when it generates."""
    torch.default_generator.manual_seed(0)  # dropout has to draw the same masks
    language_model = model.language_model
    model.train()
    x = x.clone().requires_grad_()
    hidden = language_model(x)
    hidden.square().sum().backward()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = [hidden.detach(), *gradients([x, *learning])]

    model.eval()
    with torch.no_grad():
        results.append(language_model(x))
        with adapters_disabled(model):
            results.append(language_model(x))
        cache = KVCache(language_model.config, len(x), x.dtype, x.device)
        results.append(language_model(x[:, :3], cache))
        cache.tokens = [[0] * 3] * len(x)  # which tokens they are does not matter
        results.append(language_model(x[:, 3:], cache))
    return results
