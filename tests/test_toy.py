"""The toy world says only what is true, in well-formed files; the shipped TinyLLaVA is the one
transformers reads.
"""

import json
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_image
from eval import TOY_MODEL
from toy import ablation, world
from toy.world import Caption, Scene, SceneTable, Thing, truth
from train import TrainConfig

CHECKPOINT = Path(__file__).parent.parent / "toy" / "tiny-llava"

HEART, SQUARE, STAR = (
    Thing("large", "cyan", "heart"),
    Thing("small", "pink", "square"),
    Thing("small", "red", "star"),
)
COLUMN = Scene("navy", (HEART, None, SQUARE, None))  # the example of the module's docstring
ROW = Scene("gray", (SQUARE, STAR, None, HEART))


def is_true(text, scene):
    return bool(truth(text, SceneTable([scene]))[0])


@pytest.mark.parametrize(
    ("text", "in_column", "in_row"),
    [
        ("A pink square is below a cyan heart.", True, False),
        ("A pink square is above a cyan heart.", False, True),
        ("A cyan square is below a pink heart.", False, False),
        ("There is a heart right of a small square.", False, True),
        ("There is a large square.", False, False),
        ("A heart in the top left.", True, False),
        ("A picture of a heart and a square on a navy background.", True, False),
        ("The picture shows a star, a heart and a square.", False, True),
        ("A square is left of a star, with a heart.", False, True),
        ("A square is left of a star, with a square.", False, False),  # two things need two objects
        (
            "There are two objects on a navy background. "
            "In the top left there is a large cyan heart.",
            True,
            False,
        ),
        ("There are three objects on a navy background.", False, False),
        (
            "The cyan heart is above the pink square. The pink square is above the cyan heart.",
            False,
            False,
        ),
    ],
)
def test_truth_of_scenes_made_by_hand(text, in_column, in_row):
    assert truth(text, SceneTable([COLUMN, ROW])).tolist() == [in_column, in_row]


@pytest.mark.parametrize(
    "text", ["A cat.", "A red ring left of", "", "A heart is above a square on a pink background."]
)
def test_sentences_outside_the_grammar_are_refused(text):
    with pytest.raises(ValueError, match="cannot read"):
        is_true(text, COLUMN)


def test_captions_are_true_and_negatives_false():
    rng, kinds = random.Random(1), set()
    for _ in range(150):
        scene = world.sample_scene(rng, "train")
        caption = world.sample_caption(scene, rng)
        for text in (caption, world.paraphrase(caption, rng), world.long_caption(scene, rng)):
            assert is_true(str(text), scene), (scene, text)
        for kind, negative in world.sample_negatives(caption, scene, rng).items():
            kinds.add(kind)
            assert str(negative) != str(caption) and not is_true(str(negative), scene), (
                scene,
                kind,
                negative,
            )
            if kind == "swap_att":  # the same words, up to "a" and "an"
                words = [
                    sorted(str(c).lower().replace(" an ", " a ").split())
                    for c in (caption, negative)
                ]
                assert words[0] == words[1] or "an" in words[0][:2] or "an" in words[1][:2]
    assert len(kinds) == 7


def test_sentences_are_english():
    assert (
        str(Caption("", (SQUARE, HEART), "below"))
        == "A small pink square is below a large cyan heart."
    )
    arrow = Thing(None, "orange", "arrow")
    assert str(Caption("there is ", (arrow, STAR, HEART), "above", background="gray")) == (
        "There is an orange arrow above a small red star, "
        "with a large cyan heart on a gray background."
    )
    assert (
        str(Caption("", (Thing(None, None, "hourglass"),), place="top left"))
        == "An hourglass in the top left."
    )
    assert (
        str(Caption("", (SQUARE, STAR, HEART)))
        == "A small pink square, a small red star and a large cyan heart."
    )
    assert world.long_caption(COLUMN, random.Random(0)).startswith(
        "There are two objects on a navy background. In the top left there is a large cyan heart. "
        "In the bottom left there is a small pink square. The "
    )


