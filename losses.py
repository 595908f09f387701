"""The losses of VladVA, as pure functions of tensors.

    contrastive_loss     short captions: an image and its caption find each other among all others
    cross_entropy        long captions: every next token, given the image and the tokens before

Change them here: training calls these two. Below each stands its twin for large batches or large
vocabularies, with the same arguments, values and gradients. `train.py` uses the twin only as long
as both agree, so an edit of the plain form is never overruled (see fast/__init__.py).

    plain                twin                        what the twin never holds at once
    contrastive_loss     tiled_contrastive_loss      B x B similarities
    cross_entropy        linear_cross_entropy        N x V logits

Axes: B pairs in the global batch, N supervised tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE = -100  # the label of a position that is not supervised


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- Contrastive loss: short captions


def contrastive_loss(image_embeddings, text_embeddings, scale):
    """Symmetric InfoNCE: each image must find its text among all texts of the batch, and each
    text its image. Paper, equation 1 (which is the sum of both directions, without the half;
    the half is CLIP's, arXiv 2103.00020). Where nothing is learned yet the loss is about log B.

    Args:
        image_embeddings, text_embeddings: (B, D), row i of both belongs together; any length.
        scale: 1 / temperature, a number or a scalar tensor.
    Returns: a scalar, in fp32 or more."""
    images = F.normalize(at_least_fp32(image_embeddings), dim=-1)
    texts = F.normalize(at_least_fp32(text_embeddings), dim=-1)
    similarity = scale * images @ texts.T  # (B, B): cosine similarity over the temperature
    target = torch.arange(len(images), device=images.device)  # the partner of row i is column i
    image_to_text = F.cross_entropy(similarity, target)
    text_to_image = F.cross_entropy(similarity.T, target)
    return (image_to_text + text_to_image) / 2


def tiled_contrastive_loss(image_embeddings, text_embeddings, scale, tile: int = 512):
    """`contrastive_loss` that holds the similarities of `tile` images at a time.

    With r_i = log sum_j exp(s_ij) over row i, and c_j the same over column j, the loss is
    mean_i (r_i + c_i) / 2 - s_ii. One sweep over the tiles gives r and c. The backward pass
    computes each tile again, for

        dL/ds_ij = (exp(s_ij - r_i) + exp(s_ij - c_j) - 2 [i = j]) / 2B

    That is four matrix products, where two cross-entropies of two matrices take six."""
    images = F.normalize(at_least_fp32(image_embeddings), dim=-1)
    texts = F.normalize(at_least_fp32(text_embeddings), dim=-1)
    scale = torch.as_tensor(scale, dtype=images.dtype, device=images.device)
    return TiledInfoNCE.apply(images, texts, scale, tile)


class TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, scale, tile):
        B = len(images)
        rows = images.new_empty(B)
        columns = images.new_full((B,), -torch.inf)
        for first in range(0, B, tile):
            strip = slice(first, first + tile)
            similarity = (scale * images[strip]) @ texts.T  # (tile, B)
            rows[strip] = similarity.logsumexp(1)
            columns = torch.logaddexp(columns, similarity.logsumexp(0))
            del similarity  # before the next one is made
        ctx.save_for_backward(images, texts, scale, rows, columns)
        ctx.tile = tile
        own = scale * torch.linalg.vecdot(images, texts)  # (B,) the diagonal
        return ((rows + columns) / 2 - own).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, texts, scale, rows, columns = ctx.saved_tensors
        B = len(images)
        image_gradient = torch.empty_like(images)
        text_gradient = torch.zeros_like(texts)
        for first in range(0, B, ctx.tile):
            strip = slice(first, first + ctx.tile)
            similarity = (scale * images[strip]) @ texts.T
            # dL/ds of this strip, in place wherever it can be.
            weights = (similarity - columns).exp_()
            weights += similarity.sub_(rows[strip, None]).exp_()
            weights.diagonal(offset=first).sub_(2)
            weights *= gradient * scale / (2 * B)
            torch.mm(weights, texts, out=image_gradient[strip])
            text_gradient.addmm_(weights.T, images[strip])
            del similarity, weights
        # s_ij is scale * <image_i, text_j>, so the sum of dL/ds_ij * s_ij over all i and j
        # is also the sum of <dL/dimage_i, image_i>.
        scale_gradient = torch.linalg.vecdot(image_gradient, images).sum() / scale
        return image_gradient, text_gradient, scale_gradient, None


# ---- Autoregressive loss: long captions


def cross_entropy(hidden, weight, labels, num_tokens):
    """Next-token cross-entropy of the long captions. Paper, equation 2.

    Args:
        hidden: (..., D), hidden states after the final norm.
        weight: (V, D), the language model's head.
        labels: (...), the token that follows each position; IGNORE where it is not supervised.
        num_tokens: what the sum is divided by: the supervised tokens of the WHOLE global batch.
            A mean over each part of a batch would weigh the tokens of parts with few of them more.
    Returns: a scalar, in fp32 or more."""
    supervised = labels != IGNORE
    # Only positions that have a label meet the head: logits are the largest tensor of all.
    logits = at_least_fp32(F.linear(hidden[supervised], weight))  # (N, V)
    total = F.cross_entropy(logits, labels[supervised], reduction="sum")
    return total / max(num_tokens, 1)


def linear_cross_entropy(hidden, weight, labels, num_tokens, chunk_bytes: int = 2**27):
    """`cross_entropy` that holds the logits of a few positions at a time.

    As many rows as fit `chunk_bytes` in fp32, but no fewer than 256, for small products are slow
    ones. Their gradient is computed while they are there."""
    supervised = labels != IGNORE
    rows = max(256, chunk_bytes // (4 * len(weight)))
    with_gradient = torch.is_grad_enabled()
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
            logits -= logits.amax(-1, keepdim=True)
            right = logits.gather(1, label)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (total.log() - right).sum()
            if needs_hidden or needs_weight:
                # dL/dlogits = softmax - one hot, in the place of the logits.
                logits = logits.div_(total).scatter_add_(1, label, -torch.ones_like(total))
                logits = logits.to(hidden.dtype)
            if needs_hidden:
                torch.mm(logits, weight, out=hidden_gradient[part])
            if needs_weight:
                weight_gradient += logits.T @ hidden[part]
            del logits  # before the next ones are made
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
