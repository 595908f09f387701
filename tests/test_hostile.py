"""Files from strangers: whatever is in them, one clear error or a count, and nothing is executed.

NANOVLADVA_FUZZ=2000 python -m pytest tests/test_hostile.py -s    more of them, and how they ended
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import PROJECT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from data import CaptionDataset, ImageProcessor, TextTokenizer, open_image, parse_record
from eval import TOY_MODEL, load_base
from examples import convert as convert_command
from formats import peft
from formats.captions import convert
from formats.files import InputError
from formats.testsets import read_domains, read_imagenet, read_retrieval
from lora import load_adapter
from model import Llava, LlavaConfig

OUTCOMES = Counter()  # (what was read, how it ended) -> how often
FUZZ = settings(
    max_examples=int(os.environ.get("NANOVLADVA_FUZZ", 40)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)

# Values where something else is expected.
HOSTILE = [
    *[None, True, -1, 0, 2**63, 2**70, 1e308, float("nan"), float("inf")],
    *["", "\x00", "\ud800", "a" * 5000],
    *[[], {}, [[]]],
]
# Files that once broke a reader somewhere.
BYTES = [
    b"",
    b"\x00" * 16,
    b"\xff" * 64,
    b"{",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\x80\x04.",  # how a pickle begins
    b"version https://git-lfs",
    b"<!DOCTYPE html>",
    b'{"a": 1e999}',
    b'"\xff"',
    b"\xef\xbb\xbf{}",
    b"null",
    b"PK\x03\x04",  # how a zip begins, and so a .pt
    b"9" * 10_000,
]
HEADERS = [
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}',
    b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
    b'{"a":{}}',
    b"[]",
    b"{",
    b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
    b'{"__metadata__":{"format":1}}',
    b"",
]
SAFETENSORS = list(BYTES)
for header in HEADERS:
    # A file begins with the length of its header: the true one, far too much, too little.
    for length in (len(header), 2**60, 3):
        SAFETENSORS.append(struct.pack("<Q", length) + header + b"\0" * 16)


def containers(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)


json_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(json_scalars, containers, max_leaves=6)
hostile_values = st.sampled_from(HOSTILE) | json_values


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def toy():
    return load_base(TOY_MODEL, "cpu")


def read_adapter_config(folder):
    return peft.read_config(folder / "adapter_config.json")


def read_run_config(folder):
    return train.settings({"resume": True, "out": str(folder)})


def refused(read, *arguments):
    """What `read` returns, or None where it raises an error of ours that says something."""
    try:
        result = read(*arguments)
    except InputError as error:
        assert len(str(error)) > 5
        OUTCOMES[read.__qualname__, "clear error"] += 1
        return None
    OUTCOMES[read.__qualname__, "read"] += 1
    return result


def changed(good: dict, value, index: int) -> dict:
    """A JSON object with one field, also of an object inside of it, replaced."""
    content = json.loads(json.dumps(good))
    places = [(content, key) for key in content]
    for inner in content.values():
        if isinstance(inner, dict):
            places += [(inner, key) for key in inner]
    owner, key = places[index % len(places)]
    owner[key] = value
    return content


def overwritten(content: bytes, offset: int, new: bytes, cut: bool) -> bytes:
    """A file that ends too early, or that has other bytes somewhere."""
    if cut:
        return content[:offset]
    return content[:offset] + new + content[offset + len(new) :]


# ---- Training data

KEYS = ["image", "short", "long", "captions", "group", "part"]


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), json_values))
def test_records(record):
    refused(parse_record, json.dumps(record).encode("utf-8", "surrogatepass"))


LINES = list(BYTES)
for hostile in HOSTILE:
    LINES.append(json.dumps({"image": "a.png", "short": [hostile]}).encode())


@pytest.mark.parametrize("line", LINES)
def test_lines_of_the_corpus(place, toy, line):
    """Alone a faulty line stops; a record that is none never becomes more than an error."""
    (place / "data.jsonl").write_bytes(line)
    dataset = refused(CaptionDataset, place / "data.jsonl", toy.layout, toy.processor)
    if dataset is not None:
        sample = dataset[0, 0]  # there is no a.png
        assert "record 0" in sample.error
        assert sample.pixel_values is None


@pytest.mark.parametrize(
    "name",
    ["../x.png", "/etc/passwd", "a/../../x.png", "link.png", "loop", "x\x00.png", "\ud800"],
)
def test_paths_stay_inside(tmp_path, toy, name):
    """No `..`, no absolute path and no link leads out of the image root."""
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "link.png").symlink_to(tmp_path / "x.png")
    (root / "loop").symlink_to(root / "loop")
    record = {"image": name, "short": ["a red circle"]}
    (root / "data.jsonl").write_text(json.dumps(record))
    sample = CaptionDataset(root / "data.jsonl", toy.layout, toy.processor)[0, 0]
    assert "lies outside" in sample.error


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    noise = Image.effect_noise((24, 18), 60)
    noise.convert("P" if kind == "GIF" else "RGB").save(file, kind)
    return file.getvalue()


@FUZZ
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]),
    offset=st.integers(0, 4000),
    new=st.binary(min_size=1, max_size=6),
    cut=st.booleans(),
)
def test_pictures(place, kind, offset, new, cut):
    """Bytes overwritten or cut off: a picture or a clear error."""
    content = picture(kind)
    content = overwritten(content, offset % len(content), new, cut)
    (place / "picture").write_bytes(content)
    image = refused(open_image, place / "picture")
    assert image is None or image.mode == "RGB"


def shard() -> bytes:
    """A shard with a good sample, a name that leads outside, and a text that is no UTF-8."""
    members = {
        "0.jpg": picture("JPEG"),
        "0.txt": b"a red circle",
        "../1.jpg": b"x",
        "1.txt": b"\xff",
    }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@FUZZ
@given(
    offset=st.integers(0, 5000),
    new=st.binary(min_size=1, max_size=8),
    cut=st.booleans(),
)
def test_tars(place, offset, new, cut):
    """Bytes overwritten or cut off: records that were whole, the rest counted or refused."""
    shards = place / "shards"
    shards.mkdir(exist_ok=True)
    # Most of what stands behind the first 3,000 bytes is padding.
    (shards / "00000.tar").write_bytes(overwritten(shard(), offset % 3000, new, cut))
    try:
        convert_command.main([str(shards), str(place / "out.jsonl")])
    except SystemExit as stop:
        assert len(str(stop.code)) > 10
        OUTCOMES["tar", "clear error"] += 1
    else:
        OUTCOMES["tar", "read, the rest counted"] += 1


# ---- Other people's captions and test sets


SOURCES = {
    "conversations.json": [
        {
            "image": "0.jpg",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}],
        }
    ],
    "list.json": [{"image": "0.jpg", "caption": ["a", "b"], "split": "train"}],
    "lines.jsonl": {"file_name": "0.jpg", "text": "a", "group": 1, "part": [0, 1]},
    "narratives.jsonl": {"dataset_id": "mscoco", "image_id": "0", "caption": "a"},
    "coco.json": {
        "images": [{"id": 1, "file_name": "0.jpg", "domain": "in-domain"}],
        "annotations": [{"image_id": 1, "caption": "a"}],
    },
    "karpathy.json": {
        "images": [{"filename": "0.jpg", "split": "train", "sentences": [{"raw": "a"}]}]
    },
    "mapping.json": {"0.jpg": ["a", "b"]},
}


def replaced(content, value, index: int):
    """JSON with one of its values, at any depth, replaced."""
    content = json.loads(json.dumps(content))
    places = []

    def visit(node):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in list(pairs):
            places.append((node, key))
            if isinstance(inner, dict | list):
                visit(inner)

    visit(content)
    owner, key = places[index % len(places)]
    owner[key] = value
    return content


def read_or_refused(kind: str, source: Path, place: Path) -> None:
    """convert, retrieval and nocaps' domains of one source: read, counted, or one clear error."""
    try:
        counts = convert(source, place / "out.jsonl", place)
        assert counts["written"] > 0
        OUTCOMES[kind, "read, the rest counted"] += 1
    except InputError as error:
        assert len(str(error)) > 10
        OUTCOMES[kind, "clear error"] += 1
    for read in (read_retrieval, read_domains):
        with contextlib.suppress(InputError):
            read(source, place)