def test_a_picture_shows_its_scene():
    pixels = world.render(COLUMN, random.Random(0)).astype(int)
    assert pixels.shape == (48, 48, 3)
    covered = (pixels != world.BACKGROUNDS["navy"]).any(2)
    assert not covered[:, 24:].any() and covered[:24, :24].any() and covered[24:, :24].any()
    square = np.median(
        pixels[24:, :24][covered[24:, :24]], axis=0
    )  # its edge mixes with the background
    assert np.abs(square - world.COLORS["pink"]).max() <= 15
    assert covered[:24, :24].sum() > 1.5 * covered[24:, :24].sum()  # large against small


def test_every_shape_differs_from_every_other():
    masks = [
        world.shape_mask(shape, size).ravel()
        for size in world.SIZES.values()
        for shape in world.SHAPES
    ]
    for size in range(2):
        same_size = np.stack(masks[16 * size : 16 * size + 16])
        distances = np.abs(same_size[:, None] - same_size[None]).mean(2) + np.eye(16)
        assert distances.min() > 0.1


def test_splits_share_no_set_of_pairs_and_twins_share_the_words():
    rng = random.Random(2)
    sets = {}
    for split in ("train", "val", "test"):
        scenes = [world.sample_scene(rng, split) for _ in range(300)]
        sets[split] = {frozenset(thing[1:] for thing in scene.objects if thing) for scene in scenes}
        assert all(world.split_of(scene.objects) == split for scene in scenes)
    assert not (
        sets["train"] & sets["test"] or sets["train"] & sets["val"] or sets["val"] & sets["test"]
    )
    for _ in range(100):
        scene = world.sample_scene(rng, "train")
        twin = world.sample_twin(scene, rng, "train")
        assert twin != scene and world.split_of(twin.objects) == "train"
        words = [
            sorted(word for thing in s.objects if thing for word in thing) for s in (scene, twin)
        ]
        assert words[0] == words[1]


def test_scenes_of_a_theme_share_their_words():
    rng = random.Random(6)
    themes = {str(theme): theme for theme in (world.sample_theme(rng) for _ in range(1000))}
    assert len(themes) == world.THEMES
    for theme in themes.values():
        assert len(set(theme.colors)) == len(set(theme.shapes)) == 4
        for _ in range(20):
            things = [
                thing for thing in world.sample_scene(rng, "val", theme=theme).objects if thing
            ]
            assert {thing.color for thing in things} <= set(theme.colors)
            assert {thing.shape for thing in things} <= set(theme.shapes)


@pytest.mark.parametrize("file", ["train.jsonl", "val.jsonl", "test.jsonl"])
def test_every_scene_of_the_files_has_a_theme(folder, file):
    rng = random.Random(7)
    themes = [world.sample_theme(rng) for _ in range(1000)]
    words = [set(theme.colors + theme.shapes) for theme in themes]
    for record in read_lines(folder / file):
        said = set(re.findall("[a-z]+", " ".join(record["long"])))
        said &= {*world.COLORS, *world.SHAPES}
        assert any(said <= each for each in words), record


