"""losses.py against formulas written out, and against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import IGNORE, contrastive_loss, linear_cross_entropy, vladva_loss


def test_contrastive_loss_is_the_equation():
    """Mean over both directions of -log softmax at the matching pair, of cosine similarities times the scale."""
    images, texts, scale = torch.randn(5, 8), torch.randn(5, 8), 7.0
    total = 0.0
    for i in range(5):
        cosine = [F.cosine_similarity(images[i], texts[j], dim=0).item() for j in range(5)]
        total -= math.log(math.exp(scale * cosine[i]) / sum(math.exp(scale * c) for c in cosine))
        cosine = [F.cosine_similarity(images[j], texts[i], dim=0).item() for j in range(5)]
        total -= math.log(math.exp(scale * cosine[i]) / sum(math.exp(scale * c) for c in cosine))
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(total / 10, rel=1e-5)


def test_contrastive_loss_of_equal_embeddings_is_log_batch_size():
    """Embeddings that say nothing leave the loss at chance."""
    same = torch.ones(16, 4)
    assert contrastive_loss(same, same, 20.0).item() == pytest.approx(math.log(16))


def test_contrastive_loss_has_gradients():
    """Images, texts and the temperature all get the gradients of finite differences."""
    inputs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(*inputs, scale)
    loss.backward()
    for tensor in (*inputs, scale):
        flat, gradient = tensor.data.view(-1), tensor.grad.view(-1)
        for index in range(len(flat)):
            before, step = flat[index].item(), 1e-2
            flat[index] = before + step
            above = contrastive_loss(*inputs, scale).item()
            flat[index] = before - step
            below = contrastive_loss(*inputs, scale).item()
            flat[index] = before
            assert gradient[index].item() == pytest.approx((above - below) / (2 * step), abs=2e-3)


def test_linear_cross_entropy_is_torch_over_all_logits():
    """Rows without a label change nothing; value and gradients are those of the plain loss over all logits."""
    hidden, weight = torch.randn(3, 7, 16), torch.randn(40, 16)
    labels = torch.randint(0, 40, (3, 7)).masked_fill(torch.rand(3, 7) < 0.4, IGNORE)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    number = int((labels != IGNORE).sum())
    loss = linear_cross_entropy(ours, weight, labels, number)
    expected = F.cross_entropy((plain @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-8)


def test_linear_cross_entropy_of_parts_adds_up():
    """With the global token count, the losses of uneven parts sum to the loss of the whole."""
    hidden, weight, labels = torch.randn(6, 5, 8), torch.randn(20, 8), torch.randint(0, 20, (6, 5))
    labels[0, 1:] = IGNORE
    number = int((labels != IGNORE).sum())
    whole = linear_cross_entropy(hidden, weight, labels, number)
    parts = [linear_cross_entropy(hidden[part], weight, labels[part], number) for part in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(sum(parts), whole)


def test_linear_cross_entropy_without_labels_is_zero():
    """A batch without long captions has no loss and no NaN."""
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(9, 4), torch.full((2, 3), IGNORE), 0)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0


def test_vladva_loss_weighs_both():
    assert vladva_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5, 2.0).item() == 7.0
