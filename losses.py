"""The losses, as pure functions. Each stands here twice: first the reference, ten lines that read like the paper's
equation, and right below it the fast version, which takes the same arguments and gives the same value and gradients.

    reference                  fast                         what the fast one never holds
    contrastive_loss           tiled_contrastive_loss       B x B similarities
    cross_entropy_of_logits    linear_cross_entropy         N x V logits
    backward_whole             backward_cached              the activations of more than one chunk

Axes: B pairs in the global batch, b in a chunk, N supervised tokens, D hidden, V vocabulary.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE = -100  # label of a position that is not supervised


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- Contrastive loss
def contrastive_loss(image_embeddings, text_embeddings, scale):
    """Symmetric InfoNCE: every image must find its text among all texts of the batch, and every text its image.
    Paper, equation 1; arXiv 2103.00020. Where nothing is learned yet the loss is about log B.

    Args:
        image_embeddings, text_embeddings: (B, D), row i of both belongs together; normalised here.
        scale: 1 / temperature, a number or a scalar tensor."""
    images, texts = (F.normalize(at_least_fp32(x), dim=-1) for x in (image_embeddings, text_embeddings))
    similarity = scale * images @ texts.T  # (B, B)
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def tiled_contrastive_loss(image_embeddings, text_embeddings, scale, tile: int = 512):
    """`contrastive_loss` in strips of `tile` rows: the similarities of one strip are all that is held at a time.

    With r_i = log sum_j exp(s_ij) over row i and c_j the same over column j, the loss is mean_i (r_i + c_i) / 2 - s_ii.
    One sweep over the strips yields r and c; the backward pass computes each strip again, for
    dL/ds_ij = (exp(s_ij - r_i) + exp(s_ij - c_j) - 2 [i = j]) / 2B: four matrix products, where two cross-entropies
    of two similarity matrices take six."""
    images, texts = (F.normalize(at_least_fp32(x), dim=-1) for x in (image_embeddings, text_embeddings))
    scale = torch.as_tensor(scale, dtype=images.dtype, device=images.device)
    return TiledInfoNCE.apply(images, texts, scale, tile)


class TiledInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, scale, tile):
        rows, columns = images.new_empty(len(images)), images.new_full((len(images),), -torch.inf)
        for first in range(0, len(images), tile):
            similarity = (scale * images[first : first + tile]) @ texts.T  # (tile, B)
            rows[first : first + tile] = similarity.logsumexp(1)
            columns = torch.logaddexp(columns, similarity.logsumexp(0))
            del similarity  # before the next one
        ctx.save_for_backward(images, texts, scale, rows, columns)
        ctx.tile = tile
        return ((rows + columns) / 2 - scale * torch.linalg.vecdot(images, texts)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, texts, scale, rows, columns = ctx.saved_tensors
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        for first in range(0, len(images), ctx.tile):
            strip = slice(first, first + ctx.tile)
            similarity = (scale * images[strip]) @ texts.T
            weights = (similarity - columns).exp_()
            weights += similarity.sub_(rows[strip, None]).exp_()
            weights.diagonal(offset=first).sub_(2)
            weights *= gradient * scale / (2 * len(images))
            torch.mm(weights, texts, out=image_gradient[strip])
            text_gradient.addmm_(weights.T, images[strip])
            del similarity, weights
        # s_ij = scale * <image_i, text_j>: the sum of dL/ds_ij * s_ij is also that of <dL/dimage_i, image_i>.
        return image_gradient, text_gradient, torch.linalg.vecdot(image_gradient, images).sum() / scale, None


def process() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_with_gradient(rows):
    """The rows (b, D) of all processes, in order of rank, (B, D); ranks may bring different numbers of them.

    Every process computes the loss of the whole batch, so the gradient of its own rows is complete as it is: nothing
    is exchanged in the backward pass, and the parameters' gradients are to be summed over the processes (but the
    temperature's, which is complete on every one)."""
    return GatherRows.apply(rows) if dist.is_initialized() else rows


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        counts = torch.cat(counts).tolist()
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))  # all ranks must send alike
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        first = sum(counts[: dist.get_rank()])
        ctx.own = slice(first, first + len(rows))
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.own]


# ---- Autoregressive loss
def cross_entropy_of_logits(hidden, weight, labels, num_tokens):
    """Next-token cross-entropy of the long captions: paper, equation 2.

    Args:
        hidden: (..., D), hidden states after the final norm.
        weight: (V, D), the language model's head.
        labels: (...), the token that follows each position, IGNORE where it is not supervised.
        num_tokens: what the sum is divided by, the supervised tokens of the whole global batch: a mean over each part
            of a batch would weigh the tokens of parts with few of them more."""
    supervised = labels != IGNORE
    logits = at_least_fp32(F.linear(hidden[supervised], weight))  # (N, V): only rows that have a label meet the head
    return F.cross_entropy(logits, labels[supervised], reduction="sum") / max(num_tokens, 1)


