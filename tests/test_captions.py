"""formats/captions.py: files shaped like the real ones, with the traps that real ones have."""

import io
import json
import subprocess
import sys
import tarfile

import pytest
from conftest import PROJECT
from PIL import Image

from data import CaptionDataset, ImageProcessor, Layout, TextTokenizer
from eval import TOY_MODEL
from examples import convert as convert_command
from examples import stats as stats_command
from formats.captions import convert
from formats.files import InputError
from formats.pictures import pictures_in

RED = (200, 30, 30)


def picture(color=RED) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 50), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    """A folder of pictures: a.jpg, deep/b.jpg, 000000000009.jpg."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.jpg", "000000000009.jpg"):
        (folder / name).write_bytes(picture())
    return folder


def converted(source, tmp_path, images):
    """The records that `convert` writes, and its counts."""
    counts = convert(source, tmp_path / "out.jsonl", images)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], counts


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def opened(path, image_root=None) -> CaptionDataset:
    layout = Layout(TextTokenizer(TOY_MODEL), 16)
    processor = ImageProcessor.from_pretrained(TOY_MODEL)
    return CaptionDataset(path, layout, processor, image_root)


def turns(answer: str) -> list[dict]:
    return [
        {"from": "human", "value": "Render a summary.\n<image>"},
        {"from": "gpt", "value": answer},
    ]


def test_llava_and_sharegpt4v(tmp_path, images):
    """The answer is the caption; text-only and many-turn entries are counted."""
    content = [
        {"id": "1", "image": "a.jpg", "conversations": turns(" a <image> cat\nand </s> \n")},
        {"id": "2", "image": "deep/b.jpg", "conversations": turns("a dog")},
        {"id": "3", "image": "a.jpg", "conversations": turns("the same cat")},
        {"id": "4", "conversations": turns("no picture")},
        {"id": "5", "image": "a.jpg", "conversations": turns("x") + turns("y")},
        {"id": "6", "image": ["a.jpg"], "conversations": turns("a list")},
        {"id": "7", "image": "../llava.json", "conversations": turns("outside")},
        {"id": "8", "image": "missing.jpg", "conversations": turns("gone")},
        {"id": "9", "image": "a.jpg", "conversations": turns("  ")},
    ]
    source = write(tmp_path, "llava.json", content)
    records, counts = converted(source, tmp_path, images)
    assert records == [
        {"image": "a.jpg", "captions": ["a <image> cat\nand </s>", "the same cat", "a list"]},
        {"image": "deep/b.jpg", "captions": ["a dog"]},
    ]
    assert counts == {
        "written": 2,
        "no image": 1,
        "not one question and one answer": 1,
        "a path that leaves the image root": 1,
        "no such picture": 1,
        "no caption": 1,
        "joined to an earlier line of the same picture": 2,
    }


def test_coco_with_unordered_annotations(tmp_path, images):
    content = {
        "images": [
            {"id": 9, "file_name": "000000000009.jpg"},
            {"id": 3, "file_name": "a.jpg"},
        ],
        "annotations": [
            {"image_id": 9, "caption": "first \n"},
            {"image_id": 77, "caption": "of an image that is not listed"},
            {"image_id": 9, "caption": "second"},
        ],
    }
    source = write(tmp_path, "captions_val2017.json", content)
    records, counts = converted(source, tmp_path, images)
    assert records == [{"image": "000000000009.jpg", "captions": ["first", "second"]}]
    unlisted = "captions of a picture that is not listed"
    assert counts == {"written": 1, "no caption": 1, unlisted: 1}


def test_karpathy_keeps_test_pictures_out(tmp_path, images):
    sentences = [
        {"raw": " one. ", "tokens": [], "imgid": 0, "sentid": 0},
        {"raw": "two", "tokens": [], "imgid": 0, "sentid": 0},
    ]
    entries = []
    for name, folder, split in (
        ("a.jpg", "", "train"),
        ("b.jpg", "deep", "restval"),
        ("000000000009.jpg", "", "test"),
    ):
        entry = {"filename": name, "filepath": folder, "split": split, "sentences": sentences}
        entries.append(entry)
    source = write(tmp_path, "dataset_coco.json", {"images": entries})
    records, counts = converted(source, tmp_path, images)
    assert [record["image"] for record in records] == ["a.jpg", "deep/b.jpg"]
    assert records[0]["captions"] == ["one.", "two"]
    assert counts["of a split for tests"] == 1


def test_localized_narratives(tmp_path, images):
    """COCO's ids are numbers without their zeros; a picture may have several narratives."""
    items = [
        {"dataset_id": "mscoco_train2017", "image_id": "9", "caption": "In this image"},
        {"dataset_id": "mscoco_train2017", "image_id": 9, "caption": "I can see"},
        {"dataset_id": "open_images_train", "image_id": "a", "caption": "A thing"},
    ]
    lines = [json.dumps({"annotator_id": 1, **item}) for item in items]
    records, _ = converted(write(tmp_path, "ln.jsonl", "\n".join(lines)), tmp_path, images)
    assert records == [
        {"image": "000000000009.jpg", "captions": ["In this image", "I can see"]},
        {"image": "a.jpg", "captions": ["A thing"]},
    ]


