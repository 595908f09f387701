"""Files as people have them: for each kind of fault that was reported, several members of the kind.

What is asserted is the right value, or that the loss is counted or refused with its place. The
shown cases themselves are run by test_cases.py, where they are at hand.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, edit_json
from PIL import Image, PngImagePlugin
from test_captions import add, converted, picture, write

import eval as evaluation
import train
from data import CaptionDataset, open_image, parse_record
from eval import TOY_MODEL, cider_d, load_embedder, read_folder
from formats import peft
from formats.files import InputError, LeftOut, inside, read_json, read_text
from formats.pictures import list_pictures, pictures_in
from formats.records import clean
from formats.testsets import read_imagenet, read_retrieval, read_sugarcrepe, read_winoground
from runtime.embeddings import KeptEmbeddings

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def images(tmp_path):
    """A folder of pictures: a.jpg, deep/b.jpg, 000000000009.jpg."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.jpg", "000000000009.jpg"):
        (folder / name).write_bytes(picture())
    return folder


# ---- Ids without a row in the embedding


@pytest.fixture
def model_folder(tmp_path):
    """The small files of the toy, to be changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        shutil.copy(TOY_MODEL / name, folder)
    return folder


def test_an_added_token_behind_the_embedding_is_refused(model_folder):
    content = json.loads((model_folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 450, "content": "<new>"})
    (model_folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="'<new>' has id 450.*450 rows"):
        read_folder(model_folder)


def test_a_word_behind_the_embedding_is_refused(model_folder):
    content = json.loads((model_folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra"] = 777
    (model_folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="'zebra' has id 777.*450 rows"):
        read_folder(model_folder)


def test_a_smaller_embedding_than_the_tokenizers_is_refused(model_folder):
    edit_json(model_folder / "config.json", {"text_config.vocab_size": 400})
    with pytest.raises(InputError, match="has id .* 400 rows"):
        read_folder(model_folder)


# ---- Classes: the order of folders, and lists with ids


def class_folders(root, names):
    for name in names:
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / f"{name}.png").write_bytes(b"")
    return root / "val"


def classes_by_folder(root, names=None):
    pictures, classes = read_imagenet(root, names)
    return {path.parent.name: classes[number] for path, number in pictures}


@pytest.mark.parametrize("folders", [["0", "1", "2", "10"], ["1", "2", "3", "11"]])
def test_folders_that_are_numbers_are_counted_as_such(tmp_path, folders):
    root = class_folders(tmp_path, folders)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    assert classes_by_folder(root, tmp_path / "names.txt") == dict(zip(folders, "abcd"))
    (tmp_path / "names.json").write_text('["a", "b", "c", "d"]')
    assert classes_by_folder(root, tmp_path / "names.json") == dict(zip(folders, "abcd"))


@pytest.mark.parametrize("folders", [["class_2", "class_10"], ["apple", "Zebra"]])
def test_a_plain_list_is_refused_where_the_order_is_not_clear(tmp_path, folders):
    root = class_folders(tmp_path, folders)
    (tmp_path / "names.txt").write_text("one\nother\n")
    with pytest.raises(InputError, match="different orders"):
        read_imagenet(root, tmp_path / "names.txt")
    # The folders' own names may come in any order, and so may names with their folders.
    (tmp_path / "names.txt").write_text("\n".join(folders))
    assert list(classes_by_folder(root, tmp_path / "names.txt")) == sorted(folders)
    for folder, name in classes_by_folder(root, tmp_path / "names.txt").items():
        assert name == folder
    (tmp_path / "names.txt").write_text(f"{folders[0]} one\n{folders[1]}\tother".replace("\t", " "))
    assert classes_by_folder(root, tmp_path / "names.txt") == dict(zip(folders, ["one", "other"]))


WNIDS = ["n01440764", "n01443537", "n01484850"]
FISH = ["tench", "goldfish", "great white shark"]
LISTS = {
    "mapping.txt": "{0} tench, Tinca tinca\n{1} goldfish, Carassius\n{2} great white shark, shark",
    "tabs.tsv": "{0}\ttench\n{1}\tgoldfish\n{2}\tgreat_white_shark",
    "commas.csv": "{2},great white shark\n{0},tench\n{1},goldfish",
    "devkit.txt": "{0} 1 tench\n{1} 2 goldfish\n{2} 3 great_white_shark",
    "behind.txt": "tench {0}\ngoldfish {1}\ngreat white shark {2}",
    "more.txt": "{0} tench\nn09999999 not here\n{1} goldfish\n{2} great white shark",
    "numbers.txt": "0: tench\n1: goldfish\n2: great white shark",
    "numbers_behind.csv": "tench,0\ngoldfish,1\ngreat white shark,2",
    "pythons.txt": "{{0: 'tench',\n 1: 'goldfish',\n 2: 'great white shark'}}",
    "from_one.txt": "2\tgoldfish\n1\ttench\n3\tgreat white shark",
    "mark.txt": "\ufefftench\r\ngoldfish\r\ngreat white shark\r\n",
    "synonyms.json": '{{"{0}": ["tench", "x"], "{2}": ["great white shark"], "{1}": ["goldfish"]}}',
    "numbers.json": '{{"1": "goldfish", "0": "tench", "2": "great_white_shark"}}',
    "index.json": '{{"0": ["{0}", "tench"], "1": ["{1}", "goldfish"], '
    '"2": ["{2}", "great_white_shark"]}}',
}


@pytest.mark.parametrize("name", LISTS)
def test_class_lists_with_ids_in_front(tmp_path, name):
    root = class_folders(tmp_path, WNIDS)
    (tmp_path / name).write_text(LISTS[name].format(*WNIDS), encoding="utf-8")
    assert classes_by_folder(root, tmp_path / name) == dict(zip(WNIDS, FISH))


@pytest.mark.parametrize(
    "text",
    [
        "n01440764 tench\ngoldfish\nshark",  # some have an id
        "n09999999 tench\nn09999998 goldfish\nn09999997 shark",  # ids of others
        "0: tench\n7: goldfish\n8: shark",  # numbers with gaps
    ],
)
def test_ids_never_stand_in_prompts(tmp_path, text):
    root = class_folders(tmp_path, WNIDS)
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(InputError, match="names.txt: line .* begins with an id"):
        read_imagenet(root, tmp_path / "names.txt")


# ---- Tables


TABLES = {
    "three of one name": (
        "image,caption,caption,caption\na.jpg,one,two,three\n",
        ["one", "two", "three"],
    ),
    "pandas' names": ("image,caption,caption.1\na.jpg,one,two\n", ["one", "two"]),
    "ids beside": ("caption_id,caption_lang,image,caption\n17,en,a.jpg,one\n", ["one"]),
    "model and score": ("image,caption_score,caption,caption_model\na.jpg,0.3,one,blip\n", ["one"]),
    "empty cells behind": ("image,caption,,\na.jpg,one,,,,\n", ["one"]),
    "capitals and spaces": ("Image , Caption\na.jpg, one\n", ["one"]),
    "semicolons": ('image;caption\na.jpg;"one, two"\n', ["one, two"]),
    "pipes": ("image_name| comment_number| comment\na.jpg| 0| one\n", ["one"]),
    "tabs in .csv": ("filepath\ttitle\na.jpg\tone, two\n", ["one, two"]),
    "lists in cells": ("image,caption\na.jpg,\"['one' 'two, three']\"\n", ["one", "two, three"]),
    "bare returns": ("image,caption\ra.jpg,one\r", ["one"]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_all_captions_of_a_table(tmp_path, images, kind):
    text, captions = TABLES[kind]
    (tmp_path / "t.csv").write_text(text, newline="")
    records, _ = converted(tmp_path / "t.csv", tmp_path, images)
    assert records == [{"image": "a.jpg", "captions": captions}]


def test_columns_that_are_not_read_are_told(tmp_path, images):
    source = write(tmp_path, "t.csv", "image,caption_id,caption\na.jpg,17,one\n")
    _, counts = converted(source, tmp_path, images)
    assert "caption_id" in "".join(counts.lines())


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("t.csv", "image,caption\na.jpg,red\na.jpg,a cat, a dog\n", "line 3: 3 cells for 2"),
        ("t.tsv", "image\tcaption\na.jpg\ta cat\ta dog\n", "line 2: 3 cells for 2"),
        ("t.csv", "image,image,caption\na.jpg,b.jpg,c\n", "two columns are named image"),
        # Quotes that swallow rows.
        ("t.tsv", 'image\tcaption\na.jpg\t"Stop\nb\tplain\nc\tthe end"\n', "line 2.*whole rows"),
        ("t.tsv", 'caption\timage\n"Stop\ta.jpg\nthe end"\ta.jpg\n', "line 2.*whole rows"),
        ("t.csv", 'image,caption\na.jpg,"Stop\nb.jpg,the end"\n', "line 2.*whole rows"),
        ("t.tsv", 'image\tcaption\na.jpg\t"Cheese" they say\n', "after line 1.*quotes"),
    ],
)
def test_tables_that_are_refused_with_the_line(tmp_path, images, name, text, message):
    with pytest.raises(InputError, match=message):
        converted(write(tmp_path, name, text), tmp_path, images)


def test_quotes_that_are_meant(tmp_path, images):
    """Line breaks, commas and doubled quotes inside of quotes; inches inside of a caption."""
    text = 'image,caption\na.jpg,"a cat,\nand a dog, a ""big"" one"\ndeep/b.jpg,a 5" pipe\n'
    records, _ = converted(write(tmp_path, "t.csv", text), tmp_path, images)
    assert [record["captions"] for record in records] == [
        ['a cat,\nand a dog, a "big" one'],
        ['a 5" pipe'],
    ]


# ---- Shards


def shards_of(tmp_path, members, name="00000.tar", mode="w"):
    folder = tmp_path / "shards"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, mode) as tar:
        for member, content in members.items():
            add(tar, member, content)
    return folder


def captions_in(folder, tmp_path):
    records, counts = converted(folder, tmp_path, folder)
    return [record["captions"] for record in records], counts


NAMED_PARTS = {
    "WebDataset's parts": ["s0.input.jpg", "s0.outputs.txt", "s1.input.jpg", "s1.outputs.txt"],
    "dots in the names": ["p.2019.jpg", "p.2019.txt", "p.2020.jpg", "p.2020.txt"],
    "a folder in front of some": ["./0.jpg", "0.txt", "1.jpg", "./1.txt"],
    "texts first": ["0.txt", "1.txt", "1.jpg", "0.jpg"],
    "other endings": ["0.jfif", "0.caption", "1.JPE", "1.txt"],
    "folders": ["a.b/0.jpg", "a.b/0.txt", "a.c/0.jpg", "a.c/0.txt"],
    "metadata beside": ["0.jpg", "0.json", "1.jpg", "1.text.json"],
}


@pytest.mark.parametrize("kind", NAMED_PARTS)
def test_no_sample_of_a_shard_is_lost(tmp_path, kind):
    members = {}
    for name in NAMED_PARTS[kind]:
        # The words say to whom they belong.
        stem = name.removeprefix("./").rpartition(".")[0]
        words = f"of {stem.replace('.outputs', '.input').replace('.text', '')}"
        if name.endswith(".json"):
            members[name] = json.dumps({"caption": words}).encode()
        else:
            members[name] = words.encode() if name.endswith((".txt", ".caption")) else picture()
    captions, counts = captions_in(shards_of(tmp_path, members), tmp_path)
    assert len(captions) == 2 and counts == {"written": 2}
    names = [name for name in members if members[name] == picture()]
    names = [name.removeprefix("./").rpartition(".")[0] for name in names]
    assert captions == [[f"of {name}"] for name in names]


def test_each_unused_member_of_a_shard_is_counted(tmp_path):
    members = {
        **{"0.jpg": picture(), "0.txt": b"zero", "0.json": b'{"url": "http://example.com"}'},
        **{"1.jpg": picture(), "1.png": picture(), "1.txt": b"of which?"},
        **{"2.tif": picture(), "2.txt": b"of a tif", "3.npy": b"", "noending": b""},
        **{"._0.jpg": b"", "__MACOSX/0.jpg": b"", "4.jpg": picture(), "4.txt": b"a child\x92s"},
        **{"5.a.jpg": picture(), "5.b.jpg": picture(), "5.c.txt": b"of which?"},
    }
    captions, counts = captions_in(shards_of(tmp_path, members), tmp_path)
    assert captions == [["zero"]]
    assert counts == {
        "written": 1,  # and its two texts: 3 members
        "members that are several pictures of one name": 2,
        "captions without a picture": 3,
        "members ending in .tif, which are not read": 1,
        "members ending in .npy, which are not read": 1,
        "members without an ending, which are not read": 1,
        "members that are hidden copies": 2,
        "members that are texts and not UTF-8, perhaps Windows' cp1252": 1,
        "no caption": 3,
    }
    assert counts.total() + 2 == len(members)


@pytest.mark.parametrize("name,mode", [("0.tar", "w:gz"), ("0.tar", "w:xz"), ("0.tgz", "w:gz")])
def test_compressed_shards_are_called_so(tmp_path, name, mode):
    folder = shards_of(tmp_path, {"0.jpg": picture(), "0.txt": b"zero"}, name, mode)
    with pytest.raises(InputError, match="1 compressed shards"):
        captions_in(folder, tmp_path)


def test_nested_shards_are_read_where_they_stand(tmp_path):
    for name in ("part0/00000.tar", "part1/deep/00000.tar", "9.tar"):
        folder = shards_of(tmp_path, {"0.jpg": picture(), "0.txt": name.encode()}, name)
    (folder / "loose.jpg").write_bytes(picture())
    records, counts = converted(folder, tmp_path, folder)
    assert [record["image"] for record in records] == [
        "9.tar",
        "part0/00000.tar",
        "part1/deep/00000.tar",
    ]
    assert [record["captions"] for record in records] == [[record["image"]] for record in records]
    assert counts["pictures beside the shards, which are not read"] == 1


# ---- Placeholders, and lists as text


@pytest.mark.parametrize(
    "word", ["nan", "NaN", " None ", "null", "N/A", "<NA>", "[]", float("nan")]
)
def test_placeholders_are_no_captions(tmp_path, images, word):
    items = [{"image": "a.jpg", "caption": word}, {"image": "deep/b.jpg", "caption": ["x", word]}]
    source = write(tmp_path, "list.json", items)
    records, counts = converted(source, tmp_path, images)
    assert records == [{"image": "deep/b.jpg", "captions": ["x"]}]
    assert counts["no caption but a placeholder, such as nan or None"] == 1
    assert counts["captions that are placeholders, such as nan or None"] == 1
    if isinstance(word, str):
        with pytest.raises(InputError, match="placeholder"):
            parse_record(json.dumps({"image": "a.jpg", "short": [word]}).encode())


@pytest.mark.parametrize(
    "text,captions",
    [
        ("['one', 'two']", ["one", "two"]),
        ("['one' 'two']", ["one", "two"]),  # NumPy's
        ('["it\'s one", "two"]', ["it's one", "two"]),
        ("('one',\n 'two')", ["one", "two"]),
        ("[nan, 'one']", ["one"]),
        ("[a sign] on a wall", ["[a sign] on a wall"]),
        ("none of them", ["none of them"]),
    ],
)
def test_a_list_as_text_is_several(text, captions):
    assert clean([text]).captions == captions


# ---- Byte order marks


def test_marks_are_dropped_everywhere(tmp_path, images, model_folder):
    """Texts beside pictures, tables, JSON, lines, test sets, a model's own files."""
    (images / "a.txt").write_bytes(BOM + b"a red square\r\nsecond line\r\n")
    records, _ = converted(images, tmp_path, images)
    assert records[0]["captions"] == ["a red square", "second line"]
    items = [{"image": "a.jpg", "caption": "one"}]
    for name, text in (
        ("list.json", json.dumps(items)),
        ("lines.jsonl", json.dumps(items[0])),
        ("t.csv", "image,caption\na.jpg,one\n"),
    ):
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            (tmp_path / name).write_text(text, encoding=encoding)
            records, _ = converted(tmp_path / name, tmp_path, images)
            assert records == [{"image": "a.jpg", "captions": ["one"]}], (name, encoding)
    (tmp_path / "test.json").write_bytes(BOM + json.dumps(items).encode())
    assert read_retrieval(tmp_path / "test.json", images)[0][1] == ["one"]
    for path in model_folder.iterdir():
        path.write_bytes(BOM + path.read_bytes())
    read_folder(model_folder)
    assert shards_with_a_mark(tmp_path) == [["a red square"]]