def linear_cross_entropy(hidden, weight, labels, num_tokens, chunk_bytes: int = 2**27):
    """`cross_entropy_of_logits` that holds the logits of a few rows at a time: as many as fit `chunk_bytes` in fp32,
    but no fewer than 256, for small products are slow ones. Their gradient is computed while they are there."""
    supervised = labels != IGNORE
    rows = max(256, chunk_bytes // (4 * len(weight)))
    loss = LinearCrossEntropy.apply(hidden[supervised], weight, labels[supervised], rows, torch.is_grad_enabled())
    return loss / max(num_tokens, 1)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, rows, with_gradient):
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        loss = at_least_fp32(hidden.new_zeros(()))
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=loss.dtype) if needs_weight else None
        for first in range(0, len(labels), rows):
            part = slice(first, first + rows)
            logits, label = at_least_fp32(hidden[part] @ weight.T), labels[part, None]  # (rows, V), (rows, 1)
            logits -= logits.amax(-1, keepdim=True)
            right = logits.gather(1, label)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (total.log() - right).sum()
            if needs_hidden or needs_weight:  # dL/dlogits = softmax - one hot, in their place
                logits = logits.div_(total).scatter_add_(1, label, -torch.ones_like(total)).to(hidden.dtype)
            if needs_hidden:
                torch.mm(logits, weight, out=hidden_gradient[part])
            if needs_weight:
                weight_gradient += logits.T @ hidden[part]
            del logits  # before the next ones
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        scaled = [None if saved is None else saved * gradient for saved in ctx.saved_tensors]
        return *scaled, None, None, None


# ---- Both, and their gradients over a batch that came in chunks
def vladva_loss(contrastive, autoregressive, contrastive_weight: float = 1.0, autoregressive_weight: float = 1.0):
    """The total: both losses in every batch. The paper does not report weights; 1 and 1 are ours."""
    return contrastive_weight * contrastive + autoregressive_weight * autoregressive


def backward_whole(chunks, embed, forward, contrast, weights=(1.0, 1.0)):
    """Add the gradients of `vladva_loss` over all chunks to the parameters'; the activations of all are held at once.

    Args:
        chunks: parts of one batch; `embed` and `forward` get one of them at a time.
        embed: chunk -> embeddings (b, D), by the shortest way (used by `backward_cached` alone).
        forward: chunk -> the same embeddings, and the chunk's share of the autoregressive loss.
        contrast: a list of the embeddings of all chunks -> the contrastive loss.
        weights: of the contrastive and of the autoregressive loss. A contrastive weight of 0 never calls `contrast`.
    Returns: both losses, without weights."""
    embeddings, shares = zip(*replayed(forward, chunks, torch.randint(2**62, (len(chunks),))))
    autoregressive = sum(shares)
    contrastive = contrast(embeddings) if weights[0] else torch.zeros_like(autoregressive)
    vladva_loss(contrastive, autoregressive, *weights).backward()
    return contrastive.detach(), autoregressive.detach()


def backward_cached(chunks, embed, forward, contrast, weights=(1.0, 1.0)):
    """`backward_whole` that holds the activations of one chunk at a time: the gradient cache, arXiv 2101.06983."""
    seeds = torch.randint(2**62, (len(chunks),))
    gradients, contrastive, autoregressive = [0.0] * len(chunks), torch.zeros(()), 0.0
    if weights[0]:
        # 1. The embeddings of the whole batch, without anything kept for a backward pass.
        with torch.no_grad():
            leaves = [embeddings.requires_grad_() for embeddings in replayed(embed, chunks, seeds)]

        # 2. The gradient of the contrastive loss in embedding space.
        contrastive = contrast(leaves)
        (weights[0] * contrastive).backward()
        gradients = [embeddings.grad for embeddings in leaves]

    # 3. Chunk by chunk once more. By the chain rule the gradient of a parameter w is the sum over the rows of
    # <gradient, d embedding / d w>: that of the surrogate, whose value means nothing.
    for gradient, (embeddings, share) in zip(gradients, replayed(forward, chunks, seeds)):
        surrogate = (embeddings * gradient).sum()
        (surrogate + weights[1] * share).backward()
        autoregressive += share.detach()
    return contrastive.detach(), autoregressive


def replayed(function, chunks, seeds):
    """What `function` makes of one chunk after another, with the random numbers, so the dropout masks, of its seed."""
    for chunk, seed in zip(chunks, seeds.tolist()):
        torch.manual_seed(seed)
        yield function(chunk)
