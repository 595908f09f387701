"""The losses, as pure functions of tensors. First the reference, ten lines that read like the paper's equations.

Axes: B pairs in the global batch, N supervised tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a position that is not supervised


def contrastive_loss(image_embeddings, text_embeddings, scale):
    """Symmetric InfoNCE: every image must find its text among all texts of the batch, and every text its image.

    Paper, equation 1; arXiv 2103.00020. Where nothing is learned yet the loss is about log B.

    Args:
        image_embeddings, text_embeddings: (B, D), row i of both belongs together; normalised here.
        scale: 1 / temperature, a number or a scalar tensor.
    """
    images = F.normalize(image_embeddings.float(), dim=-1)
    texts = F.normalize(text_embeddings.float(), dim=-1)
    similarity = scale * images @ texts.T  # (B, B)
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def linear_cross_entropy(hidden, weight, labels, num_tokens):
    """Next-token cross-entropy of the long captions: paper, equation 2.

    Args:
        hidden: (..., D), hidden states after the final norm.
        weight: (V, D), the language model's head.
        labels: (...), the token that follows each position, IGNORE where it is not supervised.
        num_tokens: what the sum is divided by, the supervised tokens of the whole global batch: a mean over each part
            of a batch would weigh the tokens of parts with few of them more.
    """
    supervised = labels != IGNORE
    logits = F.linear(hidden[supervised], weight).float()  # (N, V): only rows that have a label meet the head
    return F.cross_entropy(logits, labels[supervised], reduction="sum") / max(num_tokens, 1)


def vladva_loss(contrastive, autoregressive, contrastive_weight: float = 1.0, autoregressive_weight: float = 1.0):
    """The total: both losses in every batch. The paper does not report weights; 1 and 1 are ours."""
    return contrastive_weight * contrastive + autoregressive_weight * autoregressive
