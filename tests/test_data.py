"""data.py: text, layout and pixels equal the reference libraries, and what strangers send is refused by name.

Oracles: transformers' AutoTokenizer, LlavaProcessor and PIL image processors; the `tokenizers` library itself on
conversations written by hand; golden ids; plain arithmetic. Real files are used where they are present, and small
look-alikes of both tokenizer families are built here.
"""

import functools
import json
import re
import struct
import unicodedata
import zlib
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data import DataError, ImageProcessor, Layout, TextTokenizer, inside, open_image, to_rgb

fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1842767\n"
WEB_PAGE = b"<!DOCTYPE html><html><body>404: not found</body></html>"
NOT_JSON = [b"", b"[]", b"null", b'{"model": {"ty', b"[" * 100_000, b"\0\xff\xfe", WEB_PAGE, LFS_POINTER]

# ---- Text

LLAMA_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def tiny_llama(special_tokens=LLAMA_TOKENS) -> Tokenizer:
    """LLaMA's tokenizer in small: byte fallback, a space in front of every stretch, <s> at the start."""
    merges = [("▁", "a"), ("d", "o"), ("do", "g"), ("▁", "A"), ("S", "S"), ("A", "SS"), ("E", "R")]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    ids = {token: index for index, token in enumerate([*vocabulary, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def tiny_qwen(special_tokens=QWEN_TOKENS) -> Tokenizer:
    """Qwen's tokenizer in small: BPE over bytes, NFC, nothing put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["user assistant: A dog runs. Summarize the provided text in one word:"] * 3, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


@functools.cache
def loaded(folder):
    return TextTokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(params=["tiny llama", "tiny qwen", "real llama"])
def family(request, tmp_path_factory, real_file):
    """Our tokenizer of a folder, the library's own as `oracle`, and how the family writes a conversation."""
    user, assistant, end, stop = "USER: ", " ASSISTANT:", "</s>", "</s>"
    if request.param == "tiny qwen":
        user, assistant, end, stop = (
            "<|im_start|>user ",
            "<|im_end|><|im_start|>assistant\n",
            "<|im_end|>",
            "<|im_end|>",
        )
    if request.param == "real llama":
        folder = real_file("llava-1.5-7b-hf")
    else:
        folder = tmp_path_factory.getbasetemp() / request.param
        folder.mkdir(exist_ok=True)
        (tiny_llama if stop == "</s>" else tiny_qwen)().save(str(folder / "tokenizer.json"))
    ours, oracle = loaded(folder)
    return SimpleNamespace(ours=ours, oracle=oracle, user=user, assistant=assistant, end=end, stop=stop)


# fmt: off
GOLDEN = {  # FORMATS.md 2.7
    "": [1], "hello": [1, 22172], " hello": [1, 29871, 22172], "  hello": [1, 259, 22172], "hello ": [1, 22172, 29871],
    "\n": [1, 29871, 13], "A dog runs.": [1, 319, 11203, 6057, 29889], "don't": [1, 1016, 29915, 29873],
    "a\tb": [1, 263, 12, 29890], "café": [1, 274, 28059], "2024": [1, 29871, 29906, 29900, 29906, 29946],
    "日本": [1, 29871, 30325, 30346], "🙂": [1, 29871, 243, 162, 156, 133],
    "<image>": [1, 32000], "<image>\n": [1, 32000, 29871, 13],
    "USER: <image>\nWhat is this? ASSISTANT:": [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618, 338, 445, 29973]
    + [319, 1799, 9047, 13566, 29901],
}
# fmt: on


@pytest.mark.parametrize("name", ["llama-tokenizer", "llava-1.5-7b-hf"])
def test_golden_vectors(name, real_file):
    """The real LLaMA tokenizer gives the known ids, where there is no special token also without asking for them."""
    tokenizer = loaded(real_file(name))[0]
    for text, ids in GOLDEN.items():
        if "<image>" not in text:
            assert tokenizer.begin + tokenizer.encode(text) == ids, text
        if "<image>" not in text or "<image>" in tokenizer.special_ids:
            assert tokenizer.begin + tokenizer.encode(text, special=True) == ids, text


def test_ids_equal_transformers(real_file):
    """AutoTokenizer gives the same ids for the same real folder: odd spaces, scripts, emoji, special tokens."""
    folder = real_file("llava-1.5-7b-hf")
    reference, tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder), loaded(folder)[0]
    odd = [
        "a<s>b",
        "x</s>",
        "<pad><unk>",
        " \t\n ",
        "naïve e\u0301",
        "مرحبا",
        "👩‍👧 🇫🇷",
        "\0",
        "▁x",
        "1e-5, £3½",
        "<0x0A>",
    ]
    for text in [*GOLDEN, *odd]:
        assert tokenizer.begin + tokenizer.encode(text, special=True) == reference(text).input_ids, text


injections = [*LLAMA_TOKENS, *QWEN_TOKENS, "<0x0A>", "\ud800", "\udfff", "{text}", "{0}", "USER: ", " ASSISTANT:", "\n"]
captions = st.lists(st.sampled_from(injections) | st.text(st.characters(), max_size=8), max_size=8).map("".join)


@fuzz
@given(caption=captions)
@example(caption="a<image><s></s><|im_start|><|im_end|>\ud800")
def test_captions_stay_text(family, caption):
    """Whatever a caption holds, it becomes no special token, and decoding gives it back with surrogates as "?"."""
    stop = family.ours.encode(family.stop, special=True)
    assert stop == [family.oracle.token_to_id(family.stop)]  # which leaves nothing behind
    ids = family.ours.encode(caption)
    assert not set(ids) & set(family.ours.special_ids.values())
    expected = re.sub("[\ud800-\udfff]", "?", caption)
    normal_form = unicodedata.normalize("NFC", expected)  # Qwen's; LLaMA writes spaces as "▁"
    expected = expected.replace("▁", " ") if family.stop == "</s>" else normal_form
    assert family.ours.decode(family.ours.begin + ids + stop) == expected.strip()


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    """A tokenizer.json saved with padding and truncation still gives a text's ids, all of them and only these."""
    raw = tiny_llama()
    plain = raw.encode("A dog runs.", add_special_tokens=False).ids
    for switch in (lambda: raw.enable_truncation(3), lambda: raw.enable_padding(length=50)):
        switch()
        raw.save(str(tmp_path / "tokenizer.json"))
        assert TextTokenizer(tmp_path).encode("A dog runs.") == plain


LOADERS = {"tokenizer.json": TextTokenizer, "processor_config.json": ImageProcessor.from_pretrained}
LOADERS["preprocessor_config.json"] = ImageProcessor.from_pretrained


@pytest.mark.parametrize("content", [None, *NOT_JSON, b"{}", b'{"image_processor": []}', b'{"image_processor": "A"}'])
@pytest.mark.parametrize("name", LOADERS)
def test_broken_json_file_is_named(tmp_path, name, content):
    """A missing, truncated or foreign file gives an error with its path (its folder, where one of two was missing)."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name if content is not None else tmp_path))):
        LOADERS[name](tmp_path)


# ---- Layout


@pytest.mark.parametrize("count", [1, 576])
@pytest.mark.parametrize("text", ["What is this?", " a  b ", "", "日本 🙂", "{text}", "{0} {text} {", "\\1 %s", "a\nb"])
def test_conversation_ids(family, text, count):
    """First and further questions are tokenized as the family's conversation, written by hand, in one piece."""
    layout = Layout(family.ours, count)
    first = f"{family.user}{'<image>' * count}\n{text}{family.assistant}"
    assert layout.question(text) == family.oracle.encode(first).ids
    further = family.end + family.user + text + family.assistant
    assert layout.next_question(text) == family.oracle.encode(further, add_special_tokens=False).ids


def test_whole_input_equals_llava_processor(real_file):
    """Ids and pixels of a question are what transformers' LlavaProcessor makes of the real folder."""
    transformers, folder = pytest.importorskip("transformers"), real_file("llava-1.5-7b-hf")
    reference = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        **json.loads((folder / "processor_config.json").read_text()),
    )
    inputs = reference(picture("RGB", 500, 350), "USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    assert [Layout(loaded(folder)[0], 576).question("What is this?")] == inputs.input_ids.tolist()
    pixels = ImageProcessor.from_pretrained(folder)(picture("RGB", 500, 350))
    assert torch.equal(pixels[None], inputs.pixel_values) and pixels.shape == (3, 336, 336)


def test_image_side(family):
    """The image side is the paper's prompt, summarized at its last token, with a long caption and its end behind."""
    layout, caption = Layout(family.ours, 7), family.ours.encode("A dog runs.")
    text = f"{family.user}{'<image>' * 7}\nSummarize the provided image in one word:{family.assistant}"
    prompt = family.oracle.encode(text).ids
    assert layout.image_side() == prompt and prompt.count(layout.image_id) == 7
    assert layout.image_side(caption) == [*prompt, *caption, family.oracle.token_to_id(family.stop)]
    assert layout.image_summary == len(prompt) - 1
    assert Layout(family.ours, 7, image_prompt="Why?").image_side() == layout.question("Why?")


@fuzz
@given(caption=captions)
@example(caption=" A dog runs.\n")
@example(caption="{text}<image>")
def test_text_side(family, caption):
    """A caption stands as plain stripped text before a prompt whose ids do not depend on it; so does a question."""
    layout = Layout(family.ours, 7)
    tail = f"\nSummarize the provided text in one word:{family.assistant}"
    prompt = family.oracle.encode(tail, add_special_tokens=False).ids
    role = family.user.removeprefix("<|im_start|>")
    head = family.oracle.encode(family.user.removesuffix(role)).ids + family.ours.encode(role + caption.strip())
    assert layout.text_side(caption) == head + prompt and layout.text_prompt == prompt
    special = set(family.ours.special_ids.values())
    for ask in (layout.question, layout.next_question):
        assert [i for i in ask(caption) if i in special] == [i for i in ask("") if i in special]


def test_soft_prompt_ids(family):
    """Soft ids are consecutive, stand for `prompt_ids` in order, and change neither lengths, prefix nor question."""
    hard, soft = Layout(family.ours, 7), Layout(family.ours, 7, soft_start=40_000)
    assert hard.prompt_ids == soft.prompt_ids == hard.image_prompt + hard.text_prompt
    assert soft.image_prompt + soft.text_prompt == list(range(40_000, 40_000 + len(hard.prompt_ids)))
    for side in (lambda layout: layout.image_side([5, 6]), lambda layout: layout.text_side("A dog runs.")):
        restored = [hard.prompt_ids[index - 40_000] if index >= 40_000 else index for index in side(soft)]
        assert restored == side(hard) != side(soft)
    assert soft.image_summary == hard.image_summary and soft.image_side()[soft.image_summary] == soft.image_prompt[-1]
    assert soft.question("Why?") == hard.question("Why?")


@pytest.mark.parametrize("missing", ["<image>", "</s>", "<|im_end|>"])
def test_foreign_tokenizer_is_refused(tmp_path, missing):
    """A tokenizer without <image>, or without the token that ends an answer, is refused by the token's name."""
    for build, tokens in ((tiny_llama, LLAMA_TOKENS), (tiny_qwen, QWEN_TOKENS)):
        build([token for token in tokens if token != missing]).save(str(tmp_path / "tokenizer.json"))
        if missing in tokens:
            with pytest.raises(DataError, match="tokenizer.json.*" + re.escape(missing)):
                Layout(TextTokenizer(tmp_path), 5)


# ---- Pixels


@functools.cache
def picture(mode: str, width: int, height: int, transparency=None) -> Image.Image:
    """Noise in any mode, in the alpha channel too, darker on the left."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[:, : width // 2] //= 2
    image = Image.fromarray(pixels)
    image = image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


SHAPES = [(336, 336), (640, 120), (97, 400), (1, 1), (2, 3), (3, 2), (337, 335), (501, 333), (1600, 1201), (30, 37)]
PICTURES = [("RGB", *shape) for shape in SHAPES]
PICTURES += [("L", 64, 48), ("LA", 63, 41), ("RGBA", 75, 50), ("P", 64, 49), ("CMYK", 51, 77), ("1", 45, 46)]
PICTURES += [("P", 40, 61, 3), ("P", 41, 60, bytes([0, 128, 255, 17])), ("L", 33, 21, 0)]  # with transparent colours
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
CLIP |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_center_crop": True}
CLIP |= {"rescale_factor": 0.00392156862745098, "resample": 3}
SIGLIP = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 384, "width": 384}, "resample": 3}
SMALL = SIGLIP | {"size": {"height": 48, "width": 33}}
CONFIGS = {
    "llava-1.5": CLIP,
    "integers": CLIP | {"size": 224, "crop_size": 224},
    "uneven crop": CLIP | {"size": {"shortest_edge": 50}, "crop_size": {"height": 31, "width": 44}},
    "exact size, then crop": SMALL | {"crop_size": {"height": 30, "width": 31}},
    "exact size, crop switched off": SMALL | {"crop_size": 30, "do_center_crop": False},
    "bilinear": CLIP | {"resample": 2, "size": 40, "crop_size": 40},
    "siglip": SIGLIP,
    "siglip, integer": SIGLIP | {"size": 64, "default_to_square": True},
    "oblong, lanczos": SMALL | {"resample": 1},
    "nearest, from -1 to 1": SMALL | {"resample": 0, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1]},
    "box, odd factor": SMALL | {"resample": 4, "rescale_factor": 0.0041},
    "hamming, not rescaled": SMALL | {"resample": 5, "do_rescale": False, "image_mean": [99, 120.5, 7]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_transformers(tmp_path, name):
    """On every shape and mode the difference to transformers' PIL processors is 0.0, from either config file."""
    transformers, config = pytest.importorskip("transformers"), CONFIGS[name]
    kind = transformers.CLIPImageProcessorPil if "crop_size" in config else transformers.SiglipImageProcessorPil
    reference = kind(**config)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config, "patch_size": 14}))
    nested = ImageProcessor.from_pretrained(tmp_path)
    drops_alpha = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)  # later ones put it on white
    for arguments in PICTURES:
        image = picture(*arguments)
        pixels = nested(to_rgb(image))
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        given = to_rgb(image) if drops_alpha and has_alpha else image
        expected = reference(given, return_tensors="pt").pixel_values[0]
        assert pixels.shape == expected.shape == (3, *nested.size) and pixels.dtype == torch.float32
        assert (pixels - expected).abs().max() == 0.0, arguments
    reference.save_pretrained(tmp_path)  # preprocessor_config.json, as transformers writes it
    assert torch.equal(ImageProcessor.from_pretrained(tmp_path)(to_rgb(picture(*arguments))), pixels)