@FUZZ
@given(st.sampled_from(list(SOURCES)), st.integers(0, 20), hostile_values)
def test_sources_of_json(place, name, index, value):
    (place / "0.jpg").write_bytes(b"")
    content = json.dumps(replaced(SOURCES[name], value, index))
    (place / name).write_text(content)
    read_or_refused("sources of JSON", place / name, place)


TABLE = b'image,caption,caption 2\n0.jpg,"a ""red"" circle,\nbig",two\n0.jpg,three\n'
NAMES = b"n01440764 tench, Tinca\nn01443537 goldfish\n0 one\n1 two\n"


@FUZZ
@given(
    ending=st.sampled_from([".csv", ".tsv", ".txt", ".jsonl", ".json"]),
    offset=st.integers(0, 80),
    new=st.binary(min_size=1, max_size=8) | st.sampled_from([b'"', b"\n", b",", b"\t", b"\r"]),
    cut=st.booleans(),
)
def test_sources_of_bytes(place, ending, offset, new, cut):
    """Tables, lines and lists of classes with bytes overwritten or cut off."""
    (place / "0.jpg").write_bytes(b"")
    content = (
        TABLE if ending in (".csv", ".tsv", ".txt") else json.dumps(SOURCES["list.json"]).encode()
    )
    source = place / f"source{ending}"
    source.write_bytes(overwritten(content, offset, new, cut))
    read_or_refused(f"sources {ending}", source, place)

    for folder in ("n01440764", "n01443537", "0", "1"):
        (place / "classes" / folder).mkdir(parents=True, exist_ok=True)
        (place / "classes" / folder / "0.jpg").write_bytes(b"")
    (place / "names.txt").write_bytes(overwritten(NAMES, offset % len(NAMES), new, cut))
    refused(read_imagenet, place / "classes", place / "names.txt")
    shutil.rmtree(place / "classes")