def test_scores_of_captions_written_by_hand():
    true = (
        "There are two objects on a navy background. In the top left there is a large cyan heart. "
    )
    true += "In the bottom left there is a small pink square."
    assert world.score_captions([true], [[true]]) == {"attributes": 100, "objects": 100}
    wrong = true.replace("pink", "red").lower()
    assert world.score_captions([wrong], [[true]]) == {
        "attributes": pytest.approx(500 / 6),
        "objects": 50,
    }
    assert world.score_captions(["nothing at all"], [[true]]) == {"attributes": 0, "objects": 0}
    invented = true + " In the top right there is a small red star."
    assert world.score_captions([invented], [[true]])["objects"] == pytest.approx(200 / 3)
    moved = true.replace("bottom left", "bottom right")
    assert world.score_captions([moved], [[true]])["attributes"] == pytest.approx(300 / 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.build(
        tmp_path_factory.mktemp("toy") / "data", seed=3, train_scenes=40, test_scenes=30
    )


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_records(folder):
    records, groups = read_lines(folder / "train.jsonl"), {}
    assert len(records) == 40
    parts = [record["part"] for record in records]  # one behind the other, and nothing else
    assert [start for start, _ in parts] == [0, *(sum(part) for part in parts[:-1])]
    assert sum(parts[-1]) == (folder / "images/train.bin").stat().st_size
    for record in records:
        picture = open_image(folder / record["image"], record["part"])
        assert picture.size == (48, 48)
        assert len(record["short"]) == 5 and len(record["long"]) == 1
        words = [
            len(text.replace(".", " .").replace(",", " ,").split())
            for text in record["short"] + record["long"]
        ]
        assert (
            max(words[:5]) < 29 and words[5] >= 30
        )  # short and long are told apart by 30 tokens, one is <s>
        groups.setdefault(record.get("group"), []).append(record)
    assert len(groups.pop(None)) == 20 and all(len(pair) == 2 for pair in groups.values())


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_files(folder, split):
    pictures = {path.name for path in (folder / "images" / split).glob("*.png")}
    karpathy = json.loads((folder / split / "karpathy.json").read_text())
    assert {image["filename"] for image in karpathy["images"]} == pictures and len(pictures) == 30
    assert all(image["split"] == image["filepath"] == split for image in karpathy["images"])
    long = {
        record["image"].split("/")[-1]: record["long"][0]
        for record in read_lines(folder / f"{split}.jsonl")
    }
    for image in karpathy["images"]:
        assert len(image["sentences"]) == 5 and image["filename"] in long
    for kind in (
        "replace_obj",
        "replace_att",
        "replace_rel",
        "swap_obj",
        "swap_att",
        "add_obj",
        "add_att",
    ):
        items = json.loads((folder / split / "sugarcrepe" / f"{kind}.json").read_text())
        assert list(items) == [str(i) for i in range(len(items))] and items
        for item in items.values():
            assert item["filename"] in pictures and item["caption"] != item["negative_caption"]
    for kind in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att"):
        items = json.loads((folder / split / "sugarcrepe++" / f"{kind}.json").read_text())
        assert [item["id"] for item in items] == list(range(len(items))) and items
        for item in items:
            assert len({item["caption"], item["caption2"], item["negative_caption"]}) == 3
    examples = read_lines(folder / split / "winoground" / "examples.jsonl")
    assert {example["tag"] for example in examples} == {"color", "size", "place"}
    assert [example["id"] for example in examples] == list(range(len(examples)))
    pairs = {(example["image_0"], example["image_1"]) for example in examples}
    assert len(pairs) == 12 and 12 < len(examples) <= 4 * 12
    assert len({(e["image_0"], e["caption_0"]) for e in examples}) == len(examples)
    for example in examples:
        words = [sorted(example[f"caption_{i}"].lower().split()) for i in range(2)]
        assert words[0] == words[1] and example["caption_0"] != example["caption_1"]
        assert all(
            (folder / split / "winoground" / "images" / f"{example[f'image_{i}']}.png").exists()
            for i in (0, 1)
        )
    for settings in json.loads((folder / split / "tests.json").read_text()).values():
        assert all(
            (folder / split / settings[key]).exists()
            for key in ("file", "images")
            if key in settings
        )


def test_same_seed_same_files_and_no_second_build(folder, tmp_path):
    again = world.build(tmp_path / "data", seed=3, train_scenes=40, test_scenes=30)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    before = (again / "train.jsonl").stat().st_mtime_ns
    world.build(again, seed=3, train_scenes=40, test_scenes=30)
    assert (again / "train.jsonl").stat().st_mtime_ns == before
    world.build(again, seed=4, train_scenes=8, test_scenes=5)
    assert len(read_lines(again / "train.jsonl")) == 8


def test_a_folder_with_something_else_is_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else"):
        world.build(tmp_path, train_scenes=8, test_scenes=5)
    assert (tmp_path / "thesis.txt").exists()


def test_targets_are_the_next_tokens():
    from toy.pretrain import IGNORE, STOP, make_dialogues, make_tokenizer

    tokenizer, rng = make_tokenizer(), random.Random(5)
    assert tokenizer.encode("USER: A red-ring, large.").tokens == [
        "<s>",
        "user:",
        "a",
        "red-ring",
        ",",
        "large",
        ".",
    ]
    for _ in range(20):
        for dialogue in make_dialogues(
            world.sample_scene(rng, "train"), 0, rng, tokenizer, plain=False
        ):
            assert len(dialogue.ids) == len(dialogue.targets) and 0 not in dialogue.ids
            asked = [i for i, target in enumerate(dialogue.targets) if target != IGNORE]
            assert all(dialogue.targets[i] == dialogue.ids[i + 1] for i in asked)
            assert dialogue.targets[asked[-1]] == STOP == dialogue.ids[-1]
            if dialogue.summary:
                position, words = dialogue.summary
                assert tokenizer.id_to_token(dialogue.ids[position]) == "assistant:"
                assert (
                    sum(words.values()) == pytest.approx(1) and dialogue.ids[position + 1] in words
                )


def test_binding_words_tell_a_scene_from_its_twin():
    from toy.pretrain import summarize_caption, summarize_scene

    twin = Scene("navy", world.exchange(COLUMN.objects, 0, 2, "color"))
    assert summarize_scene(COLUMN, plain=True) == summarize_scene(twin, plain=True)
    words = summarize_scene(COLUMN, plain=False)
    assert {"cyan-heart", "large-cyan", "top-heart", "bottom-pink"} < words.keys()
    assert not {"cyan-square", "left-heart", "small-cyan"} & words.keys()
    caption = Caption("", (SQUARE, HEART), "below")
    assert summarize_caption(caption, plain=False).keys() <= words.keys()


needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.exists(), reason="toy/tiny-llava is not there")


