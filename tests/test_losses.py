"""losses.py against formulas written out, and against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from fast.chunked import linear_cross_entropy, tiled_contrastive_loss
from losses import (
    IGNORE,
    contrastive_loss,
    cross_entropy,
)
from runtime.processes import gather_rows


def test_contrastive_loss_is_the_equation():
    """Mean over both directions of -log softmax at the matching pair, of cosine similarities times
    the scale.
    """
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
    """Rows without a label change nothing; value and gradients are those of the plain loss over all
    logits.
    """
    hidden, weight = torch.randn(3, 7, 16), torch.randn(40, 16)
    labels = torch.randint(0, 40, (3, 7)).masked_fill(torch.rand(3, 7) < 0.4, IGNORE)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    number = int((labels != IGNORE).sum())
    loss = linear_cross_entropy(ours, weight, labels, number)
    expected = F.cross_entropy(
        (plain @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE
    )
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-8)


def test_linear_cross_entropy_of_parts_adds_up():
    """With the global token count, the losses of uneven parts sum to the loss of the whole."""
    hidden, weight, labels = torch.randn(6, 5, 8), torch.randn(20, 8), torch.randint(0, 20, (6, 5))
    labels[0, 1:] = IGNORE
    number = int((labels != IGNORE).sum())
    whole = linear_cross_entropy(hidden, weight, labels, number)
    parts = [
        linear_cross_entropy(hidden[part], weight, labels[part], number)
        for part in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_linear_cross_entropy_without_labels_is_zero():
    """A batch without long captions has no loss and no NaN."""
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(9, 4), torch.full((2, 3), IGNORE), 0)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0


# ---- The fast versions against their references


def pair_of_inputs(make):
    """The same random inputs twice, all with gradients."""
    torch.manual_seed(3)
    first = [tensor.requires_grad_() for tensor in make()]
    return first, [tensor.detach().clone().requires_grad_() for tensor in first]


def assert_same(fast, slow, fast_inputs, slow_inputs):
    """Values and all gradients within a relative error of 1e-5."""
    assert (fast - slow).abs() <= 1e-5 * slow.abs()
    (0.7 * fast).backward(), (0.7 * slow).backward()
    for ours, reference in zip(fast_inputs, slow_inputs):
        assert reference.grad.norm() > 0
        assert (ours.grad - reference.grad).norm() <= 1e-5 * reference.grad.norm()


@pytest.mark.parametrize("B", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("tile", [1, 4, 8, 100])
def test_tiled_contrastive_loss_is_the_reference(B, tile):
    """Whatever the strips, whether or not they divide the batch."""
    make = lambda: [torch.randn(B, 16), torch.randn(B, 16), torch.tensor(12.0)]  # noqa: E731
    ours, theirs = pair_of_inputs(make)
    fast, slow = tiled_contrastive_loss(*ours, tile=tile), contrastive_loss(*theirs)
    if B == 1:  # nothing to tell apart: both are zero, and so are the gradients
        fast.backward()
        assert (
            fast.abs() < 1e-6
            and slow.abs() < 1e-6
            and all(tensor.grad.abs().max() < 1e-6 for tensor in ours)
        )
    else:
        assert_same(fast, slow, ours, theirs)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_tiled_contrastive_loss_at_the_lowest_temperature(cosine):
    """1 / temperature = 100: similarities from -100 to 100 neither overflow nor vanish, right or
    wrong pairs alike.
    """

    def make():
        images = torch.randn(9, 8)
        return [images, cosine * images, torch.tensor(100.0)]

    ours, theirs = pair_of_inputs(make)
    fast, slow = tiled_contrastive_loss(*ours, tile=4), contrastive_loss(*theirs)
    assert fast.isfinite() and (fast - slow).abs() <= 1e-5 * max(slow.item(), 1)
    fast.backward(), slow.backward()
    for tensor, reference in zip(
        ours, theirs
    ):  # where all pairs are right, both are next to nothing
        torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-5, atol=1e-5)


def test_tiled_contrastive_loss_passes_gradcheck():
    inputs = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: tiled_contrastive_loss(*x, tile=2), (*inputs, scale))


def test_tiled_contrastive_loss_in_bf16_is_the_reference_in_bf16():
    """Both compute in fp32 what they are given in bf16."""
    images, texts = torch.randn(10, 16).bfloat16(), torch.randn(10, 16).bfloat16()
    torch.testing.assert_close(
        tiled_contrastive_loss(images, texts, 9.0, tile=3), contrastive_loss(images, texts, 9.0)
    )


def labels_with_gaps(rows, vocabulary):
    return torch.randint(0, vocabulary, (rows,)).masked_fill(torch.rand(rows) < 0.3, IGNORE)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_linear_cross_entropy_is_the_reference(rows, frozen_head):
    """Chunks of 256 rows (the floor), uneven last ones, a frozen and a trainable head."""
    ours, theirs = pair_of_inputs(lambda: [torch.randn(rows, 12), torch.randn(50, 12)])
    labels = labels_with_gaps(rows, 50)
    labels[0] = 3
    if frozen_head:
        ours[1], theirs[1] = ours[1].detach(), theirs[1].detach()
    losses = [
        loss(*inputs, labels, 91, *extra)
        for loss, inputs, extra in ((linear_cross_entropy, ours, (1,)), (cross_entropy, theirs, ()))
    ]
    assert_same(*losses, ours[: 2 - frozen_head], theirs[: 2 - frozen_head])


def test_linear_cross_entropy_chunks_by_bytes(monkeypatch):
    """As many rows at a time as fit the bytes: the head is never multiplied by more."""
    seen, plain = [], torch.Tensor.amax

    def spy(tensor, *args, **settings):
        seen.append(len(tensor))
        return plain(tensor, *args, **settings)

    monkeypatch.setattr(torch.Tensor, "amax", spy)
    hidden, weight = torch.randn(1000, 8), torch.randn(64, 8)
    linear_cross_entropy(
        hidden, weight, torch.zeros(1000, dtype=torch.long), 1000, chunk_bytes=400 * 64 * 4
    )
    assert seen == [400, 400, 200]


def test_linear_cross_entropy_passes_gradcheck():
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 9))
    labels = torch.tensor([1, IGNORE, 8, 0, 3, IGNORE])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, 4), (hidden, weight)
    )


def test_linear_cross_entropy_against_torch():
    """torch 2.13 has one of its own, which serves as a second oracle."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    hidden, weight, labels = torch.randn(30, 8), torch.randn(40, 8), labels_with_gaps(30, 40)
    expected = F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, 1), expected)


