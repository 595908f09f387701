"""examples/mteb_model.py and examples/clip_benchmark_model.py: other people's harnesses count what
eval.py counts."""

import re
from pathlib import Path

import pytest

from eval import TOY_MODEL, Embeddings, load_base, retrieval
from formats.testsets import read_retrieval
from toy import world


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world") / "data", train_scenes=12, test_scenes=40)


@pytest.fixture(scope="module")
def ours(small_world):
    """eval.py's recalls of the untrained toy model: some of them are neither 0 nor 100."""
    items = read_retrieval(small_world / "test" / "karpathy.json", small_world / "images")
    recalls = retrieval(Embeddings(load_base(TOY_MODEL, "cpu")), items)
    assert recalls["t2i_r1"] < 100
    return recalls


def test_clip_benchmark_counts_what_we_count(small_world, ours):
    """zeroshot_retrieval in both directions, R@1, R@5 and R@10."""
    pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    from examples import clip_benchmark_model

    theirs = clip_benchmark_model.retrieval(
        TOY_MODEL, small_world / "test" / "karpathy.json", small_world / "images", "cpu"
    )
    for k in (1, 5, 10):
        assert 100 * theirs[f"image_retrieval_recall@{k}"] == pytest.approx(
            ours[f"t2i_r{k}"], abs=1e-3
        )
        assert 100 * theirs[f"text_retrieval_recall@{k}"] == pytest.approx(
            ours[f"i2t_r{k}"], abs=1e-3
        )


def test_mteb_counts_what_we_count(small_world, ours):
    """Any2AnyRetrieval in both directions: hit_rate_at_k is R@k."""
    pytest.importorskip("mteb")
    from examples import mteb_model

    theirs = mteb_model.retrieval(
        load_base(TOY_MODEL, "cpu"), small_world / "test" / "karpathy.json", small_world / "images"
    )
    for way in ("t2i", "i2t"):
        for k in (1, 5, 10):
            assert 100 * theirs[f"{way} hit_rate_at_{k}"] == pytest.approx(
                ours[f"{way}_r{k}"], abs=1e-2
            )
    assert theirs["i2t recall_at_1"] <= 0.2  # one of five captions


def test_the_documents_point_at_tests_that_exist():
    """Every test that README.md or docs/ name or link as a proof is there."""
    project = Path(__file__).parent.parent
    documents = [project / "README.md", *sorted((project / "docs").glob("*.md"))]
    text = "\n".join(path.read_text() for path in documents)
    named = re.findall(r"(test_\w+\.py)::(\w+)", text)
    linked = re.findall(r"\]\((?:\.\./)?(tests/test_\w+\.py)\)", text)
    assert len(named) >= 6 and len(linked) >= 12
    for path in linked:
        assert (project / path).is_file(), path
    for file, name in named:
        assert f"def {name}(" in (project / "tests" / file).read_text(), f"{file}::{name}"
