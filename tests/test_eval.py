"""eval.py: metrics against brute force, readers on files of the real shapes, commands end to
end."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval import (
    TOY_MODEL,
    Embeddings,
    captioning,
    cider_d,
    encode_image,
    encode_text,
    evaluate,
    fingerprint,
    imagenet,
    load_base,
    load_embedder,
    main,
    open_image,
    paper_rows,
    recall_at_k,
    retrieval,
    sugarcrepe,
    sugarcrepe_pp,
    winoground,
)
from formats.files import InputError
from formats.testsets import (
    SIZES,
    SUGARCREPE,
    read_imagenet,
    read_retrieval,
    read_sugarcrepe,
    read_winoground,
)
from toy import world
from train import main as train

PAIR = ("caption", "negative_caption")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world") / "data", train_scenes=12, test_scenes=20)


class Given(Embeddings):
    """Embeddings that a test makes up."""

    def __init__(self, known):
        self.given = {
            key: F.normalize(torch.as_tensor(vector).float(), dim=-1)
            for key, vector in known.items()
        }

    def texts(self, keys):
        return torch.stack([self.given[key] for key in keys])

    images = texts


# ---- Metrics


def brute_force(scores, image_of_text, k):
    """Both recalls by counting, item by item; an equal score of something else ranks above."""
    t2i, i2t = [], []
    for text, image in enumerate(image_of_text):
        t2i.append(
            sum(
                scores[text, other] >= scores[text, image]
                for other in range(scores.shape[1])
                if other != image
            )
            < k
        )
    for image in range(scores.shape[1]):
        own = [text for text, i in enumerate(image_of_text) if i == image]
        others = [text for text, i in enumerate(image_of_text) if i != image]
        i2t.append(
            any(
                sum(scores[other, image] >= scores[text, image] for other in others) < k
                for text in own
            )
        )
    return 100 * np.mean(t2i), 100 * np.mean(i2t)


@pytest.mark.parametrize("seed", range(5))
def test_recall_is_brute_force_with_ties(seed):
    """Random integer scores, full of ties, uneven numbers of captions."""
    random = np.random.default_rng(seed)
    image_of_text = np.sort(np.concatenate([np.arange(7), random.integers(0, 7, 9)]))
    scores = random.integers(0, 6, (16, 7))
    ours = recall_at_k(torch.tensor(scores).float(), torch.tensor(image_of_text))
    for k in (1, 5, 10):
        t2i, i2t = brute_force(scores, image_of_text, k)
        assert ours[f"t2i_r{k}"] == pytest.approx(t2i) and ours[f"i2t_r{k}"] == pytest.approx(i2t)


def test_embeddings_that_are_not_finite_are_refused(toy, monkeypatch):
    """A diverged model has no scores, least of all perfect ones."""
    monkeypatch.setattr(
        "eval.encode_text", lambda embedder, part: torch.full((len(part), 4), torch.nan)
    )
    with pytest.raises(InputError, match="not finite"):
        Embeddings(toy).texts(["a"])


def test_recall_with_images_that_have_no_caption():
    """Such an image is one more to be mistaken, and is not asked for its own texts."""
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.9]])  # the third image has no text
    assert recall_at_k(scores, torch.tensor([0, 1]), (1, 2)) == {
        "t2i_r1": 50,
        "t2i_r2": 100,
        "i2t_r1": 100,
        "i2t_r2": 100,
    }


def test_constant_embeddings_score_nothing():
    """A model that says the same of everything must not score by luck."""
    scores, image_of_text = torch.ones(10, 5), torch.arange(5).repeat_interleave(2)
    assert recall_at_k(scores, image_of_text, (1,)) == {"t2i_r1": 0.0, "i2t_r1": 0.0}


def test_chance_levels_on_random_embeddings():
    """R@1 = 1/N, SugarCrepe 50, Winoground 25 / 25 / 16.7."""
    torch.manual_seed(0)
    number = 4000
    scores = torch.randn(number, 50)
    recall = recall_at_k(scores, torch.arange(number) % 50)
    assert recall["t2i_r1"] == pytest.approx(2, abs=0.8) and recall["t2i_r10"] == pytest.approx(
        20, abs=2
    )
    vectors = {(kind, i): torch.randn(64) for kind in "abcd" for i in range(number)}
    items = [
        {"image": ("a", i), "caption": ("b", i), "negative_caption": ("c", i)}
        | {
            "caption2": ("d", i),
            "image_0": ("a", i),
            "image_1": ("b", i),
            "caption_0": ("c", i),
            "caption_1": ("d", i),
        }
        for i in range(number)
    ]
    assert sugarcrepe(Given(vectors), {"a": items, "b": items[:1]})["a"] == pytest.approx(
        50, abs=2.5
    )
    assert sugarcrepe_pp(Given(vectors), {"x": items}) == pytest.approx(
        {"x_itt": 100 / 3, "x_tot": 100 / 3}, abs=2.5
    )
    result = winoground(Given(vectors), items)
    assert [result[key] for key in ("text", "image", "group")] == pytest.approx(
        [25, 25, 16.7], abs=2.5
    )


def test_compositional_tests_by_hand():
    """One case of each kind, in two dimensions, ties included: a tie is a failure."""
    known = {
        "right": [1, 0],
        "near": [1, 0.5],
        "far": [0, 1],
        "image": [1, 0.1],
        "other image": [0.1, 1],
    }
    item = {"image": "image", "caption": "right", "caption2": "near", "negative_caption": "far"}
    e = Given(known)
    assert sugarcrepe(e, {"a": [item, item | {"negative_caption": "right"}], "b": [item]}) == {
        "a": 50,
        "b": 100,
    }
    assert sugarcrepe_pp(e, {"x": [item]}) == {"x_itt": 100, "x_tot": 100}
    assert sugarcrepe_pp(e, {"x": [item | {"caption2": "far", "negative_caption": "near"}]}) == {
        "x_itt": 0,
        "x_tot": 0,
    }
    pair = {"image_0": "image", "image_1": "other image", "caption_0": "right", "caption_1": "far"}
    assert winoground(e, [pair]) == {"text": 100, "image": 100, "group": 100}
    assert winoground(e, [pair | {"caption_1": "right"}]) == {"text": 0, "image": 0, "group": 0}
    swapped = pair | {"caption_0": "far", "caption_1": "right"}
    assert winoground(e, [pair, swapped]) == {"text": 50, "image": 50, "group": 50}


def test_zero_shot_classes_by_hand():
    """A class is the mean over its templates; namesakes count as one, another class with an equal
    score as above."""
    known = {
        "a cat": [1, 0],
        "my cat": [1, 0.2],
        "a dog": [0, 1],
        "my dog": [0.2, 1],
        "a cow": [0.1, 1],
        "my cow": [0, 1],
    }
    e = Given(
        known | {"a pup": known["a dog"], "my pup": known["my dog"], "p": [1, 0.1], "q": [0.1, 1]}
    )
    templates = ["a {}", "my {}"]
    assert imagenet(e, ([("p", 0), ("q", 0), ("q", 1)], ["cat", "dog"]), templates) == {
        "top1": pytest.approx(200 / 3),
        "top5": 100,
    }
    assert imagenet(e, ([("q", 1)], ["cat", "dog", "dog"]), templates)["top1"] == 100
    assert imagenet(e, ([("q", 1)], ["cat", "dog", "pup"]), templates)["top1"] == 0


def test_zero_shot_is_plain_linear_algebra(monkeypatch):
    """Against NumPy, with 30 classes and 3 templates of random vectors."""
    random = np.random.default_rng(0)
    names, templates = [f"c{i}" for i in range(30)], ["a {}.", "{}", "the {}"]
    known = {t.replace("{}", name): random.normal(size=8) for name in names for t in templates}
    pictures = [(f"p{i}", i % 30) for i in range(200)]
    known |= {name: random.normal(size=8) for name, _ in pictures}

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    classes = unit(
        np.stack(
            [np.mean([unit(known[t.replace("{}", n)]) for t in templates], axis=0) for n in names]
        )
    )
    scores = unit(np.stack([known[name] for name, _ in pictures])) @ classes.T
    best = np.argsort(-scores, axis=1)
    ours = imagenet(Given(known), (pictures, names), templates)
    for k in (1, 5):
        assert ours[f"top{k}"] == pytest.approx(
            100 * np.mean([i % 30 in best[i, :k] for i in range(200)])
        )


def test_cider_d_is_the_authors():
    """Against the authors' code where it is installed (pycocoevalcap), and always against what it
    said once."""
    generated = ["a red cat sits on the table", "two dogs run", "a small chair", "the cat", ""]
    references = [
        ["a red cat sits on a table", "the cat is red and sits on the table"],
        ["two dogs run on the grass", "some dogs are running", "two big dogs run"],
        ["a big table"],
        ["the cat"],
        ["nothing was said"],
    ]
    ours = cider_d(generated, references)["cider_d"]
    assert ours == pytest.approx(275.90488100566154)
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for guess, texts in zip(generated, references):
        scorer += (guess, texts)
    assert ours == pytest.approx(100 * scorer.compute_score()[0])


def test_paper_rows_have_the_tests_keys():
    """What is printed under one another is the same quantity."""
    names = {name for sizes in SIZES.values() for name in sizes.values()}
    keys = {
        "SugarCrepe": set(SUGARCREPE),
        "Winoground": {"text", "image", "group"},
        "ImageNet": {"top1", "top5"},
    }
    keys["SugarCrepe++"] = {f"{kind}_{test}" for kind in SUGARCREPE[:5] for test in ("itt", "tot")}
    for name in names:
        for row in paper_rows(name).values():
            assert row.keys() == keys.get(name, {"t2i_r1", "t2i_r10", "i2t_r1", "i2t_r10"})
    assert (
        paper_rows("COCO")["paper: VladVA (LLaVA-1.5-7B)"]["t2i_r1"] == 59.0
    )  # tables 1 and 8 of the paper
    assert paper_rows("Winoground")["paper: VladVA (LLaVA-1.5-7B)"] == {
        "text": 40.5,
        "image": 17.5,
        "group": 12.8,
    }


# ---- Readers


def test_real_sugarcrepe_files(real_file, tmp_path):
    """7,511 items, by file as published; keys have gaps; captions come without the white space
    around some of them."""
    counts = dict(zip(SUGARCREPE, (1652, 788, 1406, 245, 666, 2062, 692)))
    for name, count in counts.items():
        items = read_sugarcrepe(real_file(f"sugar-crepe/{name}.json"), tmp_path, PAIR)
        assert len(items) == count and all(
            item[key] == item[key].strip() for item in items for key in PAIR
        )
    assert sum(counts.values()) == 7511


def test_karpathy_of_coco(tmp_path):
    """filepath is a folder of COCO, only the wanted split is read, raw sentences are stripped."""
    image = {
        "filename": "a.jpg",
        "filepath": "val2014",
        "split": "test",
        "sentences": [{"raw": " A cat.\n"}],
    }
    images = [
        image,
        image | {"split": "restval"},
        {"filename": "b.jpg", "split": "test", "sentences": []},
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    items = read_retrieval(tmp_path / "k.json", tmp_path)
    assert items == [
        (tmp_path.resolve() / "val2014/a.jpg", ["A cat."]),
        (tmp_path.resolve() / "b.jpg", []),
    ]


def test_coco_nocaps_and_blip(tmp_path):
    """Annotations in any order, images without one, the first captions only; BLIP's lists; all give
    the same items."""
    notes = [
        {"image_id": 2, "caption": "b1 "},
        {"image_id": 1, "caption": "a1"},
        {"image_id": 2, "caption": "b2"},
    ]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    blip = [
        {"image": f"{i}.jpg", "caption": texts}
        for i, texts in ((1, ["a1"]), (2, ["b1", "b2"]), (3, []))
    ]
    blip[0]["caption"] = "a1"  # one caption may stand alone
    (tmp_path / "blip.json").write_text(json.dumps(blip))
    root = tmp_path.resolve()
    wanted = [(root / "1.jpg", ["a1"]), (root / "2.jpg", ["b1", "b2"]), (root / "3.jpg", [])]
    assert read_retrieval(tmp_path / "coco.json", tmp_path) == wanted
    assert read_retrieval(tmp_path / "blip.json", tmp_path) == wanted
    assert read_retrieval(tmp_path / "coco.json", tmp_path, most=1)[1] == (root / "2.jpg", ["b1"])
    lines = [
        {"image": "2.jpg", "caption": "b1"},
        {"image": "1.jpg", "caption": "a1"},
        {"image": "2.jpg", "caption": "b2"},
    ]
    (tmp_path / "lines.json").write_text(
        json.dumps(lines)
    )  # a line for each caption: still two images
    assert read_retrieval(tmp_path / "lines.json", tmp_path) == [wanted[1], wanted[0]]


def test_imagenet_folders(tmp_path):
    """Classes in the folders' sorted order, names from the folders, a text file, or JSON of three
    shapes."""
    for folder, name in (
        ("n02", "x.JPEG"),
        ("n01", "a.JPEG"),
        ("n01", "b.png"),
        ("n01", "notes.txt"),
        ("big_cat", "c.jpg"),
    ):
        (tmp_path / "val" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / folder / name).write_bytes(b"")
    items, names = read_imagenet(tmp_path / "val")
    assert names == ["big cat", "n01", "n02"]
    assert [(path.name, index) for path, index in items] == [
        ("c.jpg", 0),
        ("a.JPEG", 1),
        ("b.png", 1),
        ("x.JPEG", 2),
    ]
    wanted = ["big cat", "tench", "gold fish"]
    shapes = {
        "names.txt": "big cat\ntench\ngold fish\n",
        "list.json": json.dumps(wanted),
        "by_folder.json": json.dumps({"n02": "gold_fish", "big_cat": "big_cat", "n01": "tench"}),
        "index.json": json.dumps(
            {"0": ["n01", "tench"], "1": ["n02", "gold_fish"], "2": ["big_cat", "big_cat"]}
        ),
    }
    for name, content in shapes.items():
        (tmp_path / name).write_text(content)
        assert read_imagenet(tmp_path / "val", tmp_path / name)[1] == wanted, name
    for name, content in (
        ("short.txt", "one\n"),
        ("less.json", '{"n01": "tench"}'),
        ("numbers.json", "[1, 2, 3]"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name):
            read_imagenet(tmp_path / "val", tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"images": 3}',
        '{"images": [{}]}',
        '{"0": {"filename": 1}}',
        '{"0": 1}',
    ],
)
def test_foreign_files_are_named(tmp_path, content):
    """Each reader answers a file of another shape with one InputError that names it."""
    path = tmp_path / "file.json"
    path.write_text(content)
    for read in (
        lambda: read_retrieval(path, tmp_path),
        lambda: read_sugarcrepe(path, tmp_path, PAIR),
        lambda: read_winoground(path, tmp_path),
    ):
        with pytest.raises(InputError, match="file.json"):
            read()


def test_paths_cannot_leave(tmp_path):
    item = {"0": {"filename": "../secret.png", "caption": "a", "negative_caption": "b"}}
    (tmp_path / "x.json").write_text(json.dumps(item))
    (tmp_path / "y.json").write_text(json.dumps([{"image": "../secret.png", "caption": ["a"]}]))
    line = {"image_0": "../secret", "image_1": "b", "caption_0": "a", "caption_1": "b"}
    (tmp_path / "z.jsonl").write_text(json.dumps(line))
    for read in (
        lambda: read_sugarcrepe(tmp_path / "x.json", tmp_path, PAIR),
        lambda: read_retrieval(tmp_path / "y.json", tmp_path),
        lambda: read_winoground(tmp_path / "z.jsonl", tmp_path),
    ):
        with pytest.raises(InputError, match="outside"):
            read()


# ---- On the shipped model


def test_embeddings_are_unit_hidden_states(toy, small_world):
    """The embedding is the normalised last hidden state at the last prompt token, computed here
    without eval.py."""
    paths = sorted((small_world / "images/test").glob("*.png"))[:3]
    images = [open_image(path) for path in paths]
    ids = torch.tensor([toy.layout.image_side()] * 3)
    with torch.no_grad():
        hidden = toy.model(ids, torch.stack([toy.processor(image) for image in images]))[:, -1]
        text = toy.model(torch.tensor([toy.layout.text_side("a red circle")]))[:, -1]
    torch.testing.assert_close(
        encode_image(toy, images), hidden / hidden.norm(dim=-1, keepdim=True)
    )
    torch.testing.assert_close(
        encode_text(toy, ["a red circle"]), text / text.norm(dim=-1, keepdim=True)
    )


def test_untrained_toy_is_far_above_chance(toy, small_world):
    """Among 20 pictures, chance is 5 %."""
    items = read_retrieval(small_world / "test/karpathy.json", small_world / "images", "test")
    assert retrieval(Embeddings(toy), items)["t2i_r1"] > 40


def test_evaluate_runs_every_test(toy, small_world):
    """tests.json names files; the tables have DESIGN's keys; an unknown test is refused."""
    tests = {
        "retrieval": {"file": "test/karpathy.json", "images": "images", "split": "test"},
        "sugarcrepe": {"file": "test/sugarcrepe", "images": "images/test"},
        "sugarcrepe++": {"file": "test/sugarcrepe++", "images": "images/test"},
        "winoground": {
            "file": "test/winoground/examples.jsonl",
            "images": "test/winoground/images",
        },
        "captioning": {"file": "test.jsonl"},
    }
    path = small_world / "tests.json"
    path.write_text(json.dumps(tests))
    tables = evaluate(Embeddings(toy), path, world.score_captions)
    assert tables.keys() == tests.keys()
    assert tables["retrieval"].keys() == {
        f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)
    }
    assert tables["sugarcrepe"].keys() == set(SUGARCREPE)
    assert tables["sugarcrepe++"].keys() == {
        f"{name}_{kind}" for name in SUGARCREPE[:5] for kind in ("itt", "tot")
    }
    assert tables["captioning"].keys() == {"token_accuracy", "attributes", "objects"}
    assert tables["captioning"]["token_accuracy"] > 80
    path.write_text(json.dumps({"poetry": {"file": "x"}}))
    with pytest.raises(InputError, match="poetry"):
        evaluate(Embeddings(toy), path)