def test_texts_by_other_names(tmp_path, images):
    """0.TXT, photo.jpg.txt, and a mark in the middle of files that were put together."""
    (images / "a.TXT").write_text("one")
    (images / "deep" / "b.jpg.txt").write_text("two\n\ufeffthree\n", encoding="utf-8")
    (images / "alone.txt").write_text("four")
    records, counts = converted(images, tmp_path, images)
    assert [record["captions"] for record in records] == [["one"], ["two", "three"]]
    assert counts == {"written": 2, "no caption": 1, "texts without a picture of that name": 1}


def shards_with_a_mark(tmp_path):
    folder = shards_of(tmp_path, {"0.jpg": picture(), "0.txt": BOM + b"a red square"})
    return captions_in(folder, tmp_path)[0]


def test_a_mark_does_not_move_the_embedding(tmp_path):
    from examples.embed import read_lines

    (tmp_path / "lines.txt").write_bytes(BOM + b"a red circle\r\na blue circle\r\n")
    (tmp_path / "plain.txt").write_bytes(b"a red circle\na blue circle\n")
    assert read_lines(tmp_path / "lines.txt") == read_lines(tmp_path / "plain.txt")


# ---- Hidden copies


@pytest.mark.parametrize(
    "copy",
    [
        ".ipynb_checkpoints/a-checkpoint.jpg",
        "._a.jpg",
        "__MACOSX/a.jpg",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
        ".thumbnails/large/a.png",
        "deep/#recycle/a.jpg",
        "@__thumb/a.jpg",
    ],
)
def test_hidden_copies_are_no_pictures(tmp_path, images, copy):
    (images / copy).parent.mkdir(parents=True, exist_ok=True)
    (images / copy).write_bytes(picture())
    (images / copy).with_suffix(".txt").write_text("an old caption")
    left_out = LeftOut()
    assert len(pictures_in(images, left_out)) == 3
    assert left_out == {"hidden copies of pictures": 1}
    # Nor are they classes, or pictures of one.
    assert copy not in str(read_imagenet(images.parent)[0])
    root = class_folders(tmp_path, ["one", ".ipynb_checkpoints", "__MACOSX", "@eaDir"])
    left_out = LeftOut()
    assert read_imagenet(root, left_out=left_out)[1] == ["one"]
    assert left_out["hidden folders that are no classes"] == 3


