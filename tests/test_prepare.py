"""examples/prepare.py: files shaped like the real ones, with the traps that real ones have."""

import io
import json
import subprocess
import sys
import tarfile

import pytest
from conftest import PROJECT
from PIL import Image

from data import CaptionDataset, DataError, ImageProcessor, Layout, TextTokenizer
from eval import TOY_MODEL
from examples.prepare import convert, main


def picture(color=(200, 30, 30)):
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
    counts = convert(source, tmp_path / "out.jsonl", images)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], counts


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_llava_and_sharegpt4v(tmp_path, images):
    """The answer is the caption; <image> stands before or after; text-only and many-turn entries are counted."""
    turns = lambda answer: [  # noqa: E731
        {"from": "human", "value": "Render a summary.\n<image>"},
        {"from": "gpt", "value": answer},
    ]
    source = write(
        tmp_path,
        "llava.json",
        [
            {"id": "1", "image": "a.jpg", "conversations": turns(" a <image> cat\nand </s> \n")},
            {"id": "2", "image": "deep/b.jpg", "conversations": turns("a dog")},
            {"id": "3", "image": "a.jpg", "conversations": turns("the same cat")},
            {"id": "4", "conversations": turns("no picture")},
            {"id": "5", "image": "a.jpg", "conversations": turns("x") + turns("y")},
            {"id": "6", "image": ["a.jpg"], "conversations": turns("a list")},
            {"id": "7", "image": "../llava.json", "conversations": turns("outside")},
            {"id": "8", "image": "missing.jpg", "conversations": turns("gone")},
            {"id": "9", "image": "a.jpg", "conversations": turns("  ")},
        ],
    )
    records, counts = converted(source, tmp_path, images)
    assert records == [
        {"image": "a.jpg", "captions": ["a <image> cat\nand </s>", "the same cat"]},
        {"image": "deep/b.jpg", "captions": ["a dog"]},
    ]
    assert counts == {
        "written": 2,
        "no image": 2,
        "not one question and one answer": 1,
        "a path that leaves the image root": 1,
        "no such picture": 1,
        "no caption": 1,
        "joined to an earlier line of the same picture": 1,
    }


def test_coco_with_unordered_annotations(tmp_path, images):
    source = write(
        tmp_path,
        "captions_val2017.json",
        {
            "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 3, "file_name": "a.jpg"}],
            "annotations": [
                {"image_id": 9, "caption": "first \n"},
                {"image_id": 77, "caption": "of an image that is not listed"},
                {"image_id": 9, "caption": "second"},
            ],
        },
    )
    records, counts = converted(source, tmp_path, images)
    assert records == [{"image": "000000000009.jpg", "captions": ["first", "second"]}]
    assert counts == {"written": 1, "no caption": 1, "captions of a picture that is not listed": 1}


def test_karpathy_keeps_test_pictures_out(tmp_path, images):
    sentence = lambda text: {"raw": text, "tokens": [], "imgid": 0, "sentid": 0}  # noqa: E731
    entries = [("a.jpg", "", "train"), ("b.jpg", "deep", "restval"), ("000000000009.jpg", "", "test")]
    source = write(
        tmp_path,
        "dataset_coco.json",
        {
            "images": [
                {
                    "filename": name,
                    "filepath": folder,
                    "split": split,
                    "sentences": [sentence(" one. "), sentence("two")],
                }
                for name, folder, split in entries
            ]
        },
    )
    records, counts = converted(source, tmp_path, images)
    assert [record["image"] for record in records] == ["a.jpg", "deep/b.jpg"]
    assert records[0]["captions"] == ["one.", "two"] and counts["of a split for tests"] == 1


