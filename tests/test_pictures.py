"""From a bare folder of pictures to a search: examples/describe.py and examples/hold_out.py."""

import json
import shutil

import pytest
from PIL import Image

import eval as evaluation
import train
from data import LONG, CaptionDataset, open_image
from eval import TOY_MODEL, caption
from examples import describe, hold_out, search
from formats.files import InputError
from formats.pictures import pictures_in


@pytest.fixture
def photos(small_world, tmp_path):
    """The toy's own pictures, of which it can tell the truth; a copy, a broken and a hidden one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = sorted((small_world / "images").rglob("*.png"))[:14]
    for number, path in enumerate(paths):
        shutil.copy(path, folder / f"{number:02}.png")
    shutil.copy(folder / "00.png", folder / "a copy.png")
    (folder / "broken.jpg").write_bytes(b"<html>")
    (folder / "._00.png").write_bytes(b"")
    return folder


def run(photos, out, *flags):
    describe.main([str(photos), str(out), "--device", "cpu", *flags])


def records(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_look_at_a_dozen_and_then_the_rest(photos, tmp_path, toy, capsys):
    """Captions are the model's own, by length; copies, broken and hidden files are told."""
    out = tmp_path / "captions.jsonl"
    run(photos, out)
    shown = capsys.readouterr().out
    assert len(records(out)) == 12 and "--all describes the rest" in shown
    width, height = Image.open(tmp_path / "captions.look.png").size
    assert height > 12 * 192
    assert "1 copies of other pictures" in shown and "1 hidden copies" in shown

    first = out.read_text()
    run(photos, out, "--all")
    shown = capsys.readouterr().out
    assert out.read_text().startswith(first) and len(records(out)) == 14
    assert "a web page" in shown and "broken.jpg" in shown
    for record in records(out):
        image = open_image(photos / record["image"])
        assert record["by"] == TOY_MODEL.name
        assert record["long"] == caption(toy, [image])
        (greedy,) = caption(toy, [image], describe.BRIEFLY)
        assert (greedy in record["short"]) == (len(toy.tokenizer.encode(greedy)) < LONG)
        for text in record["short"]:
            assert len(toy.tokenizer.encode(text)) < LONG
    # Training takes every line as it stands.
    dataset = CaptionDataset(out, toy.layout, toy.processor, photos)
    assert len(dataset) == 14 and not dataset.faults


def test_interrupted_it_goes_on(photos, tmp_path, monkeypatch):
    """A torn line is written again; the file is that of the undisturbed run."""
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    run(photos, whole, "--batch", "2", "--max_new_tokens", "40")
    calls = iter(range(100))

    def stop(*arguments):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return caption(*arguments)

    monkeypatch.setattr(describe, "caption", stop)
    with pytest.raises(SystemExit):
        run(photos, torn, "--batch", "2", "--max_new_tokens", "40")
    assert 0 < len(records(torn)) < 12
    with open(torn, "a") as file:
        file.write('{"image": "half')
    monkeypatch.setattr(describe, "caption", caption)
    run(photos, torn, "--batch", "2", "--max_new_tokens", "40")
    assert torn.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("line", ['{"image": "a.jpg", "short": ["x"]}', "[1]", "no JSON"])
def test_other_files_are_not_written_into(photos, tmp_path, line):
    out = tmp_path / "mine.jsonl"
    out.write_text(line + "\n")
    with pytest.raises(SystemExit, match="line 1 is not one that tiny-llava wrote"):
        run(photos, out)
    assert out.read_text() == line + "\n"


def test_a_picture_that_was_replaced_is_told(photos, tmp_path):
    """Its caption would be another picture's."""
    out = tmp_path / "captions.jsonl"
    run(photos, out, "--max_new_tokens", "40")
    shutil.copy(photos / "01.png", photos / "00.png")
    (photos / "a copy.png").unlink()
    (photos / "01.png").unlink()
    with pytest.raises(SystemExit, match="line 1: 00.png is another picture now"):
        run(photos, out)


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(SystemExit, match="no picture"):
        run(tmp_path, tmp_path / "out.jsonl")


