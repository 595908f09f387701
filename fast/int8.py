"""The frozen linear layers in 8 bits: LLaVA-1.5-7B takes 0.54 of the memory of its bf16 weights.

    quantize(model)                            # in place; before or after add_lora
    add_lora(model, LoRAConfig())              # LoRA works on them as on nn.Linear

The method is that of LLM.int8() (arXiv 2208.07339) without its outliers: every row of a weight is
divided into 127 equal steps up to its largest absolute value. A layer makes its whole weight for
one matrix product, in the forward and again in the backward pass; it never keeps it.

Quantized layers compute like nn.Linear. lora.py does not import this file: when it merges, it asks
a layer with the method `whole_weight` for its weight.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora import LoRALinear


class Int8Linear(nn.Module):
    """A frozen nn.Linear with W = weight * absmax / 127: weight in int8, an absmax for each row."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        whole = base.weight.detach()
        absmax = whole.abs().amax(dim=1, keepdim=True)  # (out, 1)
        # A row of zeros has steps of zero: the clamp makes 0 / 0 a zero.
        step = (absmax / 127).float().clamp(min=1e-30)
        steps = (whole.float() / step).round_().clamp_(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(steps, requires_grad=False)  # (out, in)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = base.bias

    def forward(self, x):
        """x (..., in) -> (..., out), in the dtype of x."""
        return Int8Matmul.apply(x, self.weight, self.absmax, self.bias)

    def whole_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in) that the layer stands for."""
        return dequantize(self.weight, self.absmax, dtype)


def dequantize(weight, absmax, dtype: torch.dtype):
    """An int8 weight (out, in) with the absmax (out, 1) of its rows -> the whole weight."""
    return weight.to(dtype).mul_((absmax / 127).to(dtype))


class Int8Matmul(torch.autograd.Function):
    """y = x W' + b. Autograd alone would keep W whole, for dx = dy W; this keeps it in int8."""

    @staticmethod
    def forward(ctx, x, weight, absmax, bias):
        ctx.save_for_backward(weight, absmax)
        return F.linear(x, dequantize(weight, absmax, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, absmax = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ dequantize(weight, absmax, dy.dtype)
        db = None
        if ctx.needs_input_grad[3]:  # a bias may train, though the weight cannot
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, None, None, db


def quantize(model: nn.Module) -> None:
    """Hold the linear layers of the decoder layers in int8, in place.

    Embedding, head, projector and vision tower stay as they are, and so do LoRA's own A and B."""
    for part in list(model.language_model.layers.modules()):
        for name, layer in list(part.named_children()):
            is_adapter = isinstance(part, LoRALinear) and name != "base_layer"
            if isinstance(layer, nn.Linear) and not is_adapter:
                setattr(part, name, Int8Linear(layer))
