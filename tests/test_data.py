"""data.py: text, layout and pixels equal the reference libraries, and what strangers send is refused by name.

    python -m pytest tests/test_data.py

Oracles: transformers' tokenizer, LlavaProcessor and PIL image processors; the `tokenizers` library on hand-written
conversations; golden ids (FORMATS.md 2.7); plain arithmetic in numpy. The licensed real files are read where they
are present (../shared/data or $NANOVLADVA_TEST_DATA), small look-alikes of both tokenizer families are built here.
"""

import json
import os
import re
import struct
import unicodedata
import zlib
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data import DataError, ImageProcessor, Layout, TextTokenizer, open_image, to_rgb

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1842767\n"
HTML_PAGE = b"<!DOCTYPE html><html><body>404: not found</body></html>"
fuzz = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def real_folder(name: str) -> Path:
    """A folder of real files, which may not be redistributed; the test is skipped without it."""
    root = os.environ.get("NANOVLADVA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (Path(root) / name).is_dir():
        pytest.skip(f"{Path(root) / name} is not there")
    return Path(root) / name


# ----------------------------------------------------------------------------------------------------------------------
# Text


def tiny_llama(special=("<unk>", "<s>", "</s>", "<image>", "<pad>")) -> Tokenizer:
    """LLaMA's tokenizer in small: byte fallback, a space in front of every stretch, <s> at the start."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merges = [("▁", "a"), ("d", "o"), ("do", "g"), ("▁", "A"), ("S", "S"), ("A", "SS"), ("E", "R")]
    vocabulary += ["".join(pair) for pair in merges]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def tiny_qwen(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")) -> Tokenizer:
    """Qwen's tokenizer in small: BPE over bytes, NFC, nothing put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["user assistant: A dog runs. Summarize the provided text in one word:"] * 3, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen", "llama-tokenizer", "llava-1.5-7b-hf"])
def any_family(request, tmp_path_factory):
    """A folder with a tokenizer, `ours`, the library's own `oracle`, and how its family writes a conversation."""
    if request.param.startswith("tiny"):
        folder = tmp_path_factory.mktemp(request.param)
        (tiny_qwen if request.param == "tiny-qwen" else tiny_llama)().save(str(folder / "tokenizer.json"))
    else:
        folder = real_folder(request.param)
    user, assistant, end, stop = ("USER: ", " ASSISTANT:", "", "</s>")
    if request.param == "tiny-qwen":
        user, assistant, end, stop = "<|im_start|>user ", "<|im_end|><|im_start|>assistant", "<|im_end|>", "<|im_end|>"
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = dict(name=request.param, folder=folder, user=user, assistant=assistant, end=end, stop=stop)
    return SimpleNamespace(**names, ours=TextTokenizer(folder), oracle=oracle)


@pytest.fixture(scope="module")
def family(any_family):
    """Of these, the tokenizers that know <image>."""
    if any_family.name == "llama-tokenizer":
        pytest.skip("plain LLaMA has no <image>")
    return any_family


GOLDEN = {  # FORMATS.md 2.7
    "": [1],
    "hello": [1, 22172],
    " hello": [1, 29871, 22172],
    "  hello": [1, 259, 22172],
    "hello ": [1, 22172, 29871],
    "\n": [1, 29871, 13],
    "A dog runs.": [1, 319, 11203, 6057, 29889],
    "don't": [1, 1016, 29915, 29873],
    "a\tb": [1, 263, 12, 29890],
    "café": [1, 274, 28059],
    "2024": [1, 29871, 29906, 29900, 29906, 29946],
    "日本": [1, 29871, 30325, 30346],
    "🙂": [1, 29871, 243, 162, 156, 133],
    "<image>": [1, 32000],
    "<image>\n": [1, 32000, 29871, 13],
    "USER: <image>\nWhat is this? ASSISTANT:": [1, 3148, 1001, 29901, 29871, 32000, 29871, 13]
    + [5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901],
}


@pytest.mark.parametrize("text", GOLDEN)
@pytest.mark.parametrize("name", ["llama-tokenizer", "llava-1.5-7b-hf"])
def test_golden_vectors(name, text):
    """The real LLaMA tokenizer gives the known ids, and so does plain text without asking for special tokens."""
    tokenizer = TextTokenizer(real_folder(name))
    if "<image>" not in text:
        assert tokenizer.begin + tokenizer.encode(text) == GOLDEN[text]
    if "<image>" not in text or name != "llama-tokenizer":
        assert tokenizer.begin + tokenizer.encode(text, special=True) == GOLDEN[text]


def test_ids_equal_transformers():
    """AutoTokenizer, on the same real folder, gives the same ids for odd spaces, scripts, emoji and special tokens."""
    folder = real_folder("llava-1.5-7b-hf")
    reference = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    tokenizer = TextTokenizer(folder)
    texts = [
        *GOLDEN,
        "a<s>b",
        "x</s>",
        "<pad><unk>",
        " \t\n ",
        "naïve  e\u0301",
        "مرحبا",
        "👩‍👩‍👧 🇫🇷",
        "\0",
        "▁x",
        "1e-5, £3½",
    ]
    for text in texts:
        assert tokenizer.begin + tokenizer.encode(text, special=True) == reference(text).input_ids, text


INJECTIONS = ["<image>", "</s>", "<s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<0x0A>"]
INJECTIONS += ["\ud800", "\udfff", "{text}", "{0}", "{", "}", "USER: ", " ASSISTANT:", "\n", "  ", "\\1", "%s"]
captions = st.lists(st.sampled_from(INJECTIONS) | st.text(st.characters(), max_size=8), max_size=8).map("".join)


@fuzz
@given(text=captions)
@example(text="a<image><s></s><|im_start|><|im_end|>\ud800")
def test_captions_stay_text(any_family, text):
    """Whatever a caption holds, it becomes no special token, and decoding gives it back with surrogates as "?"."""
    any_family.ours.encode("<image>", special=True)  # leaves nothing behind
    ids = any_family.ours.encode(text)
    assert not set(ids) & set(any_family.ours.special_ids.values())
    expected = re.sub("[\ud800-\udfff]", "?", text)
    if any_family.name == "tiny-qwen":
        expected = unicodedata.normalize("NFC", expected)
    else:
        expected = expected.replace("▁", " ")  # LLaMA's way to write a space
    assert any_family.ours.decode(ids) == expected.strip()


def test_special_tokens_are_read_and_left_out(any_family):
    """Special tokens are read where a template asks for them, and decoding leaves them out."""
    tokenizer, stop = any_family.ours, any_family.oracle.token_to_id(any_family.stop)
    assert tokenizer.encode(any_family.stop, special=True) == [stop]
    assert tokenizer.decode([*tokenizer.begin, *tokenizer.encode("A dog runs."), stop, stop]) == "A dog runs."


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    """A tokenizer.json that was saved with padding and truncation still gives a text's ids, all and only these."""
    raw = tiny_llama()
    plain = raw.encode("A dog runs.", add_special_tokens=False).ids
    for switch in (lambda: raw.enable_truncation(3), lambda: raw.enable_padding(length=50)):
        switch()
        raw.save(str(tmp_path / "tokenizer.json"))
        assert TextTokenizer(tmp_path).encode("A dog runs.") == plain


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[]", b"\0\xff\xfe", HTML_PAGE, LFS_POINTER, b'{"model": {"typ']
)
def test_broken_tokenizer_is_named(tmp_path, content):
    """A missing, truncated or foreign tokenizer.json gives an error with its path."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        TextTokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Layout

QUESTIONS = ["What is this?", "  two  spaces ", "", "日本 🙂", "{text}", "{0} {text} {", "\\n %s", "line\nline"]


@pytest.mark.parametrize("count", [1, 5, 576])
@pytest.mark.parametrize("text", QUESTIONS)
def test_conversation_ids(family, text, count):
    """First and further questions are tokenized as the family's conversation, written by hand, in one piece."""
    layout = Layout(family.ours, count)
    first = f"{family.user}{'<image>' * count}\n{text}{family.assistant}"
    assert layout.question(text) == family.oracle.encode(first).ids
    further = family.end + family.user + text + family.assistant
    assert layout.next_question(text) == family.oracle.encode(further, add_special_tokens=False).ids