# ---- Blank and null captions, annotations of pictures that are not listed


def test_blank_captions_of_test_sets_are_counted(tmp_path):
    notes = [(0, "a"), (1, " "), (1, "b"), (2, None), (7, "c"), ("1", "d"), (0, "NaN")]
    coco = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(3)],
        "annotations": [{"image_id": number, "caption": text} for number, text in notes],
    }
    path = write(tmp_path, "coco.json", coco)
    left_out = LeftOut()
    items = read_retrieval(path, tmp_path, left_out=left_out)
    assert [captions for _, captions in items] == [["a"], ["b", "d"], []]
    assert left_out == {
        "captions that are blank or null": 2,
        "captions that are placeholders, such as nan or None": 1,
        "captions of a picture that is not listed": 1,
    }
    assert sum(len(captions) for _, captions in items) + left_out.total() == len(notes)
    assert left_out.first["captions of a picture that is not listed"] == "image_id 7"

    blip = [{"image": "0.png", "caption": ["a", ""]}, {"image": "1.png", "caption": [["b"], None]}]
    left_out = LeftOut()
    items = read_retrieval(write(tmp_path, "blip.json", blip), tmp_path, left_out=left_out)
    assert [captions for _, captions in items] == [["a"], ["b"]] and left_out.total() == 2

    sugar = {"0": {"filename": "0.png", "caption": "a", "negative_caption": "b"}}
    sugar["3"] = {"filename": "0.png", "caption": "a", "negative_caption": None}
    left_out = LeftOut()
    path = write(tmp_path, "sugar.json", sugar)
    keys = ("caption", "negative_caption")
    assert len(read_sugarcrepe(path, tmp_path, keys, left_out)) == 1 and left_out.total() == 1


