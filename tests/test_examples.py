"""examples/: conversations, search, match, embed, fill; every command on a random checkpoint."""

import importlib
import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import eval as evaluation
from data import open_image
from eval import TOY_MODEL, caption, encode_image, encode_text, load_embedder
from examples import fill
from examples.chat import Conversation
from formats.files import InputError
from formats.pictures import pictures_in
from toy import world

EXAMPLES = ("chat", "search", "match", "embed", "fill")  # the others are evaluation's own commands


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world") / "data", train_scenes=12, test_scenes=20)


@pytest.fixture
def photos(small_world, tmp_path):
    """A folder of pictures as people have them: in subfolders, one twice, one broken, other files
    between them."""
    folder = tmp_path / "photos"
    shutil.copytree(small_world / "images/test", folder / "deep")
    shutil.copy(folder / "deep/000003.png", folder / "again.PNG")
    (folder / "broken.jpg").write_bytes(b"<html>")
    (folder / "notes.txt").write_text("no picture")
    return folder


def run_main(capsys, command, *arguments):
    """`python -m examples.COMMAND ...`, or `python eval.py COMMAND ...` -> what it prints."""
    arguments = [*map(str, arguments), "--device", "cpu"]
    if command in EXAMPLES:
        importlib.import_module(f"examples.{command}").main(arguments)
    else:
        evaluation.main([command, *arguments])
    return capsys.readouterr().out


# ---- Conversations


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
    """Answers are cut to the positions that are left; when there are none, one clear error, and
    nothing is lost."""
    talk = Conversation(
        toy, open_image(small_world / "images/test/000000.png"), max_new_tokens=10**6
    )
    talk.ask("Describe the image in detail.")
    before = list(talk.ids)
    with pytest.raises(InputError, match="positions"):
        talk.ask("red " * toy.model.config.text.max_position_embeddings)
    assert talk.ids == before and talk.ask("What color is the background?")


def test_chat(small_world, capsys, monkeypatch):
    """Questions are read from the terminal until an empty line."""
    monkeypatch.setattr(
        sys,
        "stdin",
        StringIO("Describe the image in detail.\nHow many objects are in the image?\n\n"),
    )
    shown = run_main(capsys, "chat", small_world / "images/test/000000.png", "--max_new_tokens", 20)
    assert "there are" in shown.lower()


# ---- Search, match, embed


def test_search(toy, photos, tmp_path, capsys, monkeypatch):
    """Ranks as the embeddings do, by words or by a picture; tells broken pictures; embeds new
    pictures only."""
    options = [
        "--images",
        photos,
        "--out",
        tmp_path / "found.png",
        "--cache",
        tmp_path / "kept",
        "--top",
        5,
    ]
    shown = run_main(capsys, "search", "a red circle", *options)
    paths = [path for path in pictures_in(photos) if path.name != "broken.jpg"]
    assert len(paths) == 21 and "broken.jpg: not a JPEG" in shown and "of 21 pictures" in shown
    scores = (
        encode_image(toy, [open_image(path) for path in paths])
        @ encode_text(toy, ["a red circle"])[0]
    )
    listed = [
        line.split("  ", 1) for line in shown.splitlines() if line[:1].isdigit() or line[:1] == "-"
    ]
    assert [score for score, _ in listed] == [
        f"{score:.3f}" for score in scores.topk(5).values.tolist()
    ]
    assert listed[0][1] in {
        str(paths[index]) for index in (scores >= scores.max() - 1e-6).nonzero()[:, 0].tolist()
    }
    assert open_image(tmp_path / "found.png").size == (330 + 4 * 204, 2 * 218 + 6)

    counted = []
    monkeypatch.setattr(
        "eval.encode_image",
        lambda embedder, part: counted.append(len(part)) or encode_image(embedder, part),
    )
    shutil.copy(photos / "deep/000007.png", photos / "a copy.png")
    open_image(photos / "deep/000007.png").rotate(90).save(photos / "new.png")
    shown = run_main(capsys, "search", photos / "new.png", *options)
    assert counted == [1] and f"1.000  {photos / 'new.png'}" in shown.splitlines()[1]
    assert "of 23 pictures" in shown
    with pytest.raises(SystemExit, match="no picture in this folder"):
        (tmp_path / "empty").mkdir()
        run_main(
            capsys, "search", "x", "--images", tmp_path / "empty", "--cache", tmp_path / "kept"
        )
    with pytest.raises(SystemExit):
        run_main(capsys, "search", "x")
    assert "required: --images" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nope.png: no such picture"):  # no words to search by
        run_main(capsys, "search", "nope.png", *options)
    with pytest.raises(SystemExit, match="QUERY is empty"):
        run_main(capsys, "search", " ", *options)
    long = "a red circle is above a blue star " * 9  # longer than the name of a file can be
    assert "of 23 pictures" in run_main(capsys, "search", long, *options)


