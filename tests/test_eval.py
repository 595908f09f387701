"""eval.py: metrics against brute force, readers on files of the real shapes, commands end to end."""

import json
import sys
from io import StringIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import DataError, read_karpathy, read_sugarcrepe, read_winoground
from eval import (
    SUGARCREPE,
    TOY_MODEL,
    Conversation,
    Embeddings,
    caption,
    captioning,
    encode_image,
    encode_text,
    evaluate,
    load_base,
    main,
    open_image,
    recall_at_k,
    retrieval,
    sugarcrepe,
    sugarcrepe_pp,
    winoground,
)
from toy import world

PAIR = ("caption", "negative_caption")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world") / "data", train_scenes=12, test_scenes=20)


@pytest.fixture(scope="module")
def toy():
    return load_base(TOY_MODEL, "cpu")


class Given(Embeddings):
    """Embeddings that a test makes up."""

    def __init__(self, known):
        self.known = {key: F.normalize(torch.as_tensor(vector).float(), dim=-1) for key, vector in known.items()}


# ---- Metrics


def brute_force(scores, image_of_text, k):
    """Both recalls by counting, item by item; an equal score of something else ranks above."""
    t2i, i2t = [], []
    for text, image in enumerate(image_of_text):
        t2i.append(
            sum(scores[text, other] >= scores[text, image] for other in range(scores.shape[1]) if other != image) < k
        )
    for image in range(scores.shape[1]):
        own = [text for text, i in enumerate(image_of_text) if i == image]
        others = [text for text, i in enumerate(image_of_text) if i != image]
        i2t.append(any(sum(scores[other, image] >= scores[text, image] for other in others) < k for text in own))
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


def test_embeddings_that_are_not_finite_are_refused():
    """A diverged model has no scores, least of all perfect ones."""
    with pytest.raises(DataError, match="not finite"):
        Given({}).look_up(["a"], 8, "captions", lambda part: torch.full((len(part), 4), torch.nan))


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
    assert recall["t2i_r1"] == pytest.approx(2, abs=0.8) and recall["t2i_r10"] == pytest.approx(20, abs=2)
    vectors = {(kind, i): torch.randn(64) for kind in "abcd" for i in range(number)}
    items = [
        {"image": ("a", i), "caption": ("b", i), "negative_caption": ("c", i)}
        | {"image_0": ("a", i), "image_1": ("b", i), "caption_0": ("c", i), "caption_1": ("d", i)}
        for i in range(number)
    ]
    assert sugarcrepe(Given(vectors), items) == pytest.approx(50, abs=2.5)
    result = winoground(Given(vectors), items)
    assert [result[key] for key in ("text", "image", "group")] == pytest.approx([25, 25, 16.7], abs=2.5)


def test_compositional_tests_by_hand():
    """One case of each kind, in two dimensions, ties included: a tie is a failure."""
    known = {"right": [1, 0], "near": [1, 0.5], "far": [0, 1], "image": [1, 0.1], "other image": [0.1, 1]}
    item = {"image": "image", "caption": "right", "caption2": "near", "negative_caption": "far"}
    e = Given(known)
    assert sugarcrepe(e, [item, item | {"negative_caption": "right"}]) == 50
    assert sugarcrepe_pp(e, [item]) == {"itt": 100, "tot": 100}
    assert sugarcrepe_pp(e, [item | {"caption2": "far", "negative_caption": "near"}]) == {"itt": 0, "tot": 0}
    pair = {"image_0": "image", "image_1": "other image", "caption_0": "right", "caption_1": "far"}
    assert winoground(e, [pair]) == {"text": 100, "image": 100, "group": 100}
    assert winoground(e, [pair | {"caption_1": "right"}]) == {"text": 0, "image": 0, "group": 0}
    swapped = pair | {"caption_0": "far", "caption_1": "right"}
    assert winoground(e, [pair, swapped]) == {"text": 50, "image": 50, "group": 50}


# ---- Readers