def test_token_accuracy_is_teacher_forced(toy, small_world):
    """The share of next tokens predicted right, counted caption by caption without padding."""
    right = total = 0
    layout = toy.layout.with_image_prompt("Describe the image in detail.")
    for line in (small_world / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        ids = layout.image_side(toy.tokenizer.encode(record["long"][0]))
        pixels = toy.processor(open_image(small_world / record["image"]))[None]
        with torch.no_grad():
            predicted = (
                toy.model.logits(toy.model(torch.tensor([ids]), pixels)).argmax(-1)[0].tolist()
            )
        start = len(layout.image_side())
        right += sum(a == b for a, b in zip(predicted[start - 1 : -1], ids[start:]))
        total += len(ids) - start
    ours = captioning(toy, small_world / "test.jsonl", small_world)["token_accuracy"]
    assert ours == pytest.approx(100 * right / total)


def test_embeddings_are_kept_by_content_and_model(toy, small_world, tmp_path, monkeypatch):
    """What is known is not computed again: not for a copy of a file, not in another process, not
    after a stop half way; but for another model, other prompts, or a changed file. A damaged file
    is named."""
    paths = sorted((small_world / "images/test").glob("*.png"))[:5]
    copy = tmp_path / "copy.png"
    copy.write_bytes(paths[0].read_bytes())
    wanted, counted = encode_image(toy, [open_image(path) for path in paths]), []
    monkeypatch.setattr(
        "eval.encode_image",
        lambda embedder, part: counted.append(len(part)) or encode_image(embedder, part),
    )
    first = Embeddings(toy, tmp_path / "kept").images([*paths, copy, paths[0]])
    torch.testing.assert_close(first, torch.cat([wanted, wanted[:1], wanted[:1]]))
    assert counted == [5]
    again = Embeddings(toy, tmp_path / "kept")
    assert torch.equal(again.images([copy, *paths]), first[[0, 0, 1, 2, 3, 4]]) and counted == [5]
    copy.write_bytes(paths[4].read_bytes())
    assert torch.equal(again.images([copy]), first[4:5]) and counted == [5]
    words = again.texts(["a red circle", "a red circle"])
    assert torch.equal(Embeddings(toy, tmp_path / "kept").texts(["a red circle"]), words[:1])
    other = load_embedder(TOY_MODEL, "cpu", "What is this?", "What is this?")
    Embeddings(other, tmp_path / "kept").images(paths[:2])
    assert counted == [5, 2] and fingerprint(toy) == fingerprint(
        load_base(TOY_MODEL, "cpu")
    ) != fingerprint(other)
    with torch.no_grad():
        other.model.language_model.layers[3].mlp.up_proj.weight[5, 7] += 1e-4
    assert fingerprint(other) != fingerprint(
        load_embedder(TOY_MODEL, "cpu", "What is this?", "What is this?")
    )
    part = next((tmp_path / "kept" / fingerprint(toy)).glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(InputError, match=part.name):
        Embeddings(toy, tmp_path / "kept")


def test_a_fingerprint_is_of_all_that_an_embedding_depends_on(toy):
    """Settings that no tensor shows, the tokenizer, and the order of rows, of which sums know
    nothing."""

    def changed(change):
        embedder = load_base(TOY_MODEL, "cpu")
        change(embedder)
        return fingerprint(embedder)

    def flip(embedder):
        weight = embedder.model.language_model.layers[2].mlp.up_proj.weight
        weight.data = weight.data.flip(0)

    changes = [
        lambda embedder: setattr(embedder.model.config.text, "rope_theta", 5000.0),
        lambda embedder: setattr(embedder.model.config.text, "rms_norm_eps", 1e-5),
        lambda embedder: embedder.tokenizer.tokenizer.add_tokens(["zebra"]),
        lambda embedder: setattr(embedder.processor, "table", 2 * embedder.processor.table),
        flip,
    ]
    assert changed(lambda embedder: None) == fingerprint(toy)
    assert len({fingerprint(toy), *map(changed, changes)}) == 1 + len(changes)


def test_kept_embeddings_are_of_files_not_of_their_relative_names(toy, tmp_path, monkeypatch):
    """One cache used from two folders: pictures of one name, size and time stay two pictures."""
    vectors = []
    for folder, color in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        Image.new("RGB", (48, 48), color).save("x.bmp")
        os.utime("x.bmp", (1, 1))
        vectors.append(Embeddings(toy, tmp_path / "kept").images([Path("x.bmp")]))
        torch.testing.assert_close(vectors[-1], encode_image(toy, [open_image("x.bmp")]))
    assert not torch.equal(*vectors)


def test_texts_that_the_model_has_no_positions_for_are_refused(toy):
    with pytest.raises(InputError, match="512 positions"):
        encode_text(toy, ["red " * 600])


def test_interrupted_embeddings_go_on(toy, tmp_path, monkeypatch):
    """What was computed before a stop is there after it."""
    paths, calls = [tmp_path / f"{number}.png" for number in range(70)], []
    for number, path in enumerate(paths):
        Image.new("RGB", (50, 50), (3 * number, 0, 0)).save(path)

    def stop_at_the_second(embedder, part):
        calls.append(len(part))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode_image(embedder, part)

    monkeypatch.setattr("eval.encode_image", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        Embeddings(toy, tmp_path / "kept").images(paths)
    vectors = Embeddings(toy, tmp_path / "kept").images(paths)
    assert calls == [64, 6, 6]
    torch.testing.assert_close(vectors, encode_image(toy, [open_image(path) for path in paths]))


# ---- Commands


def test_caption_command(small_world, capsys):
    """Each picture gets its line; a question can be asked."""
    paths = [str(path) for path in sorted((small_world / "images/test").glob("*.png"))[:3]]
    main(["caption", *paths, "--device", "cpu", "--batch", "2"])
    output = capsys.readouterr().out
    assert all(f"{path}: there are" in output.lower() for path in paths)
    main(["caption", paths[0], "--device", "cpu", "--question", "What color is the background?"])
    assert capsys.readouterr().out.strip().split(": ")[1] in world.BACKGROUNDS


def tables(small_world):
    """The arguments of every table's command on the toy's files, and one of its results."""
    data = small_world / "test"
    return (
        (["retrieval", data / "karpathy.json", "--images", small_world / "images"], "t2i_r1"),
        (["sugarcrepe", data / "sugarcrepe", "--images", small_world / "images/test"], "swap_att"),
        (
            ["sugarcrepe++", data / "sugarcrepe++", "--images", small_world / "images/test"],
            "swap_att_itt",
        ),
        (
            [
                "winoground",
                data / "winoground/examples.jsonl",
                "--images",
                data / "winoground/images",
            ],
            "group",
        ),
        (["captioning", small_world / "test.jsonl", "--limit", 3], "token_accuracy"),
        (
            [
                "captioning",
                data / "karpathy.json",
                "--images",
                small_world / "images",
                "--limit",
                3,
            ],
            "cider_d",
        ),
        (
            ["imagenet", small_world / "images", "--template", "a {}.", "--template", "the {}."],
            "top1",
        ),
    )


def test_table_commands(small_world, tmp_path, capsys):
    """Every table from files on disk, with the paper's rows where it has them, the sizes, and as
    JSON."""
    for arguments, key in tables(small_world):
        arguments += ["--json", tmp_path / "out.json"] + (
            ["--cache", tmp_path] if arguments[0] != "captioning" else []
        )
        main([*map(str, arguments), "--device", "cpu"])
        shown = capsys.readouterr().out
        assert key in shown and ("NOT as published" in shown and "paper: VladVA" in shown) == (
            arguments[0] != "captioning"
        )
        assert (
            0
            <= json.loads((tmp_path / "out.json").read_text())[arguments[0]]["this model"][key]
            <= 100
        )
        assert ("all items" in shown) == (arguments[0] == "sugarcrepe")


def test_a_run_and_its_base_side_by_side(small_world, tmp_path, capsys):
    """--both measures the base model, the run, and the difference; embeddings are kept in the run;
    the second table computes nothing; a run's prompts are its own."""
    run = tmp_path / "run"
    settings = [
        "--steps",
        "2",
        "--batch_size",
        "12",
        "--lr",
        "0.01",
        "--device",
        "cpu",
        "--out",
        str(run),
    ]
    train(["--data", str(small_world / "train.jsonl"), *settings])
    arguments = [
        "sugarcrepe",
        str(small_world / "test/sugarcrepe"),
        "--images",
        str(small_world / "images/test"),
    ]
    arguments += ["--device", "cpu", "--json", str(tmp_path / "out.json")]
    main([*arguments, "--model", str(run), "--both"])
    rows = json.loads((tmp_path / "out.json").read_text())["sugarcrepe"]
    assert "base model" in capsys.readouterr().out
    assert rows["difference"] == {
        key: value - rows["base model"][key] for key, value in rows["this model"].items()
    }
    kept = sorted((run / "embeddings").rglob("*.safetensors"))
    assert len({path.parent for path in kept}) == 2
    main([*arguments, "--model", str(run), "--no-adapters"])
    main([*arguments, "--model", str(run)])
    assert (
        json.loads((tmp_path / "out.json").read_text())["sugarcrepe"]["this model"]
        == rows["this model"]
    )
    assert sorted((run / "embeddings").rglob("*.safetensors")) == kept
    main([*arguments, "--cache", str(tmp_path / "other")])  # the plain model
    assert (
        json.loads((tmp_path / "out.json").read_text())["sugarcrepe"]["this model"]
        == rows["base model"]
    )
    with pytest.raises(SystemExit, match="keeps the prompts"):
        main([*arguments, "--model", str(run), "--text_prompt", "What?"])
    train(
        ["--data", str(small_world / "train.jsonl"), *settings]
    )  # a run with kept embeddings can be replaced
    assert not (run / "embeddings").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["caption", "missing.png"], "missing.png: no such image"),
        (["caption", "x.png", "--model", "nowhere"], "nowhere: no such folder"),
        (["caption", "x.png", "--model", "llava-hf/llava"], "hf download llava-hf/llava"),
        (["retrieval", "missing.json"], "missing.json: no such file"),
        (["caption", "x.png", "--device", "abacus"], "--device abacus"),
        (["imagenet", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)


def test_captions_need_pictures(capsys):
    """The arguments' own reader says what is missing."""
    with pytest.raises(SystemExit):
        main(["caption"])
    assert "required: IMAGE" in capsys.readouterr().err


def test_a_run_keeps_its_prompts_and_has_to_be_complete(toy, tmp_path):
    """A folder with checkpoints/ is a run: its settings and its newest checkpoint must be there."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    prompts = dict(zip(("image_prompt", "text_prompt"), toy.layout.prompt_texts))
    (run / "config.json").write_text(json.dumps({"model": str(TOY_MODEL)} | prompts))
    with pytest.raises(InputError, match="not a complete run"):
        load_embedder(run, "cpu")
    (run / "checkpoints" / "latest").write_text("step-1\n")
    with pytest.raises(InputError, match="not a checkpoint beside it"):
        load_embedder(run, "cpu")
    with pytest.raises(InputError, match="keeps the prompts"):
        load_embedder(run, "cpu", image_prompt="What is this?")


def test_a_run_is_found_from_any_folder(tmp_path, monkeypatch):
    """runs/mine is looked for in the project as well, and is a run there, not a LLaVA folder."""
    run = tmp_path / "project" / "runs" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": str(TOY_MODEL)}))
    monkeypatch.setattr("formats.files.ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a complete run"):
        load_embedder("runs/mine", "cpu")


def test_a_base_has_one_hash_in_every_precision():
    """A run finds its base model also on a GPU whose fastest precision is fp16."""
    hashes = {
        load_base(TOY_MODEL, "cpu", dtype=dtype).base
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len(hashes) == 1