BAD_FIELDS = {
    "size": [..., None, 0, -1, True, 3.5, "336", [336], {}, {"height": 3}, {"longest_edge": 9}, {"shortest_edge": 335}]
    + [{"shortest_edge": edge} for edge in (0, True, 336.0, "336", 10**9)]
    + [{"shortest_edge": 336, "longest_edge": 400}]
    + [{"height": height, "width": 9} for height in (0, None, "9", 10**9)],
    "crop_size": [..., None, 0, "336", [], {}, {"height": 336}, {"height": 400, "width": 9}],
    "resample": [None, 99, -1, "bicubic", []],
    "image_mean": [..., None, [], [1, 2], "abc", {}, [1, 2, "x"], [1, 2, None], [10**400] * 3],
    "image_std": [..., None, [], [1, 2], "abc", {}, [1, 2, "x"], [0, 1, 1], [10**400] * 3],
    "rescale_factor": [None, "abc", [], 10**400, float("nan")],
} | {"do_resize": [False], "do_normalize": [False], "do_pad": [True]}
BAD = [pytest.param(key, item, id=f"{key} {item}"[:40]) for key, values in BAD_FIELDS.items() for item in values]


@pytest.mark.parametrize("field,value", BAD)
def test_bad_image_config_is_named(tmp_path, field, value):
    """Each unusable value of a field (... stands for none) gives one error, which names the file and the field."""
    config = {key: item for key, item in (CLIP | {field: value}).items() if item is not ...}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}.*\b{field}\b"):
        ImageProcessor.from_pretrained(tmp_path)