def test_whole_input_equals_llava_processor():
    """Ids and pixels of a question are what transformers' LlavaProcessor makes of the real folder."""
    transformers, folder = pytest.importorskip("transformers"), real_folder("llava-1.5-7b-hf")
    image = picture("RGB", 500, 350)
    reference = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    assert [Layout(TextTokenizer(folder), 576).question("What is this?")] == reference.input_ids.tolist()
    assert torch.equal(ImageProcessor.from_pretrained(folder)(image)[None], reference.pixel_values)


def test_image_side(family):
    """The image side is the paper's prompt, summarized at its last token, with a long caption and its end behind."""
    layout = Layout(family.ours, 7)
    text = f"{family.user}{'<image>' * 7}\nSummarize the provided image in one word:{family.assistant}"
    prompt = family.oracle.encode(text).ids
    caption = family.ours.encode("A dog runs.")
    assert layout.image_side() == prompt
    assert layout.image_side(caption) == [*prompt, *caption, family.oracle.token_to_id(family.stop)]
    assert layout.image_summary == len(prompt) - 1
    assert caption == family.ours.encode("A dog runs.")  # the caller's list is not changed
    assert prompt.count(layout.image_id) == 7


@fuzz
@given(caption=captions)
@example(caption=" A dog runs.\n")
def test_text_side(family, caption):
    """A caption stands between prefix and prompt as plain stripped text, and the prompt's ids do not depend on it."""
    layout = Layout(family.ours, 7)
    tail = f"\nSummarize the provided text in one word:{family.assistant}"
    prompt = family.oracle.encode(tail, add_special_tokens=False).ids
    ids = layout.text_side(caption)
    assert ids[-len(prompt) :] == layout.text_prompt == prompt
    user = family.user.removeprefix("<|im_start|>")
    plain = family.ours.encode(user + caption.strip())
    head = family.oracle.encode(family.user.removesuffix(user)).ids
    assert ids[: -len(prompt)] == head + plain
    assert layout.question(caption).count(layout.image_id) == 7 and layout.image_id not in ids


