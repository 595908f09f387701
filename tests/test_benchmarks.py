"""The deterministic figures of benchmarks/step.py, as a gate: what our step computes and keeps,
beside the peers'. benchmarks/gpu.py, which is to run where nobody can mend it. And the rungs of
benchmarks/ladder.py, which must all compute the same step.
"""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu, ladder, rival
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
from lora import trainable_parameters
from model import LlavaConfig, TextConfig, VisionConfig
from train import TrainConfig, training_step


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


# ---- The ladder

MINI = LlavaConfig(  # 16 image tokens
    VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ),
    TextConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    image_token_id=1000,
)


@pytest.fixture(scope="module")
def rungs():
    """In float64: the random model embeds all alike, and fp32 rounds what is left of the rest."""
    return ladder.make_rungs(MINI, pairs=6, micro_batch=2, dtype=torch.float64)


def test_all_rungs_of_the_ladder_have_the_same_losses_and_gradients(rungs):
    *same, int8 = ladder.differences(rungs)
    assert max(same) < 1e-6  # LoRA itself is fp32
    assert 1e-4 < int8 < 0.5  # rounded weights: other numbers, and not nonsense


@pytest.mark.parametrize(
    "name,cached", [("lean LoRA and decoder", False), ("first pass on the prefix only", True)]
)
def test_the_ladder_leads_to_the_step_of_train_py(rungs, name, cached):
    """Not only the same numbers: as many operations, and as much kept."""
    rung = next(rung for rung in rungs if rung.name == name)
    samples = make_samples(MINI, 6)
    batch = collate(samples, Layout(MINI), 2)
    config = TrainConfig(batch_size=6, micro_batch=2, caption_share=1.0, gradient_cache=cached)

    def step():
        return training_step(rung.llava, batch, config)

    losses, gradients = ladder.losses_and_gradients(rung)
    found = step()
    assert [found["contrastive"], found["autoregressive"]] == pytest.approx(losses, rel=1e-6)
    parameters = trainable_parameters(rung.llava)
    own = {key: parameters[key].grad for key in gradients}
    assert largest_difference(gradients, own) < 1e-6
    rung.llava.zero_grad()
    held = list(rung.llava.parameters())
    assert count_flops(step) == count_flops(rung.run_and_forget)
    assert saved_bytes(step, held) == pytest.approx(saved_bytes(rung.run, held), rel=0.02)
    rung.llava.zero_grad()


def test_the_ladder_prints_a_row_for_each_rung(rungs, capsys):
    ladder.print_rows(ladder.measure(rungs, rounds=2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rungs)
    assert len({line.count("|") for line in lines}) == 1


# ---- The rival


def test_without_sentence_transformers_the_rival_is_skipped_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks.rival"])
    rival.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped: sentence_transformers is not here")


def test_the_rival_computes_the_same_step_and_embeddings(small_world, tmp_path):
    """Its cached multiple-negatives loss on LoRA by peft: loss, gradients, embeddings."""
    pytest.importorskip("sentence_transformers")
    config = replace(rival.SETTINGS, batch_size=8, micro_batch=4)
    rival.write_rival_folder(tmp_path / "folder")
    ours = rival.Ours(config)
    theirs = rival.Theirs(config, tmp_path / "folder", ours)
    (pairs,) = rival.make_pairs(ours.embedder, small_world / "train.jsonl", 8, steps=1)
    assert rival.first_step_differs_by(ours, theirs, pairs) < 1e-4
    pictures = [picture for picture, _ in pairs]
    captions = [caption for _, caption in pairs]
    assert (ours.images(pictures) - theirs.images(pictures)).abs().max() < 1e-5
    assert (ours.texts(captions) - theirs.texts(captions)).abs().max() < 1e-5
