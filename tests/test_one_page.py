"""The paper on one page against the six modules: two independent writings of one method.

The same weights and the same batch must give the same losses and the same gradients.
"""

import importlib.util
import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT
from PIL import Image

import data
import eval
import lora
import train

PAGE = PROJECT / "workshop" / "one_page.py"


def import_from_path():
    """The page as a module. It is no part of a package, and nothing else imports it."""
    specification = importlib.util.spec_from_file_location("one_page", PAGE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


one_page = import_from_path()


@pytest.fixture
def page():
    return one_page.Llava(eval.TOY_MODEL)


@pytest.fixture
def records(small_world):
    lines = (small_world / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:8]]


@pytest.fixture
def both(page):
    """The page's model and ours with the same adapters, in which everything has moved."""
    embedder = eval.load_base(eval.TOY_MODEL, "cpu")
    train.add_adapters(embedder, train.TrainConfig(fast=False))
    one_page.add_adapters(page)
    names = ours_by_page_name(embedder.model)
    assert names.keys() == page.learned.keys()
    with torch.no_grad():
        for name, ours in names.items():
            ours.add_(0.05 * torch.randn_like(ours))  # B starts at zero, which would hide a fault
            page.learned[name].copy_(ours)
    return page, embedder


def ours_by_page_name(model) -> dict[str, torch.nn.Parameter]:
    """Our trainable parameters, by the names that the page gives to the same ones."""
    names = {
        "language_model.embed_tokens.image": one_page.IMAGE_PROMPT,
        "language_model.embed_tokens.text": one_page.TEXT_PROMPT,
        "log_scale": "log_scale",
    }
    found = {}
    for name, parameter in lora.trainable_parameters(model).items():
        page_name = name.replace("language_model.layers", "language_model.model.layers")
        for letter in "AB":
            page_name = page_name.replace(f"lora_{letter}.weight", letter)
        found[names.get(name, page_name)] = parameter
    return found


def open_picture(folder, record) -> Image.Image:
    return data.open_image(folder / record["image"], record.get("part"))


def in_double_precision(page, model) -> None:
    model.double()
    for tensors in (page.frozen, page.learned):
        for name, tensor in tensors.items():
            tensors[name] = tensor.detach().double().requires_grad_(tensor.requires_grad)


def test_it_is_one_page_and_imports_nothing_of_ours():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert max(len(line) for line in text.splitlines()) <= 100
    for ours in ("model", "data", "lora", "losses", "eval", "train", "toy", "formats"):
        assert f"import {ours}" not in text
        assert f"from {ours}" not in text