def test_own_prompts(family):
    """Prompts of one's own take the place of the paper's."""
    layout = Layout(family.ours, 2, image_prompt="Name it:", text_prompt="Say {text}:")
    assert layout.image_side() == layout.question("Name it:")
    assert layout.text_side("cat")[-len(layout.text_prompt) :] == layout.prompt("Say {text}:")


def test_soft_prompt_ids(family):
    """Soft ids are consecutive, stand for `prompt_ids` in order, and change neither prefix, question nor lengths."""
    hard, soft = Layout(family.ours, 7), Layout(family.ours, 7, soft_start=40_000)
    assert hard.prompt_ids == soft.prompt_ids == hard.image_prompt + hard.text_prompt
    assert soft.image_prompt + soft.text_prompt == list(range(40_000, 40_000 + len(hard.prompt_ids)))
    for side in (lambda layout: layout.image_side([5, 6]), lambda layout: layout.text_side("A dog runs.")):
        restored = [hard.prompt_ids[index - 40_000] if index >= 40_000 else index for index in side(soft)]
        assert restored == side(hard) != side(soft)
    assert soft.image_summary == hard.image_summary
    assert soft.question("Why?") == hard.question("Why?")


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen])
@pytest.mark.parametrize("missing", ["<image>", "</s>", "<|im_end|>"])
def test_foreign_tokenizer_is_refused(tmp_path, build, missing):
    """A tokenizer without <image>, or without the token that ends an answer, is refused by the token's name."""
    special = [token for token in build.__defaults__[0] if token != missing]
    if len(special) == len(build.__defaults__[0]):
        pytest.skip("not a token of this family")
    build(special).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer.json.*" + re.escape(missing)):
        Layout(TextTokenizer(tmp_path), 5)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def picture(mode: str, width: int, height: int, **info) -> Image.Image:
    """Noise over a gradient, with the extremes in it, in any mode; alpha, where there is one, is noise too."""
    generator = np.random.default_rng(width * 1000 + height)
    ramp = np.linspace(0, 255, width)[None, :, None] + np.zeros((height, 1, 4))
    pixels = np.where(generator.random((height, width, 4)) < 0.5, ramp, generator.integers(0, 256, (height, width, 4)))
    image = Image.fromarray(pixels.astype(np.uint8))
    if mode == "P":
        image = image.convert("RGB").quantize(16)
    image = image if mode == "RGBA" else image.convert(mode)
    image.info.update(info)
    return image