def test_match(toy, small_world, capsys):
    """The best caption first, with the cosine similarities."""
    picture = small_world / "images/test/000000.png"
    record = json.loads((small_world / "test.jsonl").read_text().splitlines()[0])
    captions = ["a photo of nothing", record["short"][0], "snow"]
    shown = run_main(capsys, "match", picture, *captions).splitlines()
    scores = encode_text(toy, captions) @ encode_image(toy, [open_image(picture)])[0]
    wanted = sorted(zip(scores.tolist(), captions), reverse=True)
    assert shown == [f"{score:.3f}  {text}" for score, text in wanted]


def test_embed(toy, small_world, tmp_path, capsys):
    """Folders and pictures into .safetensors with their names, lines of text into .npy, both as
    encode_* gives them."""
    folder, cache = small_world / "images/test", ["--cache", tmp_path / "kept"]
    picture = sorted(folder.glob("*.png"))[2]
    run_main(capsys, "embed", tmp_path / "p.safetensors", folder, picture, *cache)
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        names, vectors = json.loads(file.metadata()["names"]), file.get_tensor("embeddings")
    assert names == [*map(str, sorted(folder.glob("*.png"))), str(picture)]
    torch.testing.assert_close(vectors, encode_image(toy, [open_image(name) for name in names]))
    (tmp_path / "lines.txt").write_text("a red circle\n\na blue star\n")
    run_main(capsys, "embed", tmp_path / "t.npy", "--texts", tmp_path / "lines.txt", *cache)
    lines = torch.from_numpy(np.load(tmp_path / "t.npy", allow_pickle=False))
    torch.testing.assert_close(lines, encode_text(toy, ["a red circle", "", "a blue star"]))
    (tmp_path / "lines.txt").write_text("one\u2028line\x0conly\n", encoding="utf-8")
    assert "1 embeddings" in run_main(
        capsys, "embed", tmp_path / "t.npy", "--texts", tmp_path / "lines.txt", *cache
    )
    for arguments in (
        ["x.csv", picture],
        ["x.npy"],
        ["x.npy", picture, "--texts", tmp_path / "lines.txt"],
    ):
        with pytest.raises(SystemExit, match="OUT ends in .npy or .safetensors"):
            run_main(capsys, "embed", *arguments)


# ---- Filling up training data


def test_fill(toy, small_world, tmp_path, capsys, monkeypatch):
    """Only what lacks a long caption gets one, everything else stays; counted by reason; a torn
    file is continued."""
    lines = [json.loads(line) for line in (small_world / "test.jsonl").read_text().splitlines()[:6]]
    records = [
        record if number == 2 else record | {"long": []} for number, record in enumerate(lines)
    ]
    records[4]["image"] = "missing.png"
    source = tmp_path / "some.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [source, "--images", small_world, "--batch", 2]
    shown = run_main(capsys, "fill", *options)
    assert "4 filled" in shown and "1 had a long caption" in shown and "1 left as it was" in shown
    assert "missing.png: no such image" in shown
    out = tmp_path / "some.filled.jsonl"
    filled = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(filled) == 6 and filled[2]["long"] == lines[2]["long"] and filled[4]["long"] == []
    wanted = caption(toy, [open_image(small_world / lines[0]["image"])])[0]
    assert (
        filled[0]["long"] == [wanted]
        and filled[0]["short"] == lines[0]["short"]
        and filled[0]["long_by"]
    )
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    run_main(capsys, "fill", *options)
    assert out.read_bytes() == whole
    monkeypatch.setattr(fill, "caption", lambda embedder, pictures, *_: ["Yes."] * len(pictures))
    out.unlink()
    assert "4 left as it was: the answer is shorter than 30 tokens" in run_main(
        capsys, "fill", *options
    )
    source.write_text("".join(json.dumps(record) + "\n" for record in records[::-1]))
    with pytest.raises(SystemExit, match="does not begin as"):
        run_main(capsys, "fill", *options)


