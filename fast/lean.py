"""The decoder layer of model.py with the LoRA of lora.py once more: it computes the same, but keeps
fewer activations for the backward pass, and so a larger batch fits.

    fast.install(model)        # puts a LeanDecoderLayer in the place of every DecoderLayer

What PyTorch keeps of the plain layer can partly be made again at almost no cost. Three ideas:

1. A norm's output is read by q, k and v, or by gate and up. LoRA needs it once more, for the
   gradient of A. It is not kept: it is made again from the norm's input, which is kept anyway. In
   the same way down_proj makes silu(gate) * up again (`project`).
2. Layers with one input are computed by one function, `LeanLoRA`. It writes the sums of W x and
   B A x inside of matrix products, where the plain form makes a tensor for each of them.
3. `SwiGLU` keeps gate and up, and not silu(gate).

So a layer keeps the inputs of its two norms, q, k and v, what attention returned, gate and up, and
the small products x A'. The plain layer keeps 1.6 times as much (tests/test_fast.py counts).

Where this is not possible, single layers are computed as lora.py does: dropout while training, base
weights that train, layers without LoRA or of a class of one's own. Hooks on the parts of a lean
layer are not called.

Axes: B batch, T tokens, N all B * T of them, D hidden, R rank. A prime is a transposed matrix.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fast.int8 import Int8Linear
from lora import LoRALinear, whole_weight
from model import MLP, Attention, DecoderLayer, rotate, split_heads


class LeanDecoderLayer(nn.Module):
    """A DecoderLayer (see model.py) that keeps less. Its parts are those of the plain layer, under
    the same names, so that parameters, adapters and checkpoints do not notice."""

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.self_attn = layer.self_attn
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.training = layer.training  # a new module would begin as in training

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, D) -> (B, T, D); cos, sin and cache as in DecoderLayer."""
        h = x + self.attend(x, cos, sin, cache)
        return h + self.feed_forward(h)

    def attend(self, x, cos, sin, cache):
        """The first half of the layer: input_layernorm and Attention.forward."""
        attention = self.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        q, k, v = project(projections, self.input_layernorm, x)
        q = rotate(split_heads(q, attention.head_dim), cos, sin)  # (B, H, T, head_dim)
        k = rotate(split_heads(k, attention.head_dim), cos, sin)
        v = split_heads(v, attention.head_dim)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(attention.layer_index, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=attention.is_grouped
        )
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * head_dim)
        (y,) = project([attention.o_proj], keep_x, y)
        return y

    def feed_forward(self, h):
        """The second half of the layer: post_attention_layernorm and MLP.forward."""
        projections = [self.mlp.gate_proj, self.mlp.up_proj]
        gate, up = project(projections, self.post_attention_layernorm, h)
        (y,) = project([self.mlp.down_proj], SwiGLU.apply, gate, up)
        return y


def keep_x(x):
    """The make_x of `project` for an input that cannot be made again, and so is kept."""
    return x


def project(layers: list[nn.Module], make_x, *inputs) -> list[torch.Tensor]:
    """[layer(x) for layer in layers] of one x = make_x(*inputs), (..., in) -> (..., out) each.

    x is not kept for the backward pass, but made again from the inputs."""
    x = make_x(*inputs)
    # The usual case: q, k and v, or gate and up, all have LoRA, and it was added at once.
    lean = [can_be_lean(layer) for layer in layers]
    if all(lean) and all(layer.config == layers[0].config for layer in layers):
        return lean_lora(layers, x, make_x, inputs)
    outputs = []
    for layer, is_lean in zip(layers, lean):
        if is_lean:
            outputs.extend(lean_lora([layer], x, make_x, inputs))
        else:
            outputs.append(layer(x))
    return outputs


def can_be_lean(layer: nn.Module) -> bool:
    """Whether `LeanLoRA` computes what this layer does."""
    if not is_unchanged(layer, LoRALinear) or not layer.enabled:
        return False
    # With dropout every layer has an input of its own.
    if layer.training and layer.config.dropout:
        return False
    base = layer.base_layer
    # LeanLoRA reads the base's weight and bias, and never calls it.
    if not is_unchanged(base, nn.Linear) and not is_unchanged(base, Int8Linear):
        return False
    # It has no gradient for the base's weight.
    return not any(parameter.requires_grad for parameter in base.parameters())


