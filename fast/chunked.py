"""The losses of losses.py, a part at a time: for large batches and large vocabularies.

    plain                twin                        what the twin never holds at once
    contrastive_loss     tiled_contrastive_loss      B x B similarities
    cross_entropy        linear_cross_entropy        N x V logits

The same arguments, values and gradients; tests/test_losses.py compares them.

Axes: B pairs in the global batch, N supervised tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from losses import IGNORE, at_least_fp32


def tiled_contrastive_loss(image_embeddings, text_embeddings, scale, tile: int = 512):
    """`contrastive_loss` that holds the similarities of `tile` images at a time.

    With r_i = log sum_j exp(s_ij) over row i, and c_j the same over column j, the loss is
    mean_i (r_i + c_i) / 2 - s_ii. One sweep over the tiles gives r and c. The backward pass
    computes each tile again, for

        dL/ds_ij = (exp(s_ij - r_i) + exp(s_ij - c_j) - 2 [i = j]) / 2B

    That is four matrix products. The plain form takes three, but holds B x B numbers several times;
    a loss with a matrix for each direction, as open_clip's, takes six."""
    images = F.normalize(at_least_fp32(image_embeddings), dim=-1)
    texts = F.normalize(at_least_fp32(text_embeddings), dim=-1)
    scale = torch.as_tensor(scale, dtype=images.dtype, device=images.device)
    return TiledInfoNCE.apply(images, texts, scale, tile)


class TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, scale, tile):
        B = len(images)
        row_sums = images.new_empty(B)  # r
        column_sums = images.new_full((B,), -torch.inf)
        for first in range(0, B, tile):
            strip = slice(first, first + tile)
            similarity = (scale * images[strip]) @ texts.T  # (tile, B)
            row_sums[strip] = similarity.logsumexp(1)
            column_sums = torch.logaddexp(column_sums, similarity.logsumexp(0))
            del similarity  # before the next one is made
        ctx.save_for_backward(images, texts, scale, row_sums, column_sums)
        ctx.tile = tile
        diagonal = scale * torch.linalg.vecdot(images, texts)  # s_ii
        return ((row_sums + column_sums) / 2 - diagonal).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, texts, scale, row_sums, column_sums = ctx.saved_tensors
        B = len(images)
        image_gradient = torch.empty_like(images)
        text_gradient = torch.zeros_like(texts)
        for first in range(0, B, ctx.tile):
            strip = slice(first, first + ctx.tile)
            similarity = (scale * images[strip]) @ texts.T
            # dL/ds of this strip, times the scale; in place wherever it can be.
            ds = (similarity - column_sums).exp_()
            ds += similarity.sub_(row_sums[strip, None]).exp_()
            ds.diagonal(offset=first).sub_(2)
            ds *= gradient * scale / (2 * B)
            torch.mm(ds, texts, out=image_gradient[strip])
            text_gradient.addmm_(ds.T, images[strip])
            del similarity, ds
        # s_ij is scale * <image_i, text_j>, so the sum of dL/ds_ij * s_ij over all i and j
        # is also the sum of <dL/dimage_i, image_i>.
        scale_gradient = torch.linalg.vecdot(image_gradient, images).sum() / scale
        return image_gradient, text_gradient, scale_gradient, None


def linear_cross_entropy(hidden, weight, labels, num_tokens, chunk_bytes: int = 2**27):
    """`cross_entropy` that holds the logits of a few positions at a time.

    As many rows as fit `chunk_bytes` in fp32, but no fewer than 256, for small products are slow
    ones. Their gradient is computed while they are there."""
    supervised = labels != IGNORE
    rows = max(256, chunk_bytes // (4 * len(weight)))
    with_gradient = torch.is_grad_enabled()  # inside of a Function it is always off
    total = LinearCrossEntropy.apply(
        hidden[supervised], weight, labels[supervised], rows, with_gradient
    )
    return total / max(num_tokens, 1)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, with_gradient):
        needs_hidden = with_gradient and ctx.needs_input_grad[0]
        needs_weight = with_gradient and ctx.needs_input_grad[1]
        loss = at_least_fp32(hidden.new_zeros(()))
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=loss.dtype) if needs_weight else None
        for first in range(0, len(labels), rows):
            part = slice(first, first + rows)
            label = labels[part, None]  # (rows, 1)
            logits = at_least_fp32(hidden[part] @ weight.T)  # (rows, V)
            logits -= logits.amax(-1, keepdim=True)  # so that exp cannot overflow
            label_logit = logits.gather(1, label)
            exponentials = logits.exp_()  # in the place of the logits
            sum_of_exp = exponentials.sum(-1, keepdim=True)
            loss += (sum_of_exp.log() - label_logit).sum()
            if needs_hidden or needs_weight:
                # dL/dlogits = softmax - one hot, again in the same place.
                softmax = exponentials.div_(sum_of_exp)
                dlogits = softmax.scatter_add_(1, label, -torch.ones_like(sum_of_exp))
                dlogits = dlogits.to(hidden.dtype)
            if needs_hidden:
                torch.mm(dlogits, weight, out=hidden_gradient[part])
            if needs_weight:
                weight_gradient += dlogits.T @ hidden[part]
            logits = exponentials = softmax = dlogits = None  # before the next ones are made
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * gradient
        if weight_gradient is not None:
            weight_gradient = weight_gradient * gradient
        return hidden_gradient, weight_gradient, None, None, None
