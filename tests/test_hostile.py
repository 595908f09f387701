"""Files from strangers: whatever is in them, one clear error or a count by reason, and nothing is executed.

NANOVLADVA_FUZZ=2000 python -m pytest tests/test_hostile.py -s    more of them, and how many ended how
"""

import io
import json
import os
import pickle
import re
import struct
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from data import CaptionDataset, DataError, ImageProcessor, TextTokenizer, open_image, parse_record
from eval import TOY_MODEL, load_base
from examples import prepare
from lora import AdapterError, load_adapter, read_lora_config
from model import CheckpointError, Llava, LlavaConfig

OUTCOMES = Counter()
FUZZ = settings(
    max_examples=int(os.environ.get("NANOVLADVA_FUZZ", 40)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
MODULES = [
    Path(train.__file__).with_name(f"{name}.py") for name in ("model", "lora", "losses", "data", "eval", "train")
]

# Values where something else is expected, and bytes that once broke a reader somewhere.
HOSTILE = [
    None,
    True,
    -1,
    0,
    2**63,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    "a" * 5000,
]
BYTES = [
    b"",
    b"\x00" * 16,
    b"\xff" * 64,
    b"{",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\x80\x04.",
    b"version https://git-lfs",
]
BYTES += [b"<!DOCTYPE html>", b'{"a": 1e999}', b'"\xff"', b"\xef\xbb\xbf{}", b"null", b"PK\x03\x04", b"9" * 10_000]
HEADERS = [
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}',
    b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
]
HEADERS += [b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}', b'{"a":{}}', b"[]", b"{"]
HEADERS += [b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}', b'{"__metadata__":{"format":1}}', b""]
SAFETENSORS = BYTES + [
    struct.pack("<Q", n) + header + b"\0" * 16 for header in HEADERS for n in (len(header), 2**60, 3)
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def toy_run():
    return load_base(TOY_MODEL, "cpu")


def refused(errors, function, *args):
    """The function returns, or raises one of its own errors with a message of its own."""
    kind = getattr(function, "__qualname__", "").replace("test_configs.<locals>.<lambda>", "a run's config.json")
    try:
        result = function(*args)
        OUTCOMES[kind, "read"] += 1
        return result
    except errors as error:
        assert len(str(error)) > 5
        OUTCOMES[kind, "clear error"] += 1
        return None


def changed(good, rng_value, index):
    """A JSON object with one field, also of an object inside of it, replaced."""
    content = json.loads(json.dumps(good))
    places = [(content, key) for key in content]
    places += [(value, key) for value in content.values() if isinstance(value, dict) for key in value]
    owner, key = places[index % len(places)]
    owner[key] = rng_value
    return content


@FUZZ
@given(st.dictionaries(st.sampled_from(["image", "short", "long", "captions", "group", "part"]), json_values))
def test_records(record):
    refused(DataError, parse_record, json.dumps(record).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "line", BYTES + [json.dumps({"image": "a.png", "short": [value]}).encode() for value in HOSTILE]
)
def test_lines_of_the_corpus(place, toy_run, line):
    """Alone a faulty line stops, with its number; a record that is none never gets as far as a Sample."""
    (place / "data.jsonl").write_bytes(line)
    dataset = refused(DataError, CaptionDataset, place / "data.jsonl", toy_run.layout, toy_run.processor)
    if dataset is not None:
        assert "record 0" in dataset[0, 0]  # there is no a.png: the reason, not a Sample


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link.png", "loop", "x\x00.png", "\ud800"]
)
def test_paths_stay_inside(tmp_path, toy_run, name):
    """No `..`, no absolute path and no link leads out of the image root."""
    Image.new("RGB", (30, 30)).save(tmp_path / "secret.png")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop").symlink_to(root / "loop")
    (root / "data.jsonl").write_text(json.dumps({"image": name, "short": ["a red circle"]}))
    sample = CaptionDataset(root / "data.jsonl", toy_run.layout, toy_run.processor)[0, 0]
    assert isinstance(sample, str) and "lies outside" in sample


@FUZZ
@given(st.integers(0, 60), st.sampled_from(HOSTILE) | json_values)
@example(0, {"a": 1})
def test_configs(place, index, value):
    """config.json, preprocessor_config.json, adapter_config.json, and a run's own, with one field replaced."""
    for name, errors, read in (
        ("config.json", CheckpointError, LlavaConfig.from_pretrained),
        ("preprocessor_config.json", DataError, ImageProcessor.from_pretrained),
    ):
        (place / name).write_text(json.dumps(changed(json.loads((TOY_MODEL / name).read_text()), value, index)))
        refused(errors, read, place)
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(changed(adapter, value, index)))
    refused(AdapterError, read_lora_config, place / "adapter_config.json")
    out = place / "out"
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(changed(vars(train.TrainConfig()), value, index)))
    refused(DataError, lambda: train.settings({"resume": True, "out": str(out)}))