@pytest.mark.parametrize("suffix,comma", [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path, images, suffix, comma):
    """A byte order mark, quotes, a line break inside a caption, short rows."""
    rows = [
        ["caption", "image", "caption 2"],
        ['"a cat,\tand\na ""dog"""', "a.jpg", "two"],
        ["three", "deep/b.jpg"],
    ]
    lines = [comma.join(row) + "\n" for row in rows]
    table = write(tmp_path, f"table{suffix}", "\ufeff" + "".join(lines))
    records, _ = converted(table, tmp_path, images)
    assert records == [
        {"image": "a.jpg", "captions": ['a cat,\tand\na "dog"', "two"]},
        {"image": "deep/b.jpg", "captions": ["three"]},
    ]


def test_a_table_without_the_columns(tmp_path, images):
    table = write(tmp_path, "cc3m.tsv", "a caption\thttp://example.com/1.jpg\n")
    with pytest.raises(InputError, match="column image"):
        converted(table, tmp_path, images)


def test_a_quote_that_never_ends_is_told(tmp_path, images):
    """It would swallow the rows behind it into one caption."""
    text = 'image\tcaption\na.jpg\t"he said\ndeep/b.jpg\tfine\n000000000009.jpg\tfine\n'
    with pytest.raises(InputError, match="t.tsv, after line 1.*quotes"):
        converted(write(tmp_path, "t.tsv", text), tmp_path, images)


def test_a_quote_in_the_first_line_is_told(tmp_path, images):
    """The names of the columns may be what is broken."""
    with pytest.raises(InputError, match="t.csv, after line 0.*quotes"):
        converted(write(tmp_path, "t.csv", '"image"x,caption\na.jpg,fine\n'), tmp_path, images)


def test_a_folder_with_text_files(images, tmp_path):
    (images / "a.txt").write_text("a cat\n\nanother line\n")
    records, counts = converted(images, tmp_path, images)
    assert records == [{"image": "a.jpg", "captions": ["a cat", "another line"]}]
    assert counts["no caption"] == 2


def test_pictures_in(images):
    """By their endings, in capitals too, in order; nothing else, and no folder."""
    (images / "deep" / "C.PNG").write_bytes(b"")
    (images / "notes.txt").write_text("no picture")
    (images / "folder.png").mkdir()
    names = [str(path.relative_to(images)) for path in pictures_in(images)]
    assert names == ["000000000009.jpg", "a.jpg", "deep/C.PNG", "deep/b.jpg"]


# ---- Shards


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shard(path, keys, color):
    """A shard as img2dataset writes it."""
    with tarfile.open(path, "w") as tar:
        for key in keys:
            fields = {"caption": f"caption {key}", "status": "success"}
            add(tar, f"{key}.jpg", picture(color))
            add(tar, f"{key}.txt", f"caption {key}".encode())
            add(tar, f"{key}.json", json.dumps(fields).encode())


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder


def test_shards(tmp_path, shards):
    """Gaps in the numbers, a sample without a caption, one without a picture, a link."""
    shard(shards / "00000.tar", ["000000000", "000000007"], (255, 0, 0))
    shard(shards / "00001.tar", ["000010003"], (0, 0, 255))
    with tarfile.open(shards / "00002.tar", "w") as tar:
        add(tar, "x.jpg", picture())
        add(tar, "y.txt", b"only words")
        link = tarfile.TarInfo("z.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        tar.addfile(link)
    records, counts = converted(shards, tmp_path, shards)
    assert [(record["image"], record["captions"]) for record in records] == [
        ("00000.tar", ["caption 000000000"]),
        ("00000.tar", ["caption 000000007"]),
        ("00001.tar", ["caption 000010003"]),
    ]
    assert counts["no caption"] == 1
    assert counts["captions without a picture"] == 1

    # Training reads them where they stand.
    dataset = opened(tmp_path / "out.jsonl", shards)
    red = dataset[0, 0].pixel_values
    blue = dataset[2, 0].pixel_values
    assert red[0].mean() > red[2].mean()
    assert blue[2].mean() > blue[0].mean()


def test_shards_named_as_people_name_them(tmp_path, shards):
    """A folder in front, dots in its name, capitals, a .json that is none: no sample is lost."""
    with tarfile.open(shards / "x.tar", "w") as tar:
        for key, ending in (("./000", "jpg"), ("cc3m.v2/000", "jpg"), ("001", "JPG")):
            add(tar, f"{key}.{ending}", picture())
            add(tar, f"{key}.txt", f"caption of {key}".encode())
            add(tar, f"{key}.json", b"[1]")
    records, counts = converted(shards, tmp_path, shards)
    assert [record["captions"] for record in records] == [
        ["caption of ./000"],
        ["caption of cc3m.v2/000"],
        ["caption of 001"],
    ]
    assert counts["a .json in a shard that is no JSON object"] == 3


@pytest.mark.parametrize("damage", ["header", "zeros", "cut"])
def test_damaged_shards_say_so(tmp_path, shards, damage):
    """What stands in front of the damage is used, the damage is counted by its place."""
    path = shards / "00000.tar"
    shard(path, ["0", "1", "2"], (255, 0, 0))
    content = bytearray(path.read_bytes())
    second = 3 * 1024  # where the second sample's first header stands
    if damage == "header":
        content[second : second + 100] = b"\xff" * 100
    elif damage == "zeros":
        # An early end, as between two archives in one file: Python's reader stops without a word.
        content[second : second + 1024] = bytes(1024)
    else:
        del content[second + 600 :]
    path.write_bytes(content)
    records, counts = converted(shards, tmp_path, shards)
    assert len(records) == 1
    damaged = [count for reason, count in counts.items() if "damaged" in reason]
    assert damaged == [1]


# ---- What cannot be used


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("empty.json", "[]", "no usable record"),
        ("odd.json", '[{"picture": 1}, 7]', "no usable record; 2 neither a conversation"),
        ("odd.json", '{"images": [{"picture": 1}]}', "not in the expected format"),
        ("broken.json", "[1", "not a JSON file"),
        ("odd.jsonl", "[1]", "no usable record; 1 neither a conversation"),
        ("odd.jsonl", "1\n{", "line 2: not in the expected format"),
        ("odd.parquet", "PAR1", "not a .json, .jsonl, .csv or .tsv file"),
    ],
)
def test_what_cannot_be_converted(tmp_path, images, name, content, message):
    """One clear error, and nothing is left where the file would have been."""
    with pytest.raises(InputError, match=message):
        converted(write(tmp_path, name, content), tmp_path, images)
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        converted(tmp_path / "nothing.json", tmp_path, tmp_path)


