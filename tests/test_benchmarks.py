"""The deterministic figures of benchmarks/step.py, as a gate: what our step computes and keeps,
beside the peers'. And benchmarks/gpu.py, which is to run where nobody can mend it.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu
from benchmarks.measure import count_flops, saved_bytes
from benchmarks.step import (
    SIZES,
    Comparison,
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


def test_needed_operations_are_those_of_single_sequences():
    """What three lengths tell, beside all sequences counted one by one, attention too."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    comparison = Comparison("smallest", torch.float32, 3)
    samples = comparison.samples
    alone = comparison.contender("ours", samples, 1, 1)
    alone.gradients()  # the first step also tries the fast losses on an example
    with sdpa_kernel(SDPBackend.MATH):  # of plain matrix products, which are counted
        needed = comparison.needed_flops(samples)
        counted = count_flops(alone.gradients)
    # Without the similarities of different pairs: here they are 8 of a million.
    assert needed == pytest.approx(counted, rel=2e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("name", gpu.PARTS)
def test_every_part_of_the_gpu_run_ends(place, name):
    """As with --dry, but in this process: importing everything for each part takes a minute."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    report = gpu.Report(place / "part.json")
    gpu.PARTS[name].function(report, gpu.Setting(dry=True, folder=place, limit=1000.0))
    lines = report.content["lines"]
    assert lines and report.content["figures"]
    # The checks of the first part report their failures, and go on.
    assert not [line for line in lines if "FAILED" in line[1] or "TOO MUCH" in line[1]]


def test_a_part_that_hangs_costs_only_itself(place):
    """It is ended at its limit, and said to be."""
    found = gpu.run_part("int8, 7B", limit=0.2, dry=True, folder=place)
    assert found["status"] == "stopped after 0 s" and found["lines"] == []


def test_a_part_that_fails_says_why(place, monkeypatch, capsys):
    def fail(report, setting):
        report.line("one finding", "before it fails")
        raise RuntimeError("out of something")

    monkeypatch.setitem(gpu.PARTS, "int8, 7B", gpu.Part(fail, 1, 1))
    path = place / "failed.json"
    with pytest.raises(SystemExit):
        gpu.child("int8, 7B", path, gpu.Setting(dry=True, folder=place, limit=1.0))
    found = gpu.json.loads(path.read_text())
    assert found["lines"] == [["one finding", "before it fails"]]
    assert found["error"] == "RuntimeError: out of something"