def test_blank_captions_of_training_files_are_counted(tmp_path, images):
    karpathy = [
        {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a"}, {"raw": None}]},
        {"filename": "b.jpg", "filepath": "deep", "split": "train", "sentences": [{"raw": " "}]},
    ]
    source = write(tmp_path, "karpathy.json", {"images": karpathy})
    records, counts = converted(source, tmp_path, images)
    assert records == [{"image": "a.jpg", "captions": ["a"]}]
    assert counts == {"written": 1, "captions that are blank or null": 1, "no caption": 1}
    assert counts.first["no caption"] == "deep/b.jpg"
    narratives = [{"dataset_id": "x", "image_id": "a", "caption": text} for text in ("fine", None)]
    source = write(tmp_path, "ln.jsonl", "\n".join(map(json.dumps, narratives)))
    records, counts = converted(source, tmp_path, images)
    assert records == [{"image": "a.jpg", "captions": ["fine"]}] and counts["no caption"] == 1


# ---- Lists and lines of other people


LINES = {
    "BLIP's": {"image": "a.jpg", "caption": ["one"]},
    "metadata.jsonl": {"file_name": "a.jpg", "text": "one"},
    "DOCCI's": {"split": "train", "image_file": "a.jpg", "description": "one"},
    "ours": {"image": "a.jpg", "short": ["one"]},
    "a string": {"image": "a.jpg", "captions": "one"},
    "a list of one picture": {
        "image": ["a.jpg"],
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "one"}],
    },
    "roles": {
        "images": ["a.jpg"],
        "messages": [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": "<image>?"},
            {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
        ],
    },
}


