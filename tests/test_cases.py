"""The shown cases: small inputs that once gave a wrong value, a silent loss or a traceback.

They stand in ../shared/cases beside the project, or where NANOVLADVA_CASES says; without them all
of this is skipped. (test_kinds.py makes its own inputs and needs none.) Every file and folder in
there is run, and for those that are sources of captions what is written and what is counted must
add up to what is in them, which was counted by hand.
"""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import PROJECT

import train
from data import open_image
from eval import cider_d
from formats.captions import convert
from formats.files import InputError, LeftOut
from formats.testsets import read_imagenet, read_retrieval, read_winoground

CASES = Path(os.environ.get("NANOVLADVA_CASES") or PROJECT.parent / "shared" / "cases")
if not CASES.is_dir():
    pytest.skip(f"there is no {CASES} (NANOVLADVA_CASES)", allow_module_level=True)

# Sources that are read: how many records and captions are in them. A record is an item of a list, a
# line, a row, or a picture of a folder or a shard; COCO's captions of unlisted pictures have none.
READ = {
    "accents/t.csv": (1, 1),
    "batch-of-one/train.jsonl": (32, 64),
    "caption-id-columns/caption_id.csv": (2, 2),
    "cider-one-image/one.json": (1, 1),
    "cider-one-image/two.json": (2, 2),
    "llava-files/blip_train.json": (2, 3),
    "llava-files/coco_list_values.json": (2, 2),
    "llava-files/docci.jsonlines": (1, 1),
    "llava-files/dup_file_names.json": (2, 2),
    "llava-files/hf_metadata.jsonl": (2, 2),
    "llava-files/image_list.json": (1, 1),
    "llava-files/lines.jsonl": (3, 3),
    "llava-files/lines_named.json": (3, 3),
    "llava-files/messages.json": (1, 1),
    "llava-files/metadata_chat.json": (1, 1),
    "llava-files/ours.jsonl": (1, 1),
    "llava-files/pretty.json": (2, 3),
    "llava-files/roles.json": (1, 1),
    "llava-files/same_picture.jsonl": (3, 3),
    "llava-files/singular.jsonl": (1, 1),
    "llava-files/string.jsonl": (1, 1),
    "llava-files/system_turn.json": (1, 1),
    "llava-files/textcaps.json": (1, 1),
    "null-caption/coco.json": (2, 2),
    "null-caption/karpathy.json": (2, 2),
    "null-caption/ln.jsonl": (2, 2),
    "one-process-without-pictures/train.jsonl": (8, 16),
    "resume-after-data-changed/shuffled.jsonl": (32, 64),
    "resume-after-data-changed/train.jsonl": (32, 64),
    "retrieval-files/blank_caption.json": (3, 4),
    "retrieval-files/blip.json": (3, 6),
    "retrieval-files/blip_train.json": (3, 3),
    "retrieval-files/bom.json": (3, 6),
    "retrieval-files/captions_key.json": (3, 3),
    "retrieval-files/karpathy_flickr.json": (3, 3),
    "retrieval-files/lavis_sbu.json": (3, 3),
    "retrieval-files/lines.jsonl": (3, 3),
    "retrieval-files/missing_image_entry.json": (2, 3),
    "retrieval-files/nested_list.json": (3, 3),
    "retrieval-files/null_caption.json": (3, 3),
    "retrieval-files/string_ids.json": (3, 3),
    "retrieval-files/utf16.json": (3, 6),
    "same-column-names/same_column_five_times.csv": (2, 6),
    "tables/capitals.csv": (1, 1),
    "tables/caption_id.csv": (2, 2),
    "tables/captions.txt": (2, 2),
    "tables/crlf.tsv": (2, 2),
    "tables/filepath_title.csv": (1, 1),
    "tables/index_column.csv": (2, 2),
    "tables/long_cell.csv": (2, 2),
    "tables/mac_cr.csv": (2, 2),
    "tables/nan_cells.csv": (4, 4),
    "tables/results_pipe.csv": (1, 1),
    "tables/same_column_five_times.csv": (2, 6),
    "tables/semicolons.csv": (2, 2),
    "tables/spaces_after_commas.csv": (1, 1),
    "tables/tabs_in_csv.csv": (2, 2),
    "tables/utf16.csv": (1, 1),
    "train-small/grown.jsonl": (40, 80),
    "train-small/shuffled.jsonl": (32, 64),
    "train-small/train.jsonl": (32, 64),
    # Folders: pictures, the hidden ones too, and lines of texts.
    "apple-double/photos": (4, 2),
    "bom-captions/photos": (1, 2),
    "cp1252-captions/photos": (3, 3),
    "jupyter-copies/photos": (3, 2),
}
# Of those, captions that left with their records (no such picture, of a split for tests), or that
# were of no use in a record that has no other.
LEFT_WITH_RECORDS = {
    "null-caption/coco.json": 1,
    "null-caption/karpathy.json": 1,
    "null-caption/ln.jsonl": 1,
    "one-process-without-pictures/train.jsonl": 4,
    "retrieval-files/karpathy_flickr.json": 2,
    "retrieval-files/null_caption.json": 1,
    "tables/nan_cells.csv": 3,
    "cp1252-captions/photos": 1,
}
# Shards: how many of their files belong to the samples that are written.
SHARDS = {
    "shard-captions": 8,
    "shard-named-parts/mixed": 8,
    "shard-named-parts/other-formats": 6,
    "shard-named-parts/shards": 6,
    "shard-named-parts/unsorted": 6,
    "shard-nested": 2,
}
REFUSED = {
    "lfs-pointer/dataset_flickr8k.json": "Git LFS pointer",
    "shard-gz": "compressed shards .gzip.",
    "shard-tgz": "compressed shards",
    "tables/absolute.csv": "1 a path that leaves the image root .the first: /tmp/bugs",
    "tables/backslash.csv": "1 no such picture .the first: sub",
    "tables/cp1252.csv": "line 2: not UTF-8, perhaps Windows' cp1252",
    "tables/quote_balance.tsv": "line 2: .* whole rows",
    "tables/quote_first.tsv": "after line 1: .*quotes",
    "tables/unquoted_commas.csv": "line 2: 4 cells for 2 columns",
    "linked-data-folders/playground/data/llava.json": "no such picture|through a link",
    # No sources of captions.
    "imagenet-names/class_index.json": "no such picture",
    "imagenet-names/words_by_wnid.json": "no such picture",
    "pictures": "no caption",
    "winoground-files/array.jsonl": "neither a conversation nor",
    "winoground-files/bom.jsonl": "neither a conversation nor",
    "winoground-files/plain.jsonl": "neither a conversation nor",
    "winoground-files/with_endings.jsonl": "neither a conversation nor",
}