sides = st.integers(1, 60)
scalars = st.none() | st.booleans() | st.integers() | sides | st.floats() | st.text(max_size=3) | st.just(10**400)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
sizes = st.fixed_dictionaries({}, optional=dict.fromkeys(("height", "width", "shortest_edge"), sides | scalars))
fields = [*CLIP, "do_resize", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb", "unknown"]


@fuzz
@given(changes=st.dictionaries(st.sampled_from(fields), values | sizes, max_size=3))
@example(changes={"size": {"height": 20, "width": 20}, "crop_size": {"height": 30, "width": 30}})
def test_any_json_works_or_is_refused(changes):
    """Any JSON value in any field gives finite pixels of the promised size, or one error that names the file."""
    try:
        processor = ImageProcessor(CLIP | {"size": 40, "crop_size": 40} | changes, "some/config.json")
    except DataError as error:
        assert "some/config.json" in str(error)
    else:
        pixels = processor(picture("RGB", 5, 7))
        assert pixels.shape == (3, *processor.size) and pixels.isfinite().all()


# ---- Image files


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def opened(tmp_path):
    """What open_image makes of the bytes of a file: (height, width, 3)."""

    def read(content: bytes) -> np.ndarray:
        (tmp_path / "picture").write_bytes(content)
        image = open_image(tmp_path / "picture")
        assert image.mode == "RGB"
        return np.asarray(image)

    return read


@pytest.mark.parametrize("file", ["RGBA PNG", "LA PNG", "RGBA WEBP", "RGB BMP", "RGB WEBP"])
def test_alpha_is_composited_on_white(opened, file):
    """An alpha channel mixes with white, so that hidden colours do not show; without one the pixels stay."""
    mode, kind = file.split()
    content = encoded(picture(mode, 60, 40), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    pixels = np.asarray(picture(mode, 60, 40).convert("RGBA")).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    difference = abs(opened(content) - (pixels[..., :3] * alpha + 255 * (1 - alpha))).max()
    assert difference <= (0 if mode == "RGB" else 1)  # Pillow's compositing rounds


@pytest.mark.parametrize("mode,kind", [("P", "PNG"), ("P", "GIF"), ("L", "PNG"), ("RGB", "PNG")])
def test_transparent_colour_is_white(opened, mode, kind):
    """The colour that a file declares transparent is white, all others stay."""
    image = picture(mode, 60, 40)
    colour = image.getpixel((7, 8))
    is_transparent = (np.asarray(image).reshape(40, 60, -1) == np.array(colour)).all(-1, keepdims=True)
    expected = np.where(is_transparent, 255, np.asarray(image.convert("RGB")))
    assert (opened(encoded(image, kind, transparency=colour)) == expected).all()


def test_cmyk_jpeg(opened):
    """A CMYK JPEG opens with the colours that Pillow converts it to."""
    content = encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG")
    assert (opened(content) == np.asarray(Image.open(BytesIO(content)).convert("RGB"))).all()
    assert abs(opened(content).astype(int) - [255, 0, 0]).max() <= 3


def test_grey_of_16_bits_is_scaled(opened):
    """Each of the 65,536 values v of a 16-bit grey PNG becomes v // 257, in all three channels."""
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert (opened(encoded(Image.fromarray(grey), "PNG")) == grey[..., None] // 257).all()
    assert (np.asarray(to_rgb(Image.fromarray(grey.astype(np.int32)))) == grey[..., None] // 257).all()  # older Pillow


@pytest.mark.parametrize("mode,kind", [("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "PNG"), ("I;16", "PNG")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(opened, orientation, mode, kind):
    """A picture comes out upright in all eight orientations, as by Pillow's exif_transpose."""
    exif = Image.Exif()
    exif[274] = orientation
    grey = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 99)
    content = encoded(grey if mode == "I;16" else picture(mode, 30, 20), kind, exif=exif)
    pixels = opened(content)
    assert (pixels == np.asarray(to_rgb(ImageOps.exif_transpose(Image.open(BytesIO(content)))))).all()
    assert pixels.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(opened, kind):
    """Of an animation the first frame is read."""
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    content = encoded(red, kind, save_all=True, append_images=[blue, red, blue], lossless=True)
    assert Image.open(BytesIO(content)).n_frames == 4
    assert (opened(content) == (255, 0, 0)).all()


FILES = {kind: encoded(picture("RGB", 60, 40), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "EPS", "TIFF")}
JPEG, PNG = FILES["JPEG"], FILES["PNG"]


def claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header claims a size."""
    header = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


FOREIGN, BOMB = "not a JPEG, PNG, WebP, GIF or BMP image", "pixels; scale the image down"
REFUSED = {
    **{f"JPEG less {cut} bytes": (JPEG[:-cut], "damaged") for cut in (1, 2, 50, len(JPEG) // 2, len(JPEG) - 700)},
    **{f"PNG less {cut} bytes": (PNG[:-cut], "damaged") for cut in (30, 100, len(PNG) // 2, len(PNG) - 60)},
    **{f"half a {kind}": (FILES[kind][: len(FILES[kind]) // 2], "damaged") for kind in ("WEBP", "GIF", "BMP")},
    **{f"{size} bytes of a {kind}": (FILES[kind][:size], FOREIGN) for kind in ("JPEG", "PNG") for size in (1, 4)},
    "a flipped byte": (PNG[:2000] + bytes([PNG[2000] ^ 255]) + PNG[2001:], "damaged"),
    **{f"foreign {index}": (file, FOREIGN) for index, file in enumerate([bytes(range(256)) * 9, *NOT_JSON])},
    "EPS, which runs Ghostscript": (FILES["EPS"], FOREIGN),
    "TIFF": (FILES["TIFF"], FOREIGN),
    "no pixels": (claiming(0, 5), FOREIGN),
    **{f"a bomb of {side} squared": (claiming(side, side), BOMB) for side in (9_500, 20_000, 2**31 - 1)},
    "too wide": (encoded(Image.new("L", (201, 1)), "PNG"), "201 x 1 pixels are too long"),
    "too tall": (encoded(Image.new("L", (3, 601)), "PNG"), "3 x 601 pixels are too long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_image_is_named(opened, tmp_path, name):
    """A broken, foreign, gigantic or very long image gives one error with its path and what is wrong."""
    content, hint = REFUSED[name]
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "picture")) + ": .*" + hint):
        opened(content)


def test_limits_are_not_lower(opened):
    """An aspect ratio of 200 is still read, and so are 16 million pixels."""
    assert opened(encoded(Image.new("L", (200, 1)), "PNG")).shape == (1, 200, 3)
    assert opened(encoded(Image.new("L", (4000, 4000)), "PNG")).shape == (4000, 4000, 3)


@pytest.mark.parametrize("name,hint", [("absent.jpg", "no such image"), ("", "directory"), ("a\0b", "null")])
def test_unusable_path_is_named(tmp_path, name, hint):
    """A missing file, a directory or an impossible name gives one error with the path and the reason."""
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name)) + "(?s:.*)" + hint):
        open_image(tmp_path / name)


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/../../x", "link/x", "loop", "a\0b", "\ud800.jpg"])
def test_paths_stay_inside(tmp_path, name):
    """A path from a stranger's file that leaves its root, by .. or a link, or that is no path, gives one error."""
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "loop").symlink_to("loop")
    assert inside(tmp_path, "a/../b/1.jpg") == tmp_path / "b/1.jpg"
    with pytest.raises(DataError):
        inside(tmp_path, name)