def test_real_sugarcrepe_files(real_file, tmp_path):
    """7,511 items, by file as published; keys have gaps; captions come without the white space around some of them."""
    counts = dict(zip(SUGARCREPE, (1652, 788, 1406, 245, 666, 2062, 692)))
    for name, count in counts.items():
        items = read_sugarcrepe(real_file(f"sugar-crepe/{name}.json"), tmp_path, PAIR)
        assert len(items) == count and all(item[key] == item[key].strip() for item in items for key in PAIR)
    assert sum(counts.values()) == 7511


def test_karpathy_of_coco(tmp_path):
    """filepath is a folder of COCO, only the wanted split is read, raw sentences are stripped."""
    image = {"filename": "a.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": " A cat.\n"}]}
    images = [image, image | {"split": "restval"}, {"filename": "b.jpg", "split": "test", "sentences": []}]
    (tmp_path / "k.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    items = read_karpathy(tmp_path / "k.json", tmp_path)
    assert items == [(tmp_path.resolve() / "val2014/a.jpg", ["A cat."]), (tmp_path.resolve() / "b.jpg", [])]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"images": 3}', '{"images": [{}]}', '{"0": {"filename": 1}}', '{"0": 1}']
)
def test_foreign_files_are_named(tmp_path, content):
    """Each reader answers a file of another shape with one DataError that names it."""
    path = tmp_path / "file.json"
    path.write_text(content)
    for read in (
        lambda: read_karpathy(path, tmp_path),
        lambda: read_sugarcrepe(path, tmp_path, PAIR),
        lambda: read_winoground(path, tmp_path),
    ):
        with pytest.raises(DataError, match="file.json"):
            read()


def test_paths_cannot_leave(tmp_path):
    item = {"0": {"filename": "../secret.png", "caption": "a", "negative_caption": "b"}}
    (tmp_path / "x.json").write_text(json.dumps(item))
    with pytest.raises(DataError, match="outside"):
        read_sugarcrepe(tmp_path / "x.json", tmp_path, PAIR)


# ---- On the shipped model