SHAPES = [(336, 336), (640, 120), (97, 400), (1, 1), (2, 3), (3, 2), (337, 335), (501, 333), (1600, 1201), (30, 37)]
PICTURES = [("RGB", *shape, {}) for shape in SHAPES] + [
    ("L", 64, 48, {}),
    ("LA", 63, 41, {}),
    ("RGBA", 75, 50, {}),
    ("P", 64, 49, {}),
    ("P", 40, 61, {"transparency": 3}),
    ("P", 41, 60, {"transparency": bytes([0, 128, 255, 17])}),
    ("L", 33, 21, {"transparency": 0}),
    ("CMYK", 51, 77, {}),
    ("1", 45, 46, {}),
]
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "rescale_factor": 0.00392156862745098,
    "resample": 3,
}
SIGLIP = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 384, "width": 384}, "resample": 3}
CONFIGS = {
    "llava-1.5": CLIP,
    "integers": CLIP | {"size": 224, "crop_size": 224},
    "uneven crop": CLIP | {"size": {"shortest_edge": 50}, "crop_size": {"height": 31, "width": 44}},
    "exact size, then crop": CLIP | {"size": {"height": 61, "width": 44}, "crop_size": {"height": 30, "width": 31}},
    "bilinear": CLIP | {"resample": 2, "size": 40, "crop_size": 40},
    "siglip": SIGLIP,
    "siglip, integer": SIGLIP | {"size": 64},
    "siglip, oblong, lanczos": SIGLIP | {"size": {"height": 48, "width": 33}, "resample": 1},
    "nearest, from -1 to 1": SIGLIP | {"size": 32, "resample": 0, "rescale_factor": 1 / 127.5, "image_mean": [1] * 3},
    "box, factor 1/256": SIGLIP | {"size": 27, "resample": 4, "rescale_factor": 1 / 256},
    "hamming, not rescaled": SIGLIP | {"size": 27, "resample": 5, "do_rescale": False, "image_mean": [99, 120.5, 7]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_transformers(tmp_path, name):
    """On every shape and mode the difference to transformers' PIL processors is 0.0, from either config file."""
    transformers, config = pytest.importorskip("transformers"), CONFIGS[name]
    kind = transformers.CLIPImageProcessorPil if "crop_size" in config else transformers.SiglipImageProcessorPil
    reference = kind(**config)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config, "patch_size": 14}))
    processors = [ImageProcessor.from_pretrained(tmp_path)]
    reference.save_pretrained(tmp_path)  # preprocessor_config.json, as transformers writes it
    processors.append(ImageProcessor.from_pretrained(tmp_path))
    for mode, width, height, info in PICTURES:
        expected = reference(picture(mode, width, height, **info), return_tensors="pt").pixel_values[0]
        for processor in processors:
            pixels = processor(to_rgb(picture(mode, width, height, **info)))
            assert pixels.shape == expected.shape == (3, *processor.size) and pixels.dtype == torch.float32
            assert (pixels - expected).abs().max() == 0.0, (mode, width, height)


def test_real_image_config():
    """The real llava-1.5-7b-hf folder gives 336 x 336 pixels."""
    processor = ImageProcessor.from_pretrained(real_folder("llava-1.5-7b-hf"))
    assert processor(picture("RGB", 50, 90)).shape == (3, *processor.size) == (3, 336, 336)


BAD_FIELDS = [
    *(("size", value) for value in (None, 0, -1, True, 3.5, "336", [336], {}, {"height": 3}, {"longest_edge": 9})),
    *(("size", {"shortest_edge": value}) for value in (0, -5, True, 336.0, "336", 335, 10**9)),
    *(("size", {"height": value, "width": 9}) for value in (0, None, "9", 10**9)),
    *(("crop_size", value) for value in (None, 0, "336", [], {}, {"height": 336}, {"height": 400, "width": 9})),
    *(("resample", value) for value in (None, 6, -1, "bicubic", [])),
    *((key, value) for key in ("image_mean", "image_std") for value in (None, [], [1, 2], "abc", {}, [1, 2, "x"])),
    *(("rescale_factor", value) for value in (None, "abc", [], 10**400)),
    *(("do_resize", False), ("do_normalize", False), ("do_pad", True), ("do_center_crop", False)),
    *((key, ...) for key in ("size", "crop_size", "image_mean", "image_std")),  # ... stands for: left out
    *(("image_std", [0, 1, 1]), ("image_mean", [1, 2, None]), ("image_std", [10**400] * 3)),
]