def converted(name, tmp_path):
    source = CASES / name
    root = source if source.is_dir() else source.parent
    counts = convert(source, tmp_path / "out.jsonl", root)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").open()], counts


def total(counts, *beginnings):
    return sum(number for reason, number in counts.items() if reason.startswith(beginnings))


@pytest.mark.parametrize("name", READ)
def test_what_is_read_and_what_is_counted_is_all(tmp_path, name):
    records, counts = converted(name, tmp_path)
    in_records, in_captions = READ[name]
    # What is neither a record nor a caption.
    beside = total(counts, "column", "texts that cannot be read")
    assert counts.total() - total(counts, "captions") - beside == in_records
    written = sum(len(record["captions"]) for record in records)
    left = total(counts, "captions") + LEFT_WITH_RECORDS.get(name, 0)
    assert written + left == in_captions
    for record in records:
        for caption in record["captions"]:
            assert caption == caption.strip("\ufeff ") and caption.lower() not in ("nan", "none")


@pytest.mark.parametrize("name", SHARDS)
def test_every_member_of_a_shard_is_used_or_counted(tmp_path, name):
    records, counts = converted(name, tmp_path)
    members = 0
    for path in (CASES / name).rglob("*.tar"):
        with tarfile.open(path) as tar:
            members += sum(member.isfile() for member in tar)
    # A picture that has no caption but a placeholder takes its text and its metadata with it.
    with_it = 2 * counts["no caption but a placeholder, such as nan or None"]
    counted = counts.total() - counts["written"]
    assert SHARDS[name] + counted + with_it == members
    assert len(records) == counts["written"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(tmp_path, name):
    with pytest.raises(InputError, match=REFUSED[name]):
        converted(name, tmp_path)


def test_every_source_is_in_a_table_above():
    known = {*READ, *REFUSED}
    for path in CASES.rglob("*"):
        if path.suffix in (".csv", ".tsv", ".json", ".jsonl", ".jsonlines"):
            assert path.relative_to(CASES).as_posix() in known


# ---- Test sets


@pytest.mark.parametrize(
    "name,captions",
    [
        ("blank_caption.json", [1, 1, 1]),
        ("blip.json", [2, 2, 2]),
        ("blip_train.json", [1, 1, 1]),
        ("bom.json", [2, 2, 2]),
        ("captions_key.json", [1, 1, 1]),
        ("karpathy_flickr.json", [1, 1]),
        ("lavis_sbu.json", [1, 1, 1]),
        ("lines.jsonl", [1, 1, 1]),
        ("missing_image_entry.json", [1, 1]),
        ("nested_list.json", [1, 1, 1]),
        ("null_caption.json", [1, 1, 0]),
        ("string_ids.json", [1, 1, 1]),
        ("utf16.json", [2, 2, 2]),
    ],
)
def test_retrieval_files(name, captions):
    left_out = LeftOut()
    items = read_retrieval(CASES / "retrieval-files" / name, CASES, left_out=left_out)
    assert [len(texts) for _, texts in items] == captions
    lost = {"blank_caption.json", "missing_image_entry.json", "null_caption.json"}
    assert left_out.total() == (name in lost)


@pytest.mark.parametrize("names", ["plain.jsonl", "with_endings.jsonl", "bom.jsonl", "array.jsonl"])
@pytest.mark.parametrize("folder", ["images", "jpgs"])
def test_winoground_files(names, folder):
    here = CASES / "winoground-files"
    if names == "with_endings.jsonl" and folder == "jpgs":
        return  # which say .png
    (item,) = read_winoground(here / names, here / folder)
    assert item["image_0"].is_file() and item["caption_1"] == "a blue circle"


@pytest.mark.parametrize(
    "names,classes",
    [
        ("LOC_synset_mapping.txt", ["tench", "goldfish", "great white shark"]),
        ("class_index.json", ["tench", "goldfish", "great white shark"]),
        ("words_by_wnid.json", ["tench", "goldfish", "great white shark"]),
        ("labels_tab.txt", ["tench", "goldfish", "shark"]),
        ("names_bom.txt", ["tench", "goldfish", "shark"]),
    ],
)
def test_class_lists(names, classes):
    here = CASES / "imagenet-names"
    pictures, found = read_imagenet(here / "val", here / names)
    # The folders in order: n01440764, n01443537, n01484850.
    assert found == classes and len(pictures) == 6


def test_hidden_classes_and_pictures():
    left_out = LeftOut()
    here = CASES / "imagenet-apple"
    pictures, classes = read_imagenet(here / "val", here / "names.txt", left_out)
    assert len(pictures) == 6 and left_out == {"hidden copies of pictures": 1}
    left_out = LeftOut()
    pictures, classes = read_imagenet(CASES / "imagenet-hidden-folder" / "named", None, left_out)
    assert classes == ["blue circle", "green square", "red circle"]
    assert len(pictures) == 6 and left_out == {"hidden copies of pictures": 1}


# ---- Pictures, measures, training


def test_pictures():
    refused = {
        "avif_named.jpg": "it is an AVIF",
        "big_icc.png": "metadata",
        "big_text_zip.png": "metadata",
        "big_ztxt.png": "metadata",
        "cut.jpg": "damaged",
        "long.png": "too long",
        "real.tif": "it is a TIFF",
        "tiff_named.jpg": "it is a TIFF",
    }
    for path in (CASES / "pictures").iterdir():
        if path.name in refused:
            with pytest.raises(InputError, match=refused[path.name]):
                open_image(path)
        else:
            assert open_image(path).mode == "RGB"


def test_cider_of_one_picture():
    for name, number in (("one.json", 1), ("two.json", 2)):
        items = read_retrieval(CASES / "cider-one-image" / name, CASES / "cider-one-image")
        perfect = cider_d([texts[0] for _, texts in items], [texts for _, texts in items])
        assert (perfect == {}) if number == 1 else perfect["cider_d"] > 100


def train_on(case, out, *flags, file="train.jsonl"):
    settings = ["--steps", "2", "--batch_size", "8", "--device", "cpu", *flags]
    train.main(["--data", str(CASES / case / file), "--out", str(out), *settings])


def test_a_batch_of_one(tmp_path):
    with pytest.raises(SystemExit, match="batch_size of 1 has no negatives"):
        train_on("batch-of-one", tmp_path / "run", "--batch_size", "1")


def test_data_that_changes_before_going_on(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(CASES / "resume-after-data-changed", data)
    (data / "train.jsonl").chmod(0o644)
    run = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    start = ["--data", str(data / "train.jsonl"), "--steps", "2", "--batch_size", "8"]
    train.main([*run, *start])
    shutil.copyfile(data / "shuffled.jsonl", data / "train.jsonl")
    with pytest.raises(SystemExit, match="its lines .*have changed since"):
        train.main([*run, "--resume", "--steps", "3"])