# ---- Models, adapters, runs


@FUZZ
@given(st.integers(0, 60), hostile_values)
@example(0, {"a": 1})
def test_configs(place, index, value):
    """The model's configs, an adapter's, and a run's own, with one field replaced."""
    for name, read in (
        ("config.json", LlavaConfig.from_pretrained),
        ("preprocessor_config.json", ImageProcessor.from_pretrained),
    ):
        good = json.loads((TOY_MODEL / name).read_text())
        (place / name).write_text(json.dumps(changed(good, value, index)))
        refused(read, place)

    adapter = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
    }
    (place / "adapter_config.json").write_text(json.dumps(changed(adapter, value, index)))
    refused(read_adapter_config, place)

    out = place / "out"
    out.mkdir(exist_ok=True)
    run = vars(train.TrainConfig())
    (out / "config.json").write_text(json.dumps(changed(run, value, index)))
    refused(read_run_config, out)


@pytest.mark.parametrize("content", BYTES, ids=range(len(BYTES)))
def test_bytes_instead_of_json(tmp_path, content):
    for name, read in (
        ("config.json", LlavaConfig.from_pretrained),
        ("preprocessor_config.json", ImageProcessor.from_pretrained),
        ("tokenizer.json", TextTokenizer),
        ("adapter_config.json", read_adapter_config),
        ("config.json", read_run_config),
    ):
        (tmp_path / name).write_bytes(content)
        if content == b'{"a": 1e999}':  # it is JSON, so a reader may find nothing wrong
            refused(read, tmp_path)
        else:
            with pytest.raises(InputError):
                read(tmp_path)


@FUZZ
@given(st.integers(0, 40), hostile_values)
@example(17, {})  # on an unknown text the library panics, which is no Exception
@example(22, {})  # a model that wants an [UNK] which it has not
def test_tokenizers(place, index, value):
    """A tokenizer with one field replaced is refused, or encodes any text."""
    good = json.loads((TOY_MODEL / "tokenizer.json").read_text())
    (place / "tokenizer.json").write_text(json.dumps(changed(good, value, index)))
    tokenizer = refused(TextTokenizer, place)
    if tokenizer is not None:
        tokenizer.encode_sentences("a red circle. <image> \x00", 3)


@pytest.mark.parametrize("content", SAFETENSORS, ids=range(len(SAFETENSORS)))
def test_safetensors(tmp_path, toy, content):
    """As weights and as soft prompts: refused by name, whatever size the header claims."""
    (tmp_path / "config.json").write_text((TOY_MODEL / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        Llava.from_pretrained(tmp_path)

    (tmp_path / "soft_prompts.safetensors").write_bytes(content)
    embedding = toy.model.language_model.embed_tokens
    with pytest.raises(InputError, match="soft_prompts"):
        load_adapter(toy.model, tmp_path, [1, 2], [3])
    # The soft prompts were added before the file was found to be broken.
    toy.model.language_model.embed_tokens = embedding


# ---- Pickle


def test_pickle_beside_the_weights_is_never_opened(tmp_path):
    """A .bin, .pt or .pkl that would write a file when it is opened stays shut."""
    trap = tmp_path / "opened"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (trap,)

    content = pickle.dumps(Malicious())
    pickle.loads(content)
    assert trap.exists()  # the trap works
    trap.unlink()

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text((TOY_MODEL / name).read_text())
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pkl",
        "consolidated.00.pth",
        "adapter_model.bin",
        "optimizer.pt",
    ):
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="Pickle"):
        load_base(folder, "cpu")

    adapter = '{"peft_type": "LORA", "target_modules": ["q_proj"]}'
    (folder / "adapter_config.json").write_text(adapter)
    with pytest.raises(InputError):
        load_adapter(load_base(TOY_MODEL, "cpu").model, folder, [1], [2])

    # Nor under the name of something harmless.
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(content)
    with pytest.raises(InputError):
        load_base(folder, "cpu")
    with pytest.raises(InputError):
        load_adapter(load_base(TOY_MODEL, "cpu").model, folder, [1], [2])
    assert not trap.exists()


MODULES = sorted(
    [
        *PROJECT.glob("*.py"),
        *PROJECT.glob("formats/*.py"),
        *PROJECT.glob("runtime/*.py"),
        *PROJECT.glob("fast/*.py"),
        *PROJECT.glob("backbones/*.py"),
    ]
)
OPENS_PICKLE = re.compile(
    r"import pickle|torch\.load\b|torch\.save\b|object_list|_object\(|(?<![.\w])(eval|exec)\("
)


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PROJECT)) for path in MODULES])
def test_no_module_can_read_pickle(path):
    text = path.read_text()
    if path.name == "processes.py":
        # Pickled, but no file: what the processes of one job tell one another while it runs.
        text = text.replace("dist.all_gather_object(messages, message)", "")
    assert not OPENS_PICKLE.search(text)


def test_outcomes_are_told():
    """With -s: how many of the files above ended how."""
    for (kind, outcome), count in sorted(OUTCOMES.items()):
        print(f"\n{kind}: {count} {outcome}", end="")