def is_unchanged(module: nn.Module, kind: type) -> bool:
    """Whether a module computes what its class does: no subclass, no forward of its own."""
    return type(module) is kind and "forward" not in vars(module)


def has_lean_twin(layer: nn.Module) -> bool:
    """Whether a decoder layer is made of the parts that `LeanDecoderLayer` computes in its way."""
    return (
        is_unchanged(layer, DecoderLayer)
        and is_unchanged(layer.self_attn, Attention)
        and is_unchanged(layer.mlp, MLP)
    )


def lean_lora(layers: list[LoRALinear], x, make_x, inputs) -> tuple[torch.Tensor, ...]:
    """One input x = make_x(*inputs) through LoRA layers of one config, by `LeanLoRA`."""
    # Computed in the base's precision; the casts hand the gradients on in fp32.
    As = [layer.lora_A.weight.to(x.dtype) for layer in layers]  # (R, in) each
    Bs = [layer.lora_B.weight.to(x.dtype) for layer in layers]  # (out, R) each
    bases = [layer.base_layer for layer in layers]
    scale = layers[0].config.scale
    return LeanLoRA.apply(x, torch.cat(As), scale, bases, make_x, inputs, *Bs)


class LeanLoRA(torch.autograd.Function):
    """For layers i with one input x (N, in) and frozen weights W_i:

        y_i = x W_i' + b_i + s (x A_i') B_i'

    With p_i = x A_i' (N, R), whose gradient is dp_i = s dy_i B_i, the gradients are

        dB_i = s dy_i' p_i        dA_i = dp_i' x        dx = sum over i of dp_i A_i + dy_i W_i

    A is given as one matrix (layers * R, in): its products are one for all layers."""

    @staticmethod
    def forward(ctx, x, A, scale, bases, make_x, inputs, *Bs):
        # x is an argument so that autograd sends its gradient back through what made it.
        rows = x.flatten(0, -2)  # (N, in)
        p = rows @ A.T  # (N, layers * R)
        ys = []
        for base, B, p_i in zip(bases, Bs, p.chunk(len(Bs), dim=1)):
            y = F.linear(rows, whole_weight(base, x.dtype), base.bias)  # (N, out)
            y.addmm_(p_i, B.T, alpha=scale)  # adds while it multiplies: no tensor for s p B'
            ys.append(y.unflatten(0, x.shape[:-1]))
        # Not x: it is made again. The inputs are kept by value, without their history.
        values = [each.detach() for each in inputs]
        ctx.save_for_backward(p, A, *Bs, *values)
        ctx.make_x = make_x
        ctx.bases = bases
        ctx.scale = scale
        ctx.shape = x.shape
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        p, A, *saved = ctx.saved_tensors
        num_layers = len(ctx.bases)
        Bs = saved[:num_layers]
        inputs = saved[num_layers:]
        rows = ctx.make_x(*inputs).flatten(0, -2)  # x once more, (N, in)
        dys = [dy.flatten(0, -2) for dy in dys]  # (N, out) each

        dBs = []
        for dy, p_i in zip(dys, p.chunk(num_layers, dim=1)):
            dBs.append((dy.T @ p_i).mul_(ctx.scale))
        dp = torch.cat([dy @ B for dy, B in zip(dys, Bs)], dim=1).mul_(ctx.scale)
        dA = dp.T @ rows  # (layers * R, in)

        dx = None
        if ctx.needs_input_grad[0]:
            dx = dp @ A  # the sum over the layers is inside of the product
            for dy, base in zip(dys, ctx.bases):
                # An int8 base makes its whole weight again; it was not kept either.
                dx.addmm_(dy, whole_weight(base, dy.dtype))
            dx = dx.view(ctx.shape)
        return dx, dA, None, None, None, None, *dBs


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202), which keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)  # in place: silu(gate) has no other reader

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        d_up = F.silu(gate).mul_(gradient)
        return d_gate, d_up