def lines_of(number, **fields):
    return [{"image": f"{n}.png", "short": [f"a {n}"], "long": [], **fields} for n in range(number)]


def split(tmp_path, toy, lines, every=10):
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = CaptionDataset(path, toy.layout, None, tmp_path)
    return dataset, *hold_out.hold_out(dataset, every)


def test_a_tenth_is_held_out_by_name(tmp_path, toy):
    """Each record on one side, the same ones whatever the order of the lines."""
    lines = lines_of(40)
    dataset, training, testing = split(tmp_path, toy, lines)
    assert sorted(training + testing) == list(range(40)) and len(testing) == 4
    names = {dataset.record(index)["image"] for index in testing}
    dataset, _, testing = split(tmp_path, toy, lines[::-1])
    assert {dataset.record(index)["image"] for index in testing} == names


def test_groups_are_held_out_together(tmp_path, toy):
    lines = lines_of(40)
    for number, line in enumerate(lines):
        line["group"] = number // 8
    dataset, training, testing = split(tmp_path, toy, lines)
    groups = [{dataset.record(index)["group"] for index in side} for side in (training, testing)]
    assert not groups[0] & groups[1] and len(testing) == 8
    with pytest.raises(InputError, match="too few"):
        split(tmp_path, toy, lines_of(2))
    with pytest.raises(InputError, match="shards"):
        split(tmp_path, toy, lines_of(20, part=[0, 9]))


def test_the_whole_road(photos, tmp_path, monkeypatch, capsys):
    """Describe, hold out, train with tables before and after, evaluate, search."""
    monkeypatch.chdir(tmp_path)
    # "Describe the image briefly." is answered at length by the toy.
    question = "Summarize the provided image in one word: What is in the picture?"
    asked = ["--short_question", question, "--max_new_tokens", "80"]
    run(photos, tmp_path / "captions.jsonl", "--all", *asked)
    hold_out.main(["captions.jsonl", "--images", "photos"])
    shown = capsys.readouterr().out
    assert "12 pictures to train on, 2 held out" in shown
    held = {item["image"] for item in json.loads((tmp_path / "captions.test.json").read_text())}
    trained = {record["image"] for record in records(tmp_path / "captions.train.jsonl")}
    assert len(held | trained) == 14 and not held & trained

    data = ["--data", "captions.train.jsonl", "--image_root", "photos"]
    tests = ["--tests", "captions.tests.json", "--out", "runs/mine"]
    train.main([*data, *tests, "--steps", "2", "--batch_size", "6", "--device", "cpu"])
    assert "difference" in capsys.readouterr().out
    assert (tmp_path / "runs/mine/retrieval.png").exists()
    model = ["--model", "runs/mine", "--device", "cpu"]
    evaluation.main(["retrieval", "captions.test.json", "--images", "photos", *model, "--both"])
    assert "difference" in capsys.readouterr().out
    search.main(["a red circle", "--images", "photos", *model, "--top", "3"])
    assert "the best 3 of 15 pictures" in capsys.readouterr().out


def test_real_photographs_from_a_package(tmp_path, capsys):
    """Those that scikit-image ships, where it is installed: read, described, found."""
    package = pytest.importorskip("skimage")
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in pictures_in(f"{package.__path__[0]}/data")[:4]:
        shutil.copy(path, folder)
    run(folder, tmp_path / "captions.jsonl")
    assert len(records(tmp_path / "captions.jsonl")) == 4
    search.main(
        ["a white ring", "--images", str(folder), "--device", "cpu", "--cache", str(tmp_path)]
        + ["--out", str(tmp_path / "found.png")]
    )
    assert "of 4 pictures" in capsys.readouterr().out