@pytest.mark.parametrize("kind", LINES)
def test_items_of_lists_and_lines(tmp_path, images, kind):
    """As a list, as lines, as lines that are called .json, and as a list that is called .jsonl."""
    item = LINES[kind]
    lines = json.dumps(item) + "\n" + json.dumps(item) + "\n"
    for name, text in (
        ("list.json", json.dumps([item, item], indent=1)),
        ("lines.jsonl", lines),
        ("lines.json", lines),
        ("list.jsonl", json.dumps([item, item])),
    ):
        records, counts = converted(write(tmp_path, name, text), tmp_path, images)
        assert records == [{"image": "a.jpg", "captions": ["one"]}], name
        assert counts["joined to an earlier line of the same picture"] == 1, name


def test_splits_for_tests_stay_out(tmp_path, images):
    items = [{"image": "a.jpg", "caption": "one", "split": split} for split in ("test", "val")]
    items.append({"image": "a.jpg", "caption": "two", "split": "train"})
    records, counts = converted(write(tmp_path, "list.json", items), tmp_path, images)
    assert records[0]["captions"] == ["two"] and counts["of a split for tests"] == 2


def test_our_own_lines_keep_their_groups_and_parts(tmp_path, images):
    lines = [
        {"image": "a.jpg", "short": ["one"], "group": 7},
        {"image": "deep/b.jpg", "short": ["two"], "part": [0, 9]},
    ]
    source = write(tmp_path, "ours.jsonl", "\n".join(map(json.dumps, lines)))
    records, _ = converted(source, tmp_path, images)
    assert {"image": "a.jpg", "captions": ["one"], "group": 7} in records
    assert {"image": "deep/b.jpg", "captions": ["two"], "part": [0, 9]} in records


# ---- Messages


@pytest.mark.parametrize("content", [b"a child\x92s square", b"caf\xe9", b"\xff\xd8\xff"])
def test_text_in_another_encoding(tmp_path, images, content):
    (tmp_path / "x.txt").write_bytes(b"fine\n" + content)
    with pytest.raises(InputError, match="x.txt, line 2: not UTF-8, perhaps Windows' cp1252"):
        read_text(tmp_path / "x.txt")
    (tmp_path / "t.csv").write_bytes(b"image,caption\na.jpg," + content)
    with pytest.raises(InputError, match="t.csv, line 2: not UTF-8"):
        converted(tmp_path / "t.csv", tmp_path, images)
    (images / "a.txt").write_bytes(content)
    (images / "deep" / "b.txt").write_text("fine")
    _, counts = converted(images, tmp_path, images)
    assert any("cp1252" in reason for reason in counts)


def test_git_lfs_pointers_are_called_so(tmp_path, images):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 26\n"
    for name in ("x.json", "x.jsonl", "x.csv"):
        with pytest.raises(InputError, match="Git LFS pointer"):
            converted(write(tmp_path, name, pointer), tmp_path, images)
    (tmp_path / "x.jpg").write_text(pointer)
    with pytest.raises(InputError, match="Git LFS pointer"):
        open_image(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="Git LFS pointer"):
        read_json(tmp_path / "x.json")


def png_with(**texts):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (30, 30)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("content", [png_with(a="x" * 2**21), png_with(parameters="y" * 3 * 2**20)])
def test_large_metadata_are_no_damage(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match="metadata.*save it again") as error:
        open_image(tmp_path / "x.png")
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize(
    "head,kind",
    [
        (b"II*\0", "a TIFF; save it as JPEG"),
        (b"\0\0\0\x20ftypavif", "an AVIF"),
        (b"\0\0\0\x18ftypheic", "a HEIC"),
        (b"<svg>", "an SVG"),
        (b"", "empty"),
    ],
)
def test_pictures_of_other_kinds_are_called_so(tmp_path, head, kind):
    (tmp_path / "x.jpg").write_bytes(head + bytes(64 if head else 0))
    with pytest.raises(InputError, match=kind):
        open_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("name", ["sub\\0.jpg", ".\\sub\\0.jpg", "sub\\deep\\..\\0.jpg"])
