"""The deterministic figures of benchmarks/step.py, as a gate: what our step computes and keeps,
beside the peers'.
"""

import pytest

from benchmarks.measure import count_flops, saved_bytes
from benchmarks.step import (
    SIZES,
    Layout,
    build_ours,
    build_theirs,
    contender,
    largest_difference,
    make_samples,
)
from data import collate


@pytest.fixture(scope="module")
def contenders():
    """The tiny size with half of its batch, in fp32: ours, the rungs, and all weights."""
    pytest.importorskip("transformers"), pytest.importorskip("peft")
    import torch

    config, pairs, micro_batch = SIZES["tiny"]
    samples = make_samples(config, pairs // 2)
    batch = collate(samples, Layout(config), micro_batch)
    ours = build_ours(config, torch.float32)
    theirs = build_theirs(ours)
    made = {
        name: contender(name, ours, theirs, samples, batch, micro_batch)
        for name in ("ours", "P0", "P1", "P2")
    }
    return made, [*ours.parameters(), *theirs.parameters()]


@pytest.mark.parametrize("rung", ["P0", "P1", "P2"])
def test_all_rungs_compute_the_same_step(contenders, rung):
    """Losses and gradients of every rung, fp32, relative 1e-5: nobody is faster by computing
    something else.
    """
    made, _ = contenders
    ours, theirs = made["ours"].gradients(), made[rung].gradients()
    losses = [ours[0]["contrastive"], ours[0]["autoregressive"]]
    assert losses == pytest.approx([loss.item() for loss in theirs[0]], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) == 6 * 14 + 2
    assert largest_difference(ours[1], theirs[1]) < 1e-5


@pytest.mark.parametrize("rung,most", [("P0", 0.55), ("P1", 0.95), ("P2", 1.0)])
def test_floating_point_operations(contenders, rung, most):
    """Counted, not timed: our share of the rung's."""
    made, _ = contenders
    assert count_flops(made["ours"].gradients) / count_flops(made[rung].gradients) < most


@pytest.mark.parametrize("rung,most", [("P0", 1 / 3), ("P1", 0.63), ("P2", 0.65)])
def test_bytes_kept_for_the_backward_pass(contenders, rung, most):
    made, weights = contenders
    assert (
        saved_bytes(made["ours"].gradients, weights) / saved_bytes(made[rung].gradients, weights)
        < most
    )