def test_linear_cross_entropy_without_gradients():
    """Inference computes the loss and nothing else."""
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(40, 8)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, torch.arange(10), 10)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy(hidden, weight, torch.arange(10), 10).detach())


def gather_in_one_process(rank, world_size, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    torch.manual_seed(0)
    images, texts = torch.randn(7, 5), torch.randn(7, 5)
    parts = {2: [(0, 4), (4, 7)], 3: [(0, 1), (1, 1), (1, 7)]}[world_size]
    own = slice(*parts[rank])
    mine = [x[own].clone().requires_grad_() for x in (images, texts)]
    loss = tiled_contrastive_loss(*(gather_rows(x) for x in mine), 5.0, tile=2)
    loss.backward()
    whole = [x.clone().requires_grad_() for x in (images, texts)]
    expected = contrastive_loss(*whole, 5.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(mine, whole):
        torch.testing.assert_close(ours.grad, theirs.grad[own], rtol=1e-5, atol=1e-7)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_gathered_rows_get_the_gradient_of_the_whole_batch(world_size, tmp_path):
    """Processes with different numbers of rows, even none: each gets its part of the one gradient,
    unscaled.
    """
    torch.multiprocessing.spawn(
        gather_in_one_process, (world_size, str(tmp_path)), nprocs=world_size
    )


def test_gather_alone_is_nothing():
    rows = torch.randn(2, 3)
    assert gather_rows(rows) is rows