def test_paths_with_backslashes(tmp_path, name):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "0.jpg").write_bytes(picture())
    assert inside(tmp_path, name).samefile(tmp_path / "sub" / "0.jpg")
    with pytest.raises(InputError):
        assert not inside(tmp_path, "..\\" + name).is_file()
        raise InputError("not found, as it should be")


def test_what_is_written_has_slashes(tmp_path, images):
    lines = [{"image": "deep\\b.jpg", "caption": "x"}, {"image": "deep/b.jpg", "caption": "y"}]
    source = write(tmp_path, "list.json", lines)
    records, _ = converted(source, tmp_path, images)
    assert records == [{"image": "deep/b.jpg", "captions": ["x", "y"]}]


@pytest.mark.parametrize(
    "on_disk,in_file", [("cafe\u0301.jpg", "caf\u00e9.jpg"), ("\u00e9.jpg", "e\u0301.jpg")]
)
def test_accents_of_a_mac(tmp_path, on_disk, in_file):
    (tmp_path / on_disk).write_bytes(picture())
    source = write(tmp_path, "list.json", [{"image": in_file, "caption": "x"}])
    records, _ = converted(source, tmp_path, tmp_path)
    assert inside(tmp_path, in_file).is_file() and len(records) == 1


def test_a_linked_folder_can_be_allowed(tmp_path, monkeypatch):
    """Named in a file, and found in a folder; refused or counted, with what to say, until then."""
    storage, root = tmp_path / "storage" / "coco", tmp_path / "data"
    storage.mkdir(parents=True)
    root.mkdir()
    (storage / "9.jpg").write_bytes(picture())
    (storage / "9.txt").write_text("a red circle")
    (storage / "loop").symlink_to(storage)
    (root / "coco").symlink_to(storage)
    with pytest.raises(InputError, match="through a link to .*NANOVLADVA_ROOTS="):
        inside(root, "coco/9.jpg")
    with pytest.raises(InputError, match="linked folders that lie elsewhere; NANOVLADVA_ROOTS"):
        converted(root, tmp_path, root)
    source = write(tmp_path, "list.json", [{"image": "coco/9.jpg", "caption": "x"}])
    with pytest.raises(InputError, match="through a link; NANOVLADVA_ROOTS"):
        converted(source, tmp_path, root)

    monkeypatch.setenv("NANOVLADVA_ROOTS", f"/nowhere{os.pathsep}{tmp_path / 'storage'}")
    assert inside(root, "coco/9.jpg") == storage / "9.jpg"
    records, _ = converted(root, tmp_path, root)
    assert records == [{"image": "coco/9.jpg", "captions": ["a red circle"]}]
    (tmp_path / "secret.jpg").write_bytes(picture())
    with pytest.raises(InputError, match="lies outside"):
        inside(root, "../secret.jpg")


def test_winogrounds_pictures_by_any_name(tmp_path):
    for ending in ("png", "jpg"):
        folder = tmp_path / ending
        folder.mkdir()
        for number in (0, 1):
            (folder / f"ex_0_img_{number}.{ending}").write_bytes(picture())
        for suffix in ("", f".{ending}"):
            item = {f"image_{number}": f"ex_0_img_{number}{suffix}" for number in (0, 1)}
            item |= {"caption_0": "a", "caption_1": "b"}
            for text in (
                json.dumps(item),
                json.dumps([item], indent=1),
                "\ufeff" + json.dumps(item),
            ):
                path = write(tmp_path, "examples.jsonl", text)
                (found,) = read_winoground(path, folder)
                assert found["image_1"].is_file()