def test_localized_narratives(tmp_path, images):
    """COCO's ids are numbers without their zeros; a picture may have several narratives."""
    lines = [
        {"dataset_id": "mscoco_train2017", "image_id": "9", "annotator_id": 1, "caption": "In this image"},
        {"dataset_id": "mscoco_train2017", "image_id": 9, "annotator_id": 2, "caption": "I can see"},
        {"dataset_id": "open_images_train", "image_id": "a", "annotator_id": 1, "caption": "A thing"},
    ]
    records, _ = converted(write(tmp_path, "ln.jsonl", "\n".join(map(json.dumps, lines))), tmp_path, images)
    assert records == [
        {"image": "000000000009.jpg", "captions": ["In this image", "I can see"]},
        {"image": "a.jpg", "captions": ["A thing"]},
    ]


@pytest.mark.parametrize("suffix,comma", [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path, images, suffix, comma):
    """A byte order mark, quotes, a line break inside a caption, short rows."""
    quoted = '"a cat,\tand\na ""dog"""'
    text = "\ufeff" + comma.join(["caption", "image", "caption 2"]) + "\n"
    text += comma.join([quoted, "a.jpg", "two"]) + "\n" + comma.join(["three", "deep/b.jpg"]) + "\n"
    records, _ = converted(write(tmp_path, f"table{suffix}", text), tmp_path, images)
    assert records == [
        {"image": "a.jpg", "captions": ['a cat,\tand\na "dog"', "two"]},
        {"image": "deep/b.jpg", "captions": ["three"]},
    ]


def test_a_table_without_the_columns(tmp_path, images):
    with pytest.raises(DataError, match="column image"):
        converted(write(tmp_path, "cc3m.tsv", "a caption\thttp://example.com/1.jpg\n"), tmp_path, images)


def test_a_quote_that_never_ends_is_told(tmp_path, images):
    """It would swallow the rows behind it into one caption."""
    table = write(tmp_path, "t.tsv", 'image\tcaption\na.jpg\t"he said\ndeep/b.jpg\tfine\n000000000009.jpg\tfine\n')
    with pytest.raises(DataError, match="t.tsv, behind line 1.*quotes"):
        converted(table, tmp_path, images)


def test_a_folder_with_text_files(images, tmp_path):
    (images / "a.txt").write_text("a cat\n\nanother line\n")
    records, counts = converted(images, tmp_path, images)
    assert records == [{"image": "a.jpg", "captions": ["a cat", "another line"]}]
    assert counts["no caption"] == 2


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shard(path, keys, color):
    with tarfile.open(path, "w") as tar:
        for key in keys:
            add(tar, f"{key}.jpg", picture(color))
            add(tar, f"{key}.txt", f"caption {key}".encode())
            add(tar, f"{key}.json", json.dumps({"caption": f"caption {key}", "status": "success"}).encode())


def test_shards(tmp_path):
    """Gaps in the numbers, a sample without a caption, one without a picture, a link; read by seeking."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "00000.tar", ["000000000", "000000007"], (255, 0, 0))
    shard(folder / "00001.tar", ["000010003"], (0, 0, 255))
    with tarfile.open(folder / "00002.tar", "w") as tar:
        add(tar, "x.jpg", picture())
        add(tar, "y.txt", b"only words")
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    records, counts = converted(folder, tmp_path, folder)
    assert [(r["image"], r["captions"]) for r in records] == [
        ("00000.tar", ["caption 000000000"]),
        ("00000.tar", ["caption 000000007"]),
        ("00001.tar", ["caption 000010003"]),
    ]
    assert counts["no caption"] == 1 and counts["captions without a picture"] == 1
    layout = Layout(TextTokenizer(TOY_MODEL), 16)
    dataset = CaptionDataset(
        tmp_path / "out.jsonl", layout, ImageProcessor.from_pretrained(TOY_MODEL), image_root=folder
    )
    red, blue = dataset[0, 0].pixel_values, dataset[2, 0].pixel_values
    assert red[0].mean() > red[2].mean() and blue[2].mean() > blue[0].mean()


def test_shards_named_as_people_name_them(tmp_path):
    """A folder in front, with dots in its name, endings in capitals, a .json that is none: no sample is lost."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for key, ending in (("./000", "jpg"), ("cc3m.v2/000", "jpg"), ("001", "JPG")):
            add(tar, f"{key}.{ending}", picture())
            add(tar, f"{key}.txt", f"caption of {key}".encode())
            add(tar, f"{key}.json", b"[1]")
    records, counts = converted(folder, tmp_path, folder)
    assert [record["captions"] for record in records] == [
        [f"caption of {key}"] for key in ("./000", "cc3m.v2/000", "001")
    ]
    assert counts["a .json in a shard that is no JSON object"] == 3


@pytest.mark.parametrize("damage", ["header", "zeros", "cut"])
def test_damaged_shards_say_so(tmp_path, damage):
    """What stands in front of the damage is used, the damage is counted by its place."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "00000.tar", ["0", "1", "2"], (255, 0, 0))
    content = bytearray((folder / "00000.tar").read_bytes())
    if damage == "header":
        content[3 * 1024 : 3 * 1024 + 100] = b"\xff" * 100  # the second sample's first header
    elif damage == "zeros":  # an early end, as between two archives in one file: Python's reader stops without a word
        content[3 * 1024 : 4 * 1024] = bytes(1024)
    else:
        del content[3 * 1024 + 600 :]
    (folder / "00000.tar").write_bytes(content)
    records, counts = converted(folder, tmp_path, folder)
    assert len(records) == 1 and sum(number for reason, number in counts.items() if "damaged" in reason) == 1


def test_what_cannot_be_converted(tmp_path, images):
    for name, content, message in (
        ("empty.json", "[]", "no usable record"),
        ("odd.json", '[{"picture": 1}, 7]', "no usable record.*'no conversation': 2"),
        ("odd.json", '{"images": [{"picture": 1}]}', "not in the expected format"),
        ("broken.json", "[1", "not a JSON file"),
        ("odd.jsonl", "[1]", "not in the expected format"),
    ):
        with pytest.raises(DataError, match=message):
            converted(write(tmp_path, name, content), tmp_path, images)
    assert not list(tmp_path.glob("out.jsonl*"))


def test_commands(tmp_path, images, capsys):
    """convert, then stats: how many captions of which length, and what is dropped."""
    (images / "a.txt").write_text("a red circle\n" + "a red circle on a black background . " * 5)
    main(["convert", str(images), str(tmp_path / "train.jsonl"), "--images", str(images)])
    assert "1 written" in capsys.readouterr().out
    main(["stats", str(tmp_path / "train.jsonl"), "--model", str(TOY_MODEL)])
    shown = capsys.readouterr().out
    assert "1 pictures: 1 with short and long captions" in shown
    with pytest.raises(SystemExit, match="no such file|cannot be read"):
        main(["stats", str(tmp_path / "none.jsonl"), "--model", str(TOY_MODEL)])


def test_data_py_is_the_command(tmp_path, images):
    """`python data.py convert` and `python data.py stats`, as the README has them."""
    (images / "a.txt").write_text("a red circle")
    script = [sys.executable, PROJECT / "data.py"]
    subprocess.run([*script, "convert", images, tmp_path / "train.jsonl"], check=True, capture_output=True)
    shown = subprocess.run([*script, "stats", tmp_path / "train.jsonl"], check=True, capture_output=True, text=True)
    assert "1 pictures: 1 with short captions" in shown.stdout


def test_a_part_that_is_none(tmp_path, images):
    """A line with a faulty part is left out, counted; a part that holds no picture is told when it is read."""
    good = {"image": "a.jpg", "captions": ["a red square"]}
    parts = [[0, len(picture())], [5], [0, -1], ["0", 1], [7, 40]]
    lines = [json.dumps(good | {"part": part}) for part in parts]
    path = write(tmp_path, "train.jsonl", "\n".join(lines + [json.dumps(good)] * 300))
    layout, processor = Layout(TextTokenizer(TOY_MODEL), 16), ImageProcessor.from_pretrained(TOY_MODEL)
    dataset = CaptionDataset(path, layout, processor, image_root=images)
    assert len(dataset) == 302 and dataset.faults == {'"part" is not [offset, bytes]': 3}
    assert dataset[0, 0].short == "a red square"
    assert "bytes from 7: not a JPEG" in dataset[1, 0]