@pytest.mark.parametrize("content", BYTES, ids=range(len(BYTES)))
def test_bytes_instead_of_json(tmp_path, content):
    for name, errors, read in (
        ("config.json", CheckpointError, LlavaConfig.from_pretrained),
        ("preprocessor_config.json", DataError, ImageProcessor.from_pretrained),
        ("tokenizer.json", DataError, TextTokenizer),
        ("adapter_config.json", AdapterError, lambda folder: read_lora_config(folder / "adapter_config.json")),
        ("config.json", DataError, lambda folder: train.settings({"resume": True, "out": str(folder)})),
    ):
        (tmp_path / name).write_bytes(content)
        if content not in (b'{"a": 1e999}',):
            with pytest.raises(errors):
                read(tmp_path)
        else:
            refused(errors, read, tmp_path)


@FUZZ
@given(st.integers(0, 40), st.sampled_from(HOSTILE) | json_values)
@example(17, {})  # on an unknown text the library panics, which is no Exception
@example(22, {})  # a model that wants an [UNK] which it has not
def test_tokenizers(place, index, value):
    content = json.loads((TOY_MODEL / "tokenizer.json").read_text())
    (place / "tokenizer.json").write_text(json.dumps(changed(content, value, index)))
    tokenizer = refused(DataError, TextTokenizer, place)
    if tokenizer is not None:
        tokenizer.encode_sentences("a red circle. <image> \x00", 3)


@pytest.mark.parametrize("content", SAFETENSORS, ids=range(len(SAFETENSORS)))
def test_safetensors(tmp_path, toy_run, content):
    """As weights, as an adapter, as soft prompts: refused by the file's name, whatever size its header claims."""
    (tmp_path / "config.json").write_text((TOY_MODEL / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        Llava.from_pretrained(tmp_path)
    (tmp_path / "soft_prompts.safetensors").write_bytes(content)
    embedding = toy_run.model.language_model.embed_tokens
    with pytest.raises(AdapterError, match="soft_prompts"):
        load_adapter(toy_run.model, tmp_path, [1, 2], [3])
    toy_run.model.language_model.embed_tokens = embedding


def picture(kind):
    file = io.BytesIO()
    Image.effect_noise((24, 18), 60).convert("P" if kind == "GIF" else "RGB").save(file, kind)
    return file.getvalue()


@FUZZ
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]),
    st.integers(0, 4000),
    st.binary(min_size=1, max_size=6),
    st.booleans(),
)
def test_pictures(place, kind, offset, bytes_, cut):
    """Bytes overwritten or cut off: a picture or a DataError."""
    content = picture(kind)
    offset %= len(content)
    content = content[:offset] if cut else content[:offset] + bytes_ + content[offset + len(bytes_) :]
    (place / "picture").write_bytes(content)
    image = refused(DataError, open_image, place / "picture")
    assert image is None or image.mode == "RGB"


@FUZZ
@given(st.integers(0, 5000), st.binary(min_size=1, max_size=8), st.booleans())
def test_tars(place, offset, bytes_, cut):
    """img2dataset's shards with bytes overwritten or cut off: records that were whole, the rest counted or refused."""
    shards = place / "shards"
    shards.mkdir(exist_ok=True)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (
            ("0.jpg", picture("JPEG")),
            ("0.txt", b"a red circle"),
            ("../1.jpg", b"x"),
            ("1.txt", b"\xff"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = file.getvalue()
    offset %= 3000
    content = content[:offset] if cut else content[:offset] + bytes_ + content[offset + len(bytes_) :]
    (shards / "00000.tar").write_bytes(content)
    arguments = ["convert", str(shards), str(place / "out.jsonl")]
    try:
        prepare.main(arguments)
        OUTCOMES["tar", "read, the rest counted"] += 1
    except SystemExit as stop:
        assert stop.code in (0, None) or len(str(stop.code)) > 10
        OUTCOMES["tar", "clear error"] += 1


def test_pickle_beside_the_weights_is_never_opened(tmp_path):
    """A .bin, .pt, .pkl that would write a file when it is opened stays shut, also where it is all there is."""
    trap = tmp_path / "opened"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (trap,)

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text((TOY_MODEL / name).read_text())
    names = ("pytorch_model.bin", "model.pt", "model.pkl", "consolidated.00.pth", "adapter_model.bin", "optimizer.pt")
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Malicious()))
    pickle.loads(pickle.dumps(Malicious()))
    assert trap.exists()  # the trap works
    trap.unlink()
    with pytest.raises(CheckpointError, match="Pickle"):
        load_base(folder, "cpu")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    with pytest.raises(AdapterError):
        load_adapter(load_base(TOY_MODEL, "cpu").model, folder, [1], [2])
    for name in ("model.safetensors", "adapter_model.safetensors"):  # nor under the name of something harmless
        (folder / name).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        load_base(folder, "cpu")
    assert not trap.exists()


def test_no_module_can_read_pickle():
    pattern = r"import pickle|torch\.load\b|torch\.save\b|object_list|_object\(|(?<![.\w])(eval|exec)\("
    for path in MODULES:
        assert not re.search(pattern, path.read_text()), path
    print(*(f"\n{kind}: {count} {outcome}" for (kind, outcome), count in sorted(OUTCOMES.items())))