def test_a_model_that_is_none(tmp_path, model_folder):
    """A checkpoint's folder, an adapter, a missing tokenizer, MLX's quantised weights."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(
        InputError, match=f"checkpoint of a run; give the run's folder, {tmp_path / 'run'}"
    ):
        load_embedder(checkpoint)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "llava"}')
    with pytest.raises(InputError, match="an adapter .of llava., not a model"):
        load_embedder(adapter)
    (model_folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json: no such file; .*save_pretrained"):
        read_folder(model_folder)
    edit_json(model_folder / "config.json", {"quantization": {"bits": 4}})
    with pytest.raises(InputError, match="quantised"):
        read_folder(model_folder)
    run = tmp_path / "moved"
    (run / "checkpoints").mkdir(parents=True)
    settings = {"model": "/gone/llava", "image_prompt": "x", "text_prompt": "y"}
    (run / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match='config.json: the base model /gone/llava is gone.*"model"'
    ):
        load_embedder(run)


def test_an_adapter_of_pickle(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(InputError, match="adapter_model.bin: pickle, .*adapter_model.safetensors"):
        peft.read_tensors(tmp_path / "adapter_model.safetensors")


def test_pictures_of_other_kinds_are_counted(images, tmp_path):
    for name in ("x.tif", "deep/y.HEIC", "z.avif", "notes.md"):
        (images / name).write_bytes(b"")
    left_out = LeftOut()
    assert len(pictures_in(images, left_out)) == 3 and left_out.total() == 3
    (images / "a.txt").write_text("one")
    _, counts = converted(images, tmp_path, images)
    assert counts["pictures ending in .heic, which are not read: save them as JPEG"] == 1


def test_folders_and_patterns_of_pictures(images, tmp_path):
    deep = [images / "000000000009.jpg", images / "a.jpg"]
    assert list_pictures([images]) == sorted([*deep, images / "deep/b.jpg"])
    assert list_pictures([images / "*.jpg"]) == deep
    (images / "c[1].jpg").write_bytes(picture())
    assert list_pictures([images / "c[1].jpg"]) == [images / "c[1].jpg"]
    for nothing in (images / "*.webp", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="no picture"):
            list_pictures([nothing])


# ---- Measures


@pytest.mark.parametrize("number", [1, 2, 5])
def test_cider_says_nothing_where_nothing_is_rare(number):
    """A perfect caption would get 0.0."""
    assert cider_d(["a red circle on black"] * number, [["a red circle on black"]] * number) == {}
    assert cider_d([], []) == {}


def test_cider_of_two_pictures():
    texts = ["a red circle on a wall", "two dogs run in the park"]
    assert cider_d(texts, [[text] for text in texts])["cider_d"] == pytest.approx(1000)


def replace_by_rename(path, content):
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
    os.replace(other, path)


def replace_in_place(path, content):
    time = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(time, time))


def replace_by_copy(path, content):
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
    shutil.copy2(other, path)


@pytest.mark.parametrize("replace", [replace_by_rename, replace_in_place, replace_by_copy])
def test_a_picture_of_the_same_size_and_time_is_another(tmp_path, replace):
    path = tmp_path / "photo.bmp"
    path.write_bytes(b"red ")
    kept = KeptEmbeddings(tmp_path / "kept", "model")
    (first,) = kept.keys_of_files([path])
    time = path.stat().st_mtime_ns
    replace(path, b"blue")
    assert path.stat().st_mtime_ns == time
    again = KeptEmbeddings(tmp_path / "kept", "model")
    assert again.keys_of_files([path]) != [first]


# ---- Commands


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437"])
def test_names_that_the_terminal_lacks(tmp_path, images, encoding):
    """Printed with replacement; the result is not lost."""
    (images / "\u732b.jpg").write_bytes(picture((0, 0, 200)))
    (images / "\u732b.txt").write_text("\u4e00\u53ea\u732b", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(PROJECT)}
    code = "from examples.search import main; main()"
    arguments = ["\u732b", "--images", str(images), "--device", "cpu", "--cache", "kept"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        env=environment,
        cwd=tmp_path,  # and from another folder
    )
    assert done.returncode == 0, done.stderr
    assert b"?.jpg" in done.stdout and (tmp_path / "search.png").exists()


def test_from_another_folder(tmp_path, images, monkeypatch, capsys):
    """A model that is named from the project's folder is found from any."""
    from examples import stats

    monkeypatch.chdir(tmp_path)
    (images / "a.txt").write_text("a red circle")
    converted(images, tmp_path, images)
    stats.main(["out.jsonl", "--model", "toy/tiny-llava", "--images", str(images)])
    assert "1 pictures" in capsys.readouterr().out
    assert read_folder("toy/tiny-llava")[0] == TOY_MODEL


# ---- Training


def test_a_real_checkpoint_never_trains_at_the_toys_rates(tmp_path):
    toy = train.TrainConfig()
    assert train.settings({}) == train.settings({"model": toy.model}) == toy
    assert train.settings({"model": str(TOY_MODEL)}).lr == toy.lr
    real = train.settings({"model": str(tmp_path / "llava-1.5-7b-hf")})
    assert (real.lr, real.soft_lr, real.caption_share) == (1e-4, 1e-3, 1.0)
    mine = train.settings({"model": str(tmp_path / "llava"), "lr": 2e-4, "caption_share": 0.5})
    assert (mine.lr, mine.soft_lr, mine.caption_share) == (2e-4, 1e-3, 0.5)


def small_run(world, out, *flags):
    settings = ["--steps", "2", "--batch_size", "4", "--device", "cpu"]
    train.main(["--data", str(world / "train.jsonl"), "--out", str(out), *settings, *flags])


def test_one_pair_is_no_contrast(small_world, tmp_path, capsys):
    """A batch of one is refused while the contrastive loss has a weight; others are told."""
    with pytest.raises(SystemExit, match="batch_size of 1 has no negatives"):
        small_run(small_world, tmp_path / "run", "--batch_size", "1")
    lines = (small_world / "train.jsonl").read_text().splitlines()[:4]
    records = [json.loads(line) for line in lines]
    for record in records[1:]:
        record["short"] = []
    for record in records:
        record["image"] = str(small_world / record["image"])
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    train.main(
        ["--data", str(tmp_path / "one.jsonl"), "--image_root", str(small_world)]
        + ["--out", str(tmp_path / "run"), "--steps", "2", "--batch_size", "4", "--device", "cpu"]
    )
    assert "2 of 2 batches had fewer than 2 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["shuffled", "grown", "a picture"])