def test_a_failure_leaves_the_old_file_alone(tmp_path, images):
    """Lines that were written before are there until new ones are whole."""
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(InputError):
        converted(write(tmp_path, "odd.json", '[{"picture": 1}]'), tmp_path, images)
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert [path.name for path in tmp_path.glob("out.jsonl*")] == ["out.jsonl"]


def test_a_part_that_is_none(tmp_path, images):
    """A faulty part is counted; a part that holds no picture is told when it is read."""
    good = {"image": "a.jpg", "captions": ["a red square"]}
    parts = [[0, len(picture())], [5], [0, -1], ["0", 1], [7, 40]]
    lines = [json.dumps({**good, "part": part}) for part in parts]
    lines += [json.dumps(good)] * 300
    dataset = opened(write(tmp_path, "train.jsonl", "\n".join(lines)), images)
    assert len(dataset) == 302
    assert dataset.faults == {'"part" is not [offset, bytes]': 3}
    assert dataset[0, 0].short == "a red square"
    assert dataset[0, 0].error is None
    broken = dataset[1, 0]
    assert "train.jsonl, record 1: " in broken.error
    assert "bytes from 7: not a JPEG" in broken.error
    assert broken.pixel_values is broken.short is broken.long is None


# ---- The commands


def test_commands(tmp_path, images, capsys):
    """convert, then stats: how many captions of which length, and what is dropped."""
    (images / "a.txt").write_text("a red circle\n" + "a red circle on a black background . " * 5)
    out = str(tmp_path / "train.jsonl")
    convert_command.main([str(images), out, "--images", str(images)])
    shown = capsys.readouterr().out
    assert "1 written" in shown
    assert f"Train with --data {out} --image_root {images}" in shown

    stats_command.main([out, "--model", str(TOY_MODEL)])
    shown = capsys.readouterr().out
    assert "1 pictures: 1 with short and long captions" in shown
    assert "1 pictures are not in" in shown
    stats_command.main([out, "--images", str(images)])
    assert "are not in" not in capsys.readouterr().out

    with pytest.raises(SystemExit, match="no such file|cannot be read"):
        stats_command.main([str(tmp_path / "none.jsonl"), "--model", str(TOY_MODEL)])
    with pytest.raises(SystemExit, match="no such file"):
        convert_command.main([str(tmp_path / "none.json"), out])


def test_commands_as_they_are_typed(tmp_path, images):
    """`python -m examples.convert` and `python -m examples.stats`, as the README has them."""
    (images / "a.txt").write_text("a red circle")
    out = tmp_path / "train.jsonl"

    def run(*words):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
        return done.stdout

    assert "1 written" in run("examples.convert", images, out)
    assert "1 pictures: 1 with short captions" in run("examples.stats", out)