def test_embeddings_are_unit_hidden_states(toy, small_world):
    """The embedding is the normalised last hidden state at the last prompt token, computed here without eval.py."""
    paths = sorted((small_world / "images/test").glob("*.png"))[:3]
    images = [open_image(path) for path in paths]
    ids = torch.tensor([toy.layout.image_side()] * 3)
    with torch.no_grad():
        hidden = toy.model(ids, torch.stack([toy.processor(image) for image in images]))[:, -1]
        text = toy.model(torch.tensor([toy.layout.text_side("a red circle")]))[:, -1]
    torch.testing.assert_close(encode_image(toy, images), hidden / hidden.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(encode_text(toy, ["a red circle"]), text / text.norm(dim=-1, keepdim=True))


def test_untrained_toy_is_far_above_chance(toy, small_world):
    """Among 20 pictures, chance is 5 %."""
    items = read_karpathy(small_world / "test/karpathy.json", small_world / "images", "test")
    assert retrieval(Embeddings(toy), items)["t2i_r1"] > 40


def test_evaluate_runs_every_test(toy, small_world):
    """tests.json names files; the tables have DESIGN's keys; an unknown test is refused."""
    tests = {
        "retrieval": {"file": "test/karpathy.json", "images": "images", "split": "test"},
        "sugarcrepe": {"file": "test/sugarcrepe", "images": "images/test"},
        "sugarcrepe++": {"file": "test/sugarcrepe++", "images": "images/test"},
        "winoground": {"file": "test/winoground/examples.jsonl", "images": "test/winoground/images"},
        "captioning": {"file": "test.jsonl"},
    }
    path = small_world / "tests.json"
    path.write_text(json.dumps(tests))
    tables = evaluate(Embeddings(toy), path, world.score_captions)
    assert tables.keys() == tests.keys()
    assert tables["retrieval"].keys() == {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    assert tables["sugarcrepe"].keys() == set(SUGARCREPE)
    assert tables["sugarcrepe++"].keys() == {f"{name}_{kind}" for name in SUGARCREPE[:5] for kind in ("itt", "tot")}
    assert tables["captioning"].keys() == {"token_accuracy", "attributes", "objects"}
    assert tables["captioning"]["token_accuracy"] > 80
    path.write_text(json.dumps({"poetry": {"file": "x"}}))
    with pytest.raises(DataError, match="poetry"):
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
            predicted = toy.model.logits(toy.model(torch.tensor([ids]), pixels)).argmax(-1)[0].tolist()
        start = len(layout.image_side())
        right += sum(a == b for a, b in zip(predicted[start - 1 : -1], ids[start:]))
        total += len(ids) - start
    ours = captioning(toy, small_world / "test.jsonl", small_world)["token_accuracy"]
    assert ours == pytest.approx(100 * right / total)


def test_conversation_goes_on_from_the_cache(toy, small_world):
    """The second answer is that of the whole conversation computed from scratch."""
    image = open_image(sorted((small_world / "images/test").glob("*.png"))[0])
    talk = Conversation(toy, image, max_new_tokens=12)
    first = talk.ask("Describe the image in detail.")
    assert first == caption(toy, [image], max_new_tokens=12)[0]
    prompt = talk.ids + toy.layout.next_question("What color is the background?")
    second = talk.ask("What color is the background?")
    again = toy.model.generate([prompt], toy.pixel_values([image]), 12)[0]
    assert second == toy.tokenizer.decode(again)


def test_conversation_ends_where_positions_end(toy, small_world):
    """Answers are cut to the positions that are left; when there are none, one clear error, and nothing is lost."""
    talk = Conversation(toy, open_image(small_world / "images/test/000000.png"), max_new_tokens=10**6)
    talk.ask("Describe the image in detail.")
    before = list(talk.ids)
    with pytest.raises(DataError, match="positions"):
        talk.ask("red " * toy.model.config.text.max_position_embeddings)
    assert talk.ids == before and talk.ask("What color is the background?")


# ---- Commands


def test_caption_command(small_world, capsys):
    """Each picture gets its line; a question can be asked."""
    paths = [str(path) for path in sorted((small_world / "images/test").glob("*.png"))[:3]]
    main(["caption", *paths, "--device", "cpu", "--batch", "2"])
    output = capsys.readouterr().out
    assert all(f"{path}: there are" in output.lower() for path in paths)
    main(["caption", paths[0], "--device", "cpu", "--question", "What color is the background?"])
    assert capsys.readouterr().out.strip().split(": ")[1] in world.BACKGROUNDS


def test_chat_command(small_world, capsys, monkeypatch):
    """Questions are read from the terminal until an empty line."""
    monkeypatch.setattr(sys, "stdin", StringIO("Describe the image in detail.\nHow many objects are in the image?\n\n"))
    main(["chat", str(small_world / "images/test/000000.png"), "--device", "cpu", "--max_new_tokens", "20"])
    assert "there are" in capsys.readouterr().out.lower()


def test_table_commands(small_world, tmp_path, capsys):
    """Every table from files on disk, with the paper's rows where it has them, and as JSON."""
    data = small_world / "test"
    for arguments, key in (
        (["retrieval", data / "karpathy.json", "--images", small_world / "images"], "t2i_r1"),
        (["sugarcrepe", data / "sugarcrepe", "--images", small_world / "images/test"], "swap_att"),
        (["sugarcrepe++", data / "sugarcrepe++", "--images", small_world / "images/test"], "swap_att_itt"),
        (["winoground", data / "winoground/examples.jsonl", "--images", data / "winoground/images"], "group"),
        (["captioning", small_world / "test.jsonl"], "token_accuracy"),
    ):
        main([*map(str, arguments), "--device", "cpu", "--json", str(tmp_path / "out.json")])
        assert key in capsys.readouterr().out
        assert 0 <= json.loads((tmp_path / "out.json").read_text())[arguments[0]][key] <= 100


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["caption", "missing.png"], "missing.png: no such image"),
        (["caption", "x.png", "--model", "nowhere"], "nowhere: no such folder"),
        (["retrieval", "missing.json"], "missing.json: no such file"),
        (["caption", "x.png", "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)