def test_fill_without_the_pictures_writes_nothing(small_world, tmp_path, capsys):
    """A forgotten --images is told before a file is written that looks done."""
    source = tmp_path / "some.jsonl"
    source.write_text(json.dumps({"image": "images/none.png", "short": ["a star"]}) + "\n")
    with pytest.raises(SystemExit, match="give --images DIR"):
        run_main(capsys, "fill", source)
    assert not (tmp_path / "some.filled.jsonl").read_bytes()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ["sugarcrepe", "{world}/test/sugarcrepe", "--images", "{world}/images/test", "--both"],
            "needs a run of train.py",
        ),
        (["imagenet", "{world}/images", "--template", "a photo"], "has no {}"),
        (["imagenet", "empty"], "no pictures in its"),
        (["sugarcrepe", "{world}/test.jsonl"], "is not a folder"),
        (["embed", "{world}/nowhere/x.npy", "{world}/images"], "there is no folder"),
        (["embed", "x.npy", "{world}/test/sugarcrepe"], "no pictures to embed"),
    ],
)
def test_what_cannot_be_measured_is_told(
    small_world, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty/class").mkdir(parents=True)
    with pytest.raises(SystemExit, match=message):
        run_main(capsys, *(each.replace("{world}", str(small_world)) for each in arguments))


# ---- Everything, on a checkpoint that transformers has written


@pytest.mark.parametrize("vision,text", [("clip", "llama"), ("siglip", "llama")])
def test_every_command_on_a_random_checkpoint(
    make_checkpoint, small_world, tmp_path, capsys, monkeypatch, vision, text
):
    """From files on disk, with other prompts; and nothing is written beside the model."""
    folder, _ = make_checkpoint(
        vision,
        text,
        vision_config={"image_size": 48},
        text_config={"vocab_size": 450},
        image_token_index=3,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(TOY_MODEL / name, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    picture, test = small_world / "images/test/000000.png", small_world / "test"
    source = tmp_path / "train.jsonl"
    source.write_text((small_world / "train.jsonl").read_text())
    arguments = {
        "caption": [picture, "--max_new_tokens", 5],
        "chat": [picture, "--max_new_tokens", 5],
        "search": ["red", "--images", small_world / "images/test", "--out", tmp_path / "found.png"],
        "match": [picture, "red", "blue"],
        "fill": [source, "--images", small_world, "--max_new_tokens", 40],
        "embed": [tmp_path / "x.npy", picture],
        "retrieval": [
            test / "karpathy.json",
            "--images",
            small_world / "images",
            "--captions_per_image",
            2,
        ],
        "sugarcrepe": [test / "sugarcrepe", "--images", small_world / "images/test"],
        "sugarcrepe++": [test / "sugarcrepe++", "--images", small_world / "images/test"],
        "winoground": [test / "winoground/examples.jsonl", "--images", test / "winoground/images"],
        "imagenet": [small_world / "images", "--template", "a {}."],
        "captioning": [test / "karpathy.json", "--images", small_world / "images", "--limit", 2],
    }
    its_own_commands = evaluation.make_parser()._subparsers._group_actions[0].choices
    assert arguments.keys() == {*its_own_commands, *EXAMPLES}
    monkeypatch.chdir(tmp_path)
    for command, its_own in arguments.items():
        monkeypatch.setattr(sys, "stdin", StringIO("What?\n\n"))
        if command not in ("caption", "chat", "captioning", "fill"):
            its_own = [*its_own, "--image_prompt", "What is it?", "--text_prompt", "Say it:"]
        shown = run_main(capsys, command, *its_own, "--model", folder)
        assert shown or command in ("chat", "embed"), command
    assert len((tmp_path / "train.filled.jsonl").read_text().splitlines()) == len(
        source.read_text().splitlines()
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (tmp_path / "runs/embeddings/files.json").exists()


def test_prompts_of_a_model(toy, small_world):
    """Given prompts stand where the paper's would."""
    image = open_image(small_world / "images/test/000000.png")
    other = load_embedder(TOY_MODEL, "cpu", "Name it:", "Name it:")
    ids = toy.layout.image_prefix + toy.layout.prompt("Name it:")
    with torch.no_grad():
        hidden = toy.model(torch.tensor([ids]), toy.pixel_values([image]))[:, -1]
    torch.testing.assert_close(
        encode_image(other, [image]), hidden / hidden.norm(dim=-1, keepdim=True)
    )
    assert not torch.allclose(encode_image(toy, [image]), encode_image(other, [image]))
