"""The two losses of VladVA, as pure functions of tensors. Change them here: training calls them.

    contrastive_loss     short captions: an image and its caption find each other among all others
    cross_entropy        long captions: every next token, given the image and the tokens before it

fast/chunked.py has each once more, for large batches and large vocabularies, with the same values
and gradients. Training takes that form only as long as it agrees with the one here.

Axes: B pairs in the global batch, N supervised tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORE = -100  # the label of a position that is not supervised


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- Contrastive loss: short captions


def contrastive_loss(image_embeddings, text_embeddings, scale):
    """Symmetric InfoNCE: each image must find its text among all texts of the batch, and each
    text its image. Paper, equation 1 (which is the sum of both directions, without the half;
    the half is CLIP's, arXiv 2103.00020). Where nothing is learned yet the loss is about log B.

    Args:
        image_embeddings, text_embeddings: (B, D), row i of both belongs together; they need not
            be normalised.
        scale: 1 / temperature, a number or a scalar tensor.
    Returns: a scalar, in fp32 or more."""
    images = F.normalize(at_least_fp32(image_embeddings), dim=-1)
    texts = F.normalize(at_least_fp32(text_embeddings), dim=-1)
    similarity = scale * images @ texts.T  # (B, B): cosine similarity over the temperature
    target = torch.arange(len(images), device=images.device)  # the partner of row i is column i
    image_to_text = F.cross_entropy(similarity, target)
    text_to_image = F.cross_entropy(similarity.T, target)
    return (image_to_text + text_to_image) / 2


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