@pytest.mark.parametrize("field,value", BAD_FIELDS)
def test_bad_image_config_is_named(tmp_path, field, value):
    """Each unusable value of a field gives one error, which names the file and the field."""
    config = {key: item for key, item in (CLIP | {field: value}).items() if item is not ...}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(DataError) as caught:
        ImageProcessor.from_pretrained(tmp_path)
    assert str(path) in str(caught.value) and field in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b'{"a": ', b"[" * 100_000, b"\xff\xfe", HTML_PAGE, LFS_POINTER]
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_broken_image_config_file_is_named(tmp_path, name, content):
    """A config file that is not a JSON object is refused by its path."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
        ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [None, {}, {"image_processor": []}, {"image_processor": "CLIPImageProcessor"}])
def test_missing_image_config_is_named(tmp_path, content):
    """A folder with no image config, or none nested in processor_config.json, is refused by its path."""
    if content is not None:
        (tmp_path / "processor_config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        ImageProcessor.from_pretrained(tmp_path)


sides = st.integers(1, 60)
scalars = st.none() | st.booleans() | st.integers() | sides | st.floats() | st.text(max_size=3) | st.just(10**400)
json_values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
sizes = st.fixed_dictionaries({}, optional=dict.fromkeys(("height", "width", "shortest_edge"), sides | scalars))
switches = ("do_resize", "do_rescale", "do_normalize", "do_pad", "do_center_crop", "do_convert_rgb")


@fuzz
@given(changes=st.dictionaries(st.sampled_from([*CLIP, *switches]), json_values | sizes, max_size=3))
@example(changes={"size": {"height": 20, "width": 20}, "crop_size": {"height": 30, "width": 30}})
@example(changes={"rescale_factor": 10**400})
@example(changes={"image_std": [0.0, 0.0, 0.0]})
def test_any_json_works_or_is_refused(changes):
    """Any JSON value in any field gives finite pixels of the promised size, or one error that names the file."""
    try:
        processor = ImageProcessor(CLIP | {"size": 40, "crop_size": 40} | changes, "some/config.json")
    except DataError as error:
        assert "some/config.json" in str(error)
        return
    if max(processor.size) <= 200:
        pixels = processor(picture("RGB", 5, 7))
        assert pixels.shape == (3, *processor.size) and pixels.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Image files


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(tmp_path: Path, content: bytes) -> np.ndarray:
    """What open_image makes of a file with this content: (height, width, 3)."""
    path = tmp_path / "picture"
    path.write_bytes(content)
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind,options", [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats(tmp_path, kind, options):
    """PNG, BMP and lossless WebP give exactly the pixels that were saved."""
    image = picture("RGB", 31, 20)
    assert (opened(tmp_path, encoded(image, kind, **options)) == np.asarray(image)).all()


@pytest.mark.parametrize("mode,kind", [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_alpha_is_composited_on_white(tmp_path, mode, kind):
    """An alpha channel mixes with white; the hidden colour of a transparent pixel does not show."""
    image = picture(mode, 60, 40)
    content = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    pixels = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert abs(opened(tmp_path, content) - expected).max() <= 1  # the rounding of Pillow's compositing


@pytest.mark.parametrize("mode,kind", [("P", "PNG"), ("P", "GIF"), ("L", "PNG"), ("RGB", "PNG")])
def test_transparent_colour_is_white(tmp_path, mode, kind):
    """The colour that a file declares transparent is white, all others stay."""
    image = picture(mode, 60, 40)
    colour = image.getpixel((7, 8))
    keys = np.asarray(image).reshape(40, 60, -1)
    expected = np.where((keys == np.array(colour)).all(-1, keepdims=True), 255, np.asarray(image.convert("RGB")))
    assert (opened(tmp_path, encoded(image, kind, transparency=colour)) == expected).all()


def test_cmyk_jpeg(tmp_path):
    """A CMYK JPEG opens with the colours that Pillow converts it to."""
    content = encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG")
    pixels = opened(tmp_path, content)
    assert (pixels == np.asarray(Image.open(BytesIO(content)).convert("RGB"))).all()
    assert abs(pixels.astype(int) - [255, 0, 0]).max() <= 3


def test_grey_of_16_bits_is_scaled(tmp_path):
    """Each of the 65,536 values v of a 16-bit grey PNG becomes v // 257, in all three channels."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert (opened(tmp_path, encoded(Image.fromarray(values), "PNG")) == values[..., None] // 257).all()
    assert (np.asarray(to_rgb(Image.fromarray(values.astype(np.int32)))) == values[..., None] // 257).all()  # mode I


UPRIGHT = {  # EXIF 2.3, tag 274: what undoes each orientation
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


@pytest.mark.parametrize("mode,kind", [("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "PNG"), ("I;16", "PNG")])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation, mode, kind):
    """A picture comes out upright in all eight orientations, as by Pillow's exif_transpose."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 99) if mode == "I;16" else None
    content = encoded(image or picture(mode, 30, 20), kind, exif=exif)
    raw = Image.open(BytesIO(content))
    pixels = opened(tmp_path, content)
    assert (pixels == UPRIGHT[orientation](np.asarray(to_rgb(raw)))).all()
    assert (pixels == np.asarray(to_rgb(ImageOps.exif_transpose(raw)))).all()


@pytest.mark.parametrize("kind,options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_first_frame_of_an_animation(tmp_path, kind, options):
    """Of an animation the first frame is read."""
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    content = encoded(red, kind, save_all=True, append_images=[blue, red, blue], **options)
    assert Image.open(BytesIO(content)).n_frames == 4
    assert (opened(tmp_path, content) == (255, 0, 0)).all()


def png_header(width: int, height: int) -> bytes:
    """A tiny PNG file that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(20))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG, PNG, WEBP, GIF, BMP = (encoded(picture("RGB", 60, 40), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"))
FOREIGN = "not a JPEG, PNG, WebP, GIF or BMP image"
REFUSED = {
    **{f"JPEG without {cut} bytes": (JPEG[:-cut], "damaged") for cut in (1, 2, 50, len(JPEG) // 2)},
    **{f"PNG without {cut} bytes": (PNG[:-cut], "damaged") for cut in (30, 100, len(PNG) // 2)},
    **{f"{len(half)} bytes of {half[:4]}": (half[: len(half) // 2], "damaged") for half in (WEBP, GIF, BMP)},
    **{f"{size} bytes of a {kind[1:4]}": (kind[:size], FOREIGN) for kind in (JPEG, PNG) for size in (1, 4, 15)},
    "a flipped byte": (PNG[:2000] + bytes([PNG[2000] ^ 255]) + PNG[2001:], "damaged"),
    "garbage": (bytes(range(256)) * 9, FOREIGN),
    "empty": (b"", FOREIGN),
    "a web page": (HTML_PAGE, FOREIGN),
    "an LFS pointer": (LFS_POINTER, FOREIGN),
    "EPS, which would run Ghostscript": (encoded(picture("RGB", 9, 9), "EPS"), FOREIGN),
    "TIFF": (encoded(picture("RGB", 9, 9), "TIFF"), FOREIGN),
    "a bomb": (png_header(20_000, 20_000), "scale the image down"),
    "a bomb of which Pillow only warns": (png_header(10_000, 9_000), "scale the image down"),
    "a bomb by its header": (png_header(2**31 - 1, 2**31 - 1), "scale the image down"),
    "no pixels": (png_header(0, 5), FOREIGN),
    "too wide": (encoded(Image.new("L", (201, 1)), "PNG"), "201 x 1 pixels are too long"),
    "too tall": (encoded(Image.new("L", (3, 601)), "PNG"), "3 x 601 pixels are too long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_image_is_named(tmp_path, name):
    """A broken, foreign, gigantic or very long image gives one error with its path and what is wrong."""
    content, hint = REFUSED[name]
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "picture")) + ".*" + re.escape(hint)):
        opened(tmp_path, content)


def test_limits_are_not_too_low(tmp_path, monkeypatch):
    """An aspect ratio of 200 and Pillow's exact limit of pixels are still read, one pixel more is not."""
    assert opened(tmp_path, encoded(Image.new("L", (200, 1)), "PNG")).shape == (1, 200, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2400)
    assert opened(tmp_path, PNG).shape == (40, 60, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2399)
    with pytest.raises(DataError, match="more than 2399 pixels"):
        opened(tmp_path, PNG)


@pytest.mark.parametrize("name,hint", [("absent.jpg", "no such image"), ("", "directory"), ("a\0b", "null")])
def test_unusable_path_is_named(tmp_path, name, hint):
    """A missing file, a directory or an impossible name gives one error with the path and the reason."""
    path = tmp_path / name
    with pytest.raises(DataError, match=re.escape(str(path)) + "(?s:.*)" + hint):
        open_image(path)


@fuzz
@given(content=st.sampled_from([JPEG, PNG, WEBP, GIF, BMP]), data=st.data())
def test_damaged_bytes_work_or_are_refused(tmp_path_factory, content, data):
    """A file with some bytes changed and its end cut off gives an RGB image or one error, never another exception."""
    damaged = bytearray(content)
    places = st.integers(0, 60) | st.integers(0, len(content) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(content)))])
    try:
        assert open_image(path).mode == "RGB"
    except DataError as error:
        assert str(path) in str(error)