def test_changed_data_is_not_gone_on_with(small_world, tmp_path, capsys, change):
    """Refused, unless it is wanted; then that holds for the one time."""
    world = tmp_path / "world"
    shutil.copytree(small_world, world)
    small_run(world, tmp_path / "run")
    data = world / "train.jsonl"
    lines = data.read_text().splitlines(keepends=True)
    if change == "shuffled":
        data.write_text("".join(lines[::-1]))
    elif change == "grown":
        data.write_text("".join(lines + lines[:1]))
    else:
        name = json.loads(lines[0])["image"]
        (world / name).write_bytes((world / name).read_bytes() + b" ")
    what = "pictures" if change == "a picture" else "lines"
    go_on = ["--resume", "--out", str(tmp_path / "run"), "--steps", "3"]
    with pytest.raises(SystemExit, match=f"its .*{what}.* have changed since"):
        train.main(go_on)
    train.main([*go_on, "--changed_data"])
    assert "--changed_data: " in capsys.readouterr().out
    train.main([*go_on[:-1], "4"])  # the new data is the run's now
    (world / "train.jsonl").write_text("".join(lines[1:] + lines[:1] + lines[:1]))
    with pytest.raises(SystemExit, match="have changed since"):
        train.main([*go_on[:-1], "5"])


def test_a_run_goes_on_where_its_files_have_moved(small_world, tmp_path):
    """The new place has to be said, and what is there has to be the same."""
    shutil.copytree(small_world, tmp_path / "world")
    shutil.copytree(TOY_MODEL, tmp_path / "base")
    small_run(tmp_path / "world", tmp_path / "run", "--model", str(tmp_path / "base"))
    (tmp_path / "world").rename(tmp_path / "moved")
    (tmp_path / "base").rename(tmp_path / "moved base")
    go_on = ["--resume", "--out", str(tmp_path / "run"), "--steps", "3"]
    with pytest.raises(SystemExit, match="model .* is gone; .*data .* is gone; if it has moved"):
        train.main(go_on)
    places = ["--model", str(tmp_path / "moved base")]
    places += ["--data", str(tmp_path / "moved/train.jsonl")]
    train.main([*go_on, *places])
    with pytest.raises(SystemExit, match="--data is .*, the run in"):
        train.main([*go_on[:-1], "4", "--data", str(small_world / "train.jsonl")])


def test_other_files_as_training_data_are_told_what_to_do(tmp_path, toy):
    path = write(tmp_path, "blip.json", [{"image": "0.jpg", "caption": "A red square."}])
    with pytest.raises(InputError, match="python -m examples.convert"):
        CaptionDataset(path, toy.layout, toy.processor)


# ---- nocaps


def test_nocaps_both_ways(small_world, tmp_path, capsys):
    """All pictures compete, or those of a domain, of which the mean is taken."""
    karpathy = json.loads((small_world / "test/karpathy.json").read_text())["images"]
    pictures = [image for image in karpathy if image["split"] == "test"][:9]
    domains = ["in-domain"] * 2 + ["near-domain"] * 3 + ["out-domain"] * 4
    content = {"images": [], "annotations": []}
    for number, (image, domain) in enumerate(zip(pictures, domains)):
        name = str(Path(image.get("filepath", "")) / image["filename"])
        content["images"].append({"id": number, "file_name": name, "domain": domain})
        for sentence in image["sentences"]:
            content["annotations"].append({"image_id": number, "caption": sentence["raw"]})
    path = write(tmp_path, "nocaps.json", content)
    root = small_world / "images"
    kept = tmp_path / "kept"
    evaluation.main(
        ["retrieval", str(path), "--images", str(root), "--device", "cpu", "--cache", str(kept)]
    )
    shown = capsys.readouterr().out
    assert "this model, all compete" in shown and "this model, mean of 3 domains" in shown


class Random:
    """Embeddings that a test makes up: one for each path and each text."""

    def __init__(self):
        self.vectors = {}

    def texts(self, keys):
        for key in keys:
            self.vectors.setdefault(key, torch.randn(3))
        return torch.stack([self.vectors[key] for key in keys])

    images = texts


def test_the_mean_over_domains_is_counted_by_hand():
    """Recall at 1 among each domain's own pictures and captions, by counting."""
    items = [(Path(f"{number}.jpg"), [f"{number} a", f"{number} b"]) for number in range(30)]
    domains = {path: "abc"[min(number // 5, 2)] for number, (path, _) in enumerate(items)}
    embeddings = Random()
    recalls = []
    for domain in "abc":
        own = [item for item in items if domains[item[0]] == domain]
        right = []
        for path, captions in own:
            for text in captions:
                scores = {other: embeddings.texts([text, other]).prod(0).sum() for other, _ in own}
                right.append(max(scores, key=scores.get) == path)
        recalls.append(100 * sum(right) / len(right))
    found = evaluation.retrieval_by_domain(embeddings, items, domains)["t2i_r1"]
    assert found == pytest.approx(sum(recalls) / 3)
    assert found != evaluation.retrieval(embeddings, items)["t2i_r1"]


def test_only_files_with_domains_have_them(small_world, tmp_path, capsys):
    evaluation.main(
        ["retrieval", str(small_world / "test/karpathy.json"), "--device", "cpu"]
        + ["--images", str(small_world / "images"), "--cache", str(tmp_path)]
    )
    assert "compete" not in capsys.readouterr().out