def test_losses_and_gradients_are_those_of_the_training_step(both, small_world, records):
    page, embedder = both
    in_double_precision(page, embedder.model)  # so that rounding cannot hide a difference
    config = train.TrainConfig(fast=False, caption_share=1.0)
    dataset = data.CaptionDataset(
        small_world / "train.jsonl", embedder.layout, embedder.processor, small_world
    )
    samples = [dataset[index, 0] for index in range(8)]
    # Chunks of five, so that ours sorts, pads and sums as it does in a real step.
    batch = data.collate(samples, embedder.layout, micro_batch=5)
    result = train.training_step(embedder.model, batch, config)

    pixels, short, long = zip(*[one_page.read_record(small_world, each) for each in records])
    pixels = [picture.double() for picture in pixels]
    contrastive, autoregressive = one_page.losses(page, pixels, short, long)
    (contrastive + autoregressive).backward()

    assert contrastive.item() == pytest.approx(result["contrastive"], rel=1e-5)
    assert autoregressive.item() == pytest.approx(result["autoregressive"], rel=1e-5)
    for name, ours in ours_by_page_name(embedder.model).items():
        gradient = page.learned[name].grad
        assert gradient.abs().max() > 0, name
        scale = ours.grad.abs().max().item()
        torch.testing.assert_close(gradient, ours.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_new_adapters_change_nothing(page, small_world, records):
    pixels, short, _ = zip(*[one_page.read_record(small_world, each) for each in records])
    nothing = [""] * len(pixels)
    before = page.read_images(pixels, nothing, one_page.IMAGE_PROMPT), page.read_texts(short)
    one_page.add_adapters(page)
    after = page.read_images(pixels, nothing, one_page.IMAGE_PROMPT), page.read_texts(short)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert all(name in page.learned for name in (one_page.IMAGE_PROMPT, one_page.TEXT_PROMPT))


def test_embeddings_are_those_of_eval(both, small_world, records):
    page, embedder = both
    pixels, short, _ = zip(*[one_page.read_record(small_world, each) for each in records])
    images = page.read_images(pixels, [""] * len(pixels), one_page.IMAGE_PROMPT)[:, 0]
    texts = page.read_texts(short)
    pictures = [open_picture(small_world, record) for record in records]
    normalize = torch.nn.functional.normalize
    expected = eval.encode_image(embedder, pictures)
    torch.testing.assert_close(normalize(images, dim=-1), expected, rtol=0, atol=1e-5)
    expected = eval.encode_text(embedder, list(short))
    torch.testing.assert_close(normalize(texts, dim=-1), expected, rtol=0, atol=1e-5)


def test_recall_and_the_caption_are_those_of_eval(page, toy, small_world):
    lines = (small_world / "test.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    pixels, short, _ = zip(*[one_page.read_record(small_world, each) for each in records])
    said = one_page.measure(page, pixels, short)

    pictures = [open_picture(small_world, record) for record in records]
    scores = eval.encode_text(toy, list(short)) @ eval.encode_image(toy, pictures).T
    table = eval.recall_at_k(scores, torch.arange(len(pictures)))
    assert f"text to image {table['t2i_r1']:.1f}%" in said
    assert f"image to text {table['i2t_r1']:.1f}%" in said
    written = page.encode(said.splitlines()[1].removesuffix("</s>"))
    assert written.tolist() == toy.tokenizer.encode(eval.caption(toy, pictures[:1])[0])


def test_words_are_tokenized_as_by_the_tokenizer(page, toy, small_world):
    texts = [one_page.IMAGE_PROMPT, one_page.DESCRIBE, "USER: Ein ☃, red-ring?", ""]
    for line in (small_world / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        texts += record["short"] + record["long"]
    for text in texts:
        assert page.encode(text).tolist() == toy.tokenizer.encode(text)
    # A word's place among the words is its id: `measure` reads ids so.
    assert list(page.vocabulary.values()) == list(range(len(page.vocabulary)))


def test_a_picture_is_a_file_or_a_part_of_one(toy, small_world, records, tmp_path):
    for record in records:
        picture = open_picture(small_world, record)
        content = io.BytesIO()
        picture.save(content, "PNG")
        (tmp_path / "alone.png").write_bytes(content.getvalue())
        (tmp_path / "many.bin").write_bytes(b"other" + content.getvalue() + b"pictures")
        captions = {"short": record["short"], "long": record["long"]}
        part = [5, len(content.getvalue())]
        found = [
            one_page.read_record(small_world, record),
            one_page.read_record(tmp_path, {"image": "alone.png", **captions}),
            one_page.read_record(tmp_path, {"image": "many.bin", "part": part, **captions}),
        ]
        for pixels, short, long in found:
            torch.testing.assert_close(pixels, toy.processor(picture), rtol=0, atol=1e-6)
            assert short == record["short"][0]
            assert long == record["long"][0] + " </s>"


def test_it_runs_and_prints_before_and_after(small_world):
    run = subprocess.run(
        [sys.executable, PAGE, "--data", small_world, "--steps", "11"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert lines[0].startswith("before text to image ")
    assert lines[-2].startswith("after  text to image ")
    assert lines[1].endswith("</s>")
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