@needs_checkpoint
def test_the_checkpoint_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 10_000_000


@needs_checkpoint
def test_the_checkpoint_gives_the_logits_of_transformers():
    transformers = pytest.importorskip("transformers")
    from model import Llava

    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(CHECKPOINT)
    picture = Image.fromarray(world.render(COLUMN, random.Random(0)))
    text = "USER: <image>\nSummarize the provided image in one word: ASSISTANT:"
    inputs = processor(images=picture, text=text, return_tensors="pt")
    model = Llava.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        ours = model.logits(model(inputs["input_ids"], inputs["pixel_values"]))
        assert (ours - reference(**inputs).logits).abs().max() < 1e-4


@needs_checkpoint
def test_the_checkpoint_sees_its_pictures_and_prompts_as_in_pre_training():
    from data import ImageProcessor, TextTokenizer
    from toy.pretrain import DESCRIBE, Dialogue, make_tokenizer, to_pixels

    pixels = world.render(COLUMN, random.Random(0))
    processed = ImageProcessor.from_pretrained(CHECKPOINT)(Image.fromarray(pixels))
    torch.testing.assert_close(processed, to_pixels([pixels])[0], atol=1e-5, rtol=0)
    assert TextTokenizer(CHECKPOINT).encode(DESCRIBE) == Dialogue(make_tokenizer()).encode(DESCRIBE)


@needs_checkpoint
def test_golden_caption():
    from data import TextTokenizer
    from model import Llava
    from toy.pretrain import DESCRIBE, Dialogue, make_tokenizer, to_pixels

    question = Dialogue(make_tokenizer(), 0)
    question.user(DESCRIBE)
    pixels = to_pixels([world.render(COLUMN, random.Random(0))])
    answer = Llava.from_pretrained(CHECKPOINT).generate([question.ids], pixels, max_new_tokens=100)[
        0
    ]
    text = TextTokenizer(CHECKPOINT).decode(answer)
    things = (
        "there are two objects on a navy background. in the top left there is a large cyan heart. "
        "in the bottom left there is a small pink square."
    )
    assert text.startswith(things) and is_true(things, COLUMN)
    # Two sentences of relations follow, which the base has not learned: of the form, if not true.
    assert text.removeprefix(things).count(".") == 2
    is_true(text, COLUMN)  # raises ValueError for what is no sentence of the world


@pytest.mark.parametrize(
    "row", ["no training", "both + AR", "text only (E5-V's recipe)", "CLIP from scratch"]
)
def test_every_kind_of_ablation_row_runs(row, tmp_path, monkeypatch):
    """A few steps on a small world: the columns are there."""
    folder = world.build(tmp_path / "data", train_scenes=24, test_scenes=12)
    monkeypatch.setattr(
        ablation, "TrainConfig", partial(TrainConfig, batch_size=8, steps=2, device="cpu")
    )
    monkeypatch.chdir(tmp_path)
    tests, data = folder / "test" / "tests.json", folder / "train.jsonl"
    result = ablation.run_row(row, 0, tests, data, seconds=0.5, model=str(TOY_MODEL))
    assert {"T2I@1", "swap", "wino group"} <= result["columns"].keys()
