"""data.py: text, layout and pixels equal the reference libraries; bad files are refused by name.

Oracles: transformers' AutoTokenizer, LlavaProcessor and PIL image processors; the `tokenizers`
library itself on conversations written by hand; golden ids; plain arithmetic. Real files are used
where they are present, and small look-alikes of both tokenizer families are built here.
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
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data import (
    CHATML,
    VICUNA,
    ImageProcessor,
    Layout,
    Sample,
    TextTokenizer,
    collate,
    open_image,
)
from formats.files import InputError, inside
from formats.images import to_rgb
from losses import IGNORE

fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=HealthCheck,
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1842767\n"
WEB_PAGE = b"<!DOCTYPE html><html><body>404: not found</body></html>"
NOT_JSON = [
    b"",
    b"[]",
    b"null",
    b'{"model": {"ty',
    b"[" * 100_000,
    b"\0\xff\xfe",
    WEB_PAGE,
    LFS_POINTER,
]

# ---- Text

LLAMA_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def tiny_llama(special_tokens=LLAMA_TOKENS) -> Tokenizer:
    """LLaMA's tokenizer in small: byte fallback, a space before every stretch, <s> at the start."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(code) for code in range(33, 127)]
    merges = [("▁", "a"), ("d", "o"), ("do", "g"), ("▁", "A"), ("S", "S"), ("A", "SS"), ("E", "R")]
    merged = ["".join(pair) for pair in merges]
    vocabulary = ["<unk>", "<s>", "</s>", *byte_tokens, "▁", *letters, *merged]
    ids = {token: index for index, token in enumerate(vocabulary)}

    bpe = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    begin = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.post_processor = begin
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def tiny_qwen(special_tokens=QWEN_TOKENS) -> Tokenizer:
    """Qwen's tokenizer in small: BPE over bytes, NFC, nothing put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "user assistant: A dog runs. Summarize the provided text in one word:"
    tokenizer.train_from_iterator([text] * 3, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


@functools.cache
def loaded(folder):
    return TextTokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(params=["tiny llama", "tiny qwen", "real llama"])
def family(request, tmp_path_factory, real_file):
    """Our tokenizer of a folder, the library's own as `oracle`, and the family's conversations."""
    if request.param == "real llama":
        folder = real_file("llava-1.5-7b-hf")
    else:
        folder = tmp_path_factory.getbasetemp() / request.param
        folder.mkdir(exist_ok=True)
        build = tiny_qwen if request.param == "tiny qwen" else tiny_llama
        build().save(str(folder / "tokenizer.json"))
    ours, oracle = loaded(folder)
    # Written out, not taken from data.py, which is under test.
    if request.param == "tiny qwen":
        return SimpleNamespace(
            ours=ours,
            oracle=oracle,
            user="<|im_start|>user ",
            assistant="<|im_end|><|im_start|>assistant\n",
            end="<|im_end|>",
        )
    return SimpleNamespace(
        ours=ours, oracle=oracle, user="USER: ", assistant=" ASSISTANT:", end="</s>"
    )


GOLDEN = {  # known ids of LLaMA's tokenizer
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
    "USER: <image>\nWhat is this? ASSISTANT:": [
        *[1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618, 338, 445, 29973],
        *[319, 1799, 9047, 13566, 29901],
    ],
}


@pytest.mark.parametrize("name", ["llama-tokenizer", "llava-1.5-7b-hf"])
def test_golden_vectors(name, real_file):
    """The real tokenizer gives the known ids, also where special tokens are not asked for."""
    tokenizer, _ = loaded(real_file(name))
    for text, ids in GOLDEN.items():
        if "<image>" not in text:
            assert tokenizer.begin + tokenizer.encode(text) == ids, text
        if "<image>" not in text or "<image>" in tokenizer.special_ids:
            assert tokenizer.begin + tokenizer.encode(text, special=True) == ids, text


ODD_TEXTS = [
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


def test_ids_equal_transformers(real_file):
    """AutoTokenizer gives the same ids for the same real folder: odd spaces, scripts, emoji."""
    transformers = pytest.importorskip("transformers")
    folder = real_file("llava-1.5-7b-hf")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer, _ = loaded(folder)
    for text in [*GOLDEN, *ODD_TEXTS]:
        ids = tokenizer.begin + tokenizer.encode(text, special=True)
        assert ids == reference(text).input_ids, text


INJECTIONS = [
    *LLAMA_TOKENS,
    *QWEN_TOKENS,
    "<0x0A>",
    "\ud800",
    "\udfff",
    "{text}",
    "{0}",
    "USER: ",
    " ASSISTANT:",
    "\n",
]
pieces = st.sampled_from(INJECTIONS) | st.text(st.characters(), max_size=8)
captions = st.lists(pieces, max_size=8).map("".join)


@fuzz
@given(caption=captions)
@example(caption="a<image><s></s><|im_start|><|im_end|>\ud800")
def test_captions_stay_text(family, caption):
    """A caption becomes no special token, and decoding gives it back with surrogates as "?"."""
    stop = family.ours.encode(family.end, special=True)
    assert stop == [family.oracle.token_to_id(family.end)]
    # `special` was for that call only.
    ids = family.ours.encode(caption)
    assert not set(ids) & set(family.ours.special_ids.values())

    expected = re.sub("[\ud800-\udfff]", "?", caption)
    if family.end == "</s>":
        expected = expected.replace("▁", " ")  # LLaMA writes spaces so
    else:
        expected = unicodedata.normalize("NFC", expected)  # Qwen's tokenizer normalizes
    assert family.ours.decode(family.ours.begin + ids + stop) == expected.strip()


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    """A tokenizer.json saved with padding and truncation still gives a text's ids, just these."""
    raw = tiny_llama()
    plain = raw.encode("A dog runs.", add_special_tokens=False).ids
    raw.enable_truncation(3)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer(tmp_path).encode("A dog runs.") == plain
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer(tmp_path).encode("A dog runs.") == plain


def test_long_captions_are_cut_at_a_sentence(tmp_path):
    """Whole sentences that fit; a hard cut where they would be less than half of the limit."""
    tiny_llama().save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path)
    text = "One two. Three four. Five."
    ids = tokenizer.encode(text)
    two = tokenizer.encode("One two. Three four.")
    assert tokenizer.encode_sentences(text, len(ids)) == ids
    assert tokenizer.encode_sentences(text, len(ids) - 1) == two
    assert tokenizer.encode_sentences(text, len(two)) == two
    assert (
        tokenizer.encode_sentences("Ab. " + "x" * 90, 40)
        == tokenizer.encode("Ab. " + "x" * 90)[:40]
    )


LOADERS = {
    "tokenizer.json": TextTokenizer,
    "processor_config.json": ImageProcessor.from_pretrained,
    "preprocessor_config.json": ImageProcessor.from_pretrained,
}
BROKEN = [None, *NOT_JSON, b"{}", b'{"image_processor": []}', b'{"image_processor": "A"}']


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", LOADERS)
def test_broken_json_file_is_named(tmp_path, name, content):
    """A missing, truncated or foreign file is named (its folder, where one of two was missing)."""
    named = tmp_path
    if content is not None:
        named = tmp_path / name
        named.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(named))):
        LOADERS[name](tmp_path)


# ---- Layout

QUESTIONS = [
    "What is this?",
    " a  b ",
    "",
    "日本 🙂",
    "{text}",
    "{0} {text} {",
    "\\1 %s",
    "a\nb",
]


@pytest.mark.parametrize("count", [1, 576])
@pytest.mark.parametrize("text", QUESTIONS)
def test_conversation_ids(family, text, count):
    """Questions are tokenized as the family's conversation, written by hand, in one piece."""
    layout = Layout(family.ours, count)
    first = f"{family.user}{'<image>' * count}\n{text}{family.assistant}"
    assert layout.question(text) == family.oracle.encode(first).ids
    further = family.end + family.user + text + family.assistant
    expected = family.oracle.encode(further, add_special_tokens=False).ids
    assert layout.next_question(text) == expected


def test_whole_input_equals_llava_processor(real_file):
    """Ids and pixels of a question are what LlavaProcessor makes of the same real folder."""
    transformers = pytest.importorskip("transformers")
    folder = real_file("llava-1.5-7b-hf")
    reference = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        **json.loads((folder / "processor_config.json").read_text()),
    )
    image = picture("RGB", 500, 350)
    text = "USER: <image>\nWhat is this? ASSISTANT:"
    inputs = reference(image, text, return_tensors="pt")

    tokenizer, _ = loaded(folder)
    assert [Layout(tokenizer, 576).question("What is this?")] == inputs.input_ids.tolist()
    pixels = ImageProcessor.from_pretrained(folder)(image)
    assert pixels.shape == (3, 336, 336)
    assert torch.equal(pixels[None], inputs.pixel_values)


def test_image_side(family):
    """The image side is the paper's prompt, with a long caption and its end behind the summary."""
    layout = Layout(family.ours, 7)
    caption = family.ours.encode("A dog runs.")
    images = "<image>" * 7
    text = f"{family.user}{images}\nSummarize the provided image in one word:{family.assistant}"
    prompt = family.oracle.encode(text).ids
    stop = family.oracle.token_to_id(family.end)
    assert layout.image_side() == prompt
    assert prompt.count(layout.image_id) == 7
    assert layout.image_side(caption) == [*prompt, *caption, stop]
    assert layout.image_summary == len(prompt) - 1
    assert Layout(family.ours, 7, image_prompt="Why?").image_side() == layout.question("Why?")


@fuzz
@given(caption=captions)
@example(caption=" A dog runs.\n")
@example(caption="{text}<image>")
def test_text_side(family, caption):
    """A caption stands as plain stripped text before a prompt whose ids do not depend on it."""
    layout = Layout(family.ours, 7)
    tail = f"\nSummarize the provided text in one word:{family.assistant}"
    prompt = family.oracle.encode(tail, add_special_tokens=False).ids
    # What a caption is tokenized with: all of the user's part that is no special token.
    role = family.user.removeprefix("<|im_start|>")
    marks = family.oracle.encode(family.user.removesuffix(role)).ids
    assert layout.text_prompt == prompt
    expected = marks + family.ours.encode(role + caption.strip()) + prompt
    assert layout.text_side(caption) == expected

    # In a question a caption is plain text too: no more special tokens than an empty one brings.
    special = set(family.ours.special_ids.values())
    for ask in (layout.question, layout.next_question):
        found = [index for index in ask(caption) if index in special]
        assert found == [index for index in ask("") if index in special]


def test_soft_prompt_ids(family):
    """Soft ids stand for `prompt_ids` in order, and change neither lengths, prefix nor question."""
    hard = Layout(family.ours, 7)
    soft = Layout(family.ours, 7, soft_start=40_000)
    assert hard.prompt_ids == soft.prompt_ids == hard.image_prompt + hard.text_prompt
    soft_ids = soft.image_prompt + soft.text_prompt
    assert soft_ids == list(range(40_000, 40_000 + len(hard.prompt_ids)))

    def restored(side: list[int]) -> list[int]:
        ids = []
        for index in side:
            if index >= 40_000:
                index = hard.prompt_ids[index - 40_000]
            ids.append(index)
        return ids

    caption = [5, 6]
    assert soft.image_side(caption) != hard.image_side(caption)
    assert restored(soft.image_side(caption)) == hard.image_side(caption)
    assert soft.text_side("A dog runs.") != hard.text_side("A dog runs.")
    assert restored(soft.text_side("A dog runs.")) == hard.text_side("A dog runs.")
    assert soft.image_summary == hard.image_summary
    assert soft.image_side()[soft.image_summary] == soft.image_prompt[-1]
    assert soft.question("Why?") == hard.question("Why?")


def test_notes_tell_the_family_and_the_prompts(family):
    """What is kept beside soft prompts names all they depend on."""
    layout = Layout(family.ours, 7, "Image?", "Text?")
    template = CHATML if family.end == "<|im_end|>" else VICUNA
    assert layout.notes["image_prompt"] == "Image?"
    assert layout.notes["text_prompt"] == "Text?"
    assert layout.notes["template"] == (
        f"{template.user}[image or text]\n[prompt]{template.assistant}[caption]{template.end}"
    )
    assert layout.with_soft_prompts(40_000).notes == layout.notes
    assert layout.with_image_prompt("Why?").notes["image_prompt"] == "Why?"


@pytest.mark.parametrize("missing", ["<image>", "</s>", "<|im_end|>"])
def test_foreign_tokenizer_is_refused(tmp_path, missing):
    """A tokenizer without <image>, or without the token that ends an answer, is refused by name."""
    for build, tokens in ((tiny_llama, LLAMA_TOKENS), (tiny_qwen, QWEN_TOKENS)):
        if missing not in tokens:
            continue
        others = [token for token in tokens if token != missing]
        build(others).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(InputError, match="tokenizer.json.*" + re.escape(missing)):
            Layout(TextTokenizer(tmp_path), 5)


# ---- Pixels


@functools.cache
def picture(mode: str, width: int, height: int, transparency=None) -> Image.Image:
    """Noise in any mode, in the alpha channel too, darker on the left."""
    generator = np.random.default_rng(width * 1000 + height)
    pixels = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[:, : width // 2] //= 2
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("RGB").quantize(16)
    else:
        image = image.convert(mode)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


PICTURES = [
    ("RGB", 336, 336),
    ("RGB", 640, 120),
    ("RGB", 97, 400),
    ("RGB", 1, 1),
    ("RGB", 2, 3),
    ("RGB", 3, 2),
    ("RGB", 337, 335),
    ("RGB", 501, 333),
    ("RGB", 1600, 1201),
    ("RGB", 30, 37),
    ("L", 64, 48),
    ("LA", 63, 41),
    ("RGBA", 75, 50),
    ("P", 64, 49),
    ("CMYK", 51, 77),
    ("1", 45, 46),
    # with transparent colours
    ("P", 40, 61, 3),
    ("P", 41, 60, bytes([0, 128, 255, 17])),
    ("L", 33, 21, 0),
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
SIGLIP = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": 384, "width": 384},
    "resample": 3,
}
SMALL = {**SIGLIP, "size": {"height": 48, "width": 33}}
UNEVEN = {"size": {"shortest_edge": 50}, "crop_size": {"height": 31, "width": 44}}
CONFIGS = {
    "llava-1.5": CLIP,
    "integers": {**CLIP, "size": 224, "crop_size": 224},
    "uneven crop": {**CLIP, **UNEVEN},
    "exact size, then crop": {**SMALL, "crop_size": {"height": 30, "width": 31}},
    "exact size, crop switched off": {**SMALL, "crop_size": 30, "do_center_crop": False},
    "bilinear": {**CLIP, "resample": 2, "size": 40, "crop_size": 40},
    "siglip": SIGLIP,
    "siglip, integer": {**SIGLIP, "size": 64, "default_to_square": True},
    "oblong, lanczos": {**SMALL, "resample": 1},
    "nearest, from -1 to 1": {
        **SMALL,
        "resample": 0,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1, 1, 1],
    },
    "box, odd factor": {**SMALL, "resample": 4, "rescale_factor": 0.0041},
    "hamming, not rescaled": {
        **SMALL,
        "resample": 5,
        "do_rescale": False,
        "image_mean": [99, 120.5, 7],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_transformers(tmp_path, name):
    """On every shape and mode the difference to transformers is 0.0, from either config file."""
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    kind = transformers.SiglipImageProcessorPil
    if "crop_size" in config:
        kind = transformers.CLIPImageProcessorPil
    reference = kind(**config)
    nesting = {"image_processor": config, "patch_size": 14}
    (tmp_path / "processor_config.json").write_text(json.dumps(nesting))
    nested = ImageProcessor.from_pretrained(tmp_path)

    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    drops_alpha = version < (5, 23)  # later ones put it on white, as we do
    for arguments in PICTURES:
        image = picture(*arguments)
        pixels = nested(to_rgb(image))
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        given = to_rgb(image) if drops_alpha and has_alpha else image
        expected = reference(given, return_tensors="pt").pixel_values[0]
        assert pixels.shape == expected.shape == (3, *nested.size)
        assert pixels.dtype == torch.float32
        assert (pixels - expected).abs().max() == 0.0, arguments

    reference.save_pretrained(tmp_path)  # preprocessor_config.json, as transformers writes it
    assert (tmp_path / "preprocessor_config.json").exists()
    again = ImageProcessor.from_pretrained(tmp_path)(to_rgb(picture(*arguments)))
    assert torch.equal(again, pixels)


BAD_VALUES = {  # of each field; ... stands for a field that is missing
    "size": [
        *[..., None, 0, -1, True, 3.5, "336", [336], {}],
        {"height": 3},
        {"longest_edge": 9},
        {"shortest_edge": 335},
        {"shortest_edge": 0},
        {"shortest_edge": True},
        {"shortest_edge": 336.0},
        {"shortest_edge": "336"},
        {"shortest_edge": 10**9},
        {"shortest_edge": 336, "longest_edge": 400},
        {"height": 0, "width": 9},
        {"height": None, "width": 9},
        {"height": "9", "width": 9},
        {"height": 10**9, "width": 9},
    ],
    "crop_size": [..., None, 0, "336", [], {}, {"height": 336}, {"height": 400, "width": 9}],
    "resample": [None, 99, -1, "bicubic", []],
    "image_mean": [..., None, [], [1, 2], "abc", {}, [1, 2, "x"], [1, 2, None], [10**400] * 3],
    "image_std": [..., None, [], [1, 2], "abc", {}, [1, 2, "x"], [0, 1, 1], [10**400] * 3],
    "rescale_factor": [None, "abc", [], 10**400, float("nan")],
    "do_resize": [False],
    "do_normalize": [False],
    "do_pad": [True],
}
BAD = []
for bad_field, bad_values in BAD_VALUES.items():
    for bad_value in bad_values:
        BAD.append(pytest.param(bad_field, bad_value, id=f"{bad_field} {bad_value}"[:40]))


@pytest.mark.parametrize("field,value", BAD)
def test_bad_image_config_is_named(tmp_path, field, value):
    """Each unusable value of a field gives one error, which names the file and the field."""
    config = {**CLIP, field: value}
    if value is ...:
        del config[field]
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}.*\b{field}\b"):
        ImageProcessor.from_pretrained(tmp_path)


lengths = st.integers(1, 60)
huge = st.just(10**400)
texts = st.text(max_size=3)
scalars = st.none() | st.booleans() | st.integers() | lengths | st.floats() | texts | huge


def containers(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)


values = st.recursive(scalars, containers)
edges = dict.fromkeys(("height", "width", "shortest_edge"), lengths | scalars)
sizes = st.fixed_dictionaries({}, optional=edges)
SWITCHES = ["do_resize", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb", "unknown"]


@fuzz
@given(changes=st.dictionaries(st.sampled_from([*CLIP, *SWITCHES]), values | sizes, max_size=3))
@example(changes={"size": {"height": 20, "width": 20}, "crop_size": {"height": 30, "width": 30}})
def test_any_json_works_or_is_refused(changes):
    """Any JSON in any field gives finite pixels of the promised size, or an error with the file."""
    config = {**CLIP, "size": 40, "crop_size": 40, **changes}
    try:
        processor = ImageProcessor(config, "some/config.json")
    except InputError as error:
        assert "some/config.json" in str(error)
        return
    pixels = processor(picture("RGB", 5, 7))
    assert pixels.shape == (3, *processor.size)
    assert pixels.isfinite().all()


# ---- Image files


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content))


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
    """An alpha channel mixes with white, so that hidden colours do not show."""
    mode, kind = file.split()
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = encoded(picture(mode, 60, 40), kind, **options)
    pixels = np.asarray(picture(mode, 60, 40).convert("RGBA")).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    difference = abs(opened(content) - expected).max()
    # Pillow's compositing rounds; where there is no alpha, nothing is composited.
    assert difference <= (0 if mode == "RGB" else 1)


@pytest.mark.parametrize("mode,kind", [("P", "PNG"), ("P", "GIF"), ("L", "PNG"), ("RGB", "PNG")])
def test_transparent_colour_is_white(opened, mode, kind):
    """The colour that a file declares transparent is white, all others stay."""
    image = picture(mode, 60, 40)
    colour = image.getpixel((7, 8))
    same_channels = np.asarray(image).reshape(40, 60, -1) == np.array(colour)
    is_transparent = same_channels.all(-1, keepdims=True)
    expected = np.where(is_transparent, 255, np.asarray(image.convert("RGB")))
    assert (opened(encoded(image, kind, transparency=colour)) == expected).all()


def test_cmyk_jpeg(opened):
    """A CMYK JPEG opens with the colours that Pillow converts it to."""
    content = encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG")
    assert (opened(content) == np.asarray(decoded(content).convert("RGB"))).all()
    assert abs(opened(content).astype(int) - [255, 0, 0]).max() <= 3


def test_grey_of_16_bits_is_scaled(opened):
    """Each of the 65,536 values v of a 16-bit grey PNG becomes v // 257, in all three channels."""
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = grey[..., None] // 257
    assert (opened(encoded(Image.fromarray(grey), "PNG")) == expected).all()
    # So older versions of Pillow open them.
    older = Image.fromarray(grey.astype(np.int32))
    assert (np.asarray(to_rgb(older)) == expected).all()


@pytest.mark.parametrize(
    "mode,kind", [("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "PNG"), ("I;16", "PNG")]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(opened, orientation, mode, kind):
    """A picture comes out upright in all eight orientations, as by Pillow's exif_transpose."""
    exif = Image.Exif()
    exif[274] = orientation
    if mode == "I;16":
        image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 99)
    else:
        image = picture(mode, 30, 20)
    content = encoded(image, kind, exif=exif)
    pixels = opened(content)
    assert (pixels == np.asarray(to_rgb(ImageOps.exif_transpose(decoded(content))))).all()
    assert pixels.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(opened, kind):
    """Of an animation the first frame is read."""
    red = Image.new("RGB", (20, 10), (255, 0, 0))
    blue = Image.new("RGB", (20, 10), (0, 0, 255))
    content = encoded(red, kind, save_all=True, append_images=[blue, red, blue], lossless=True)
    assert decoded(content).n_frames == 4
    assert (opened(content) == (255, 0, 0)).all()


def test_part_of_a_file(tmp_path):
    """A picture inside of a larger file is what it is alone."""
    content = encoded(picture("RGB", 60, 40), "PNG")
    (tmp_path / "shard").write_bytes(b"x" * 77 + content + b"y" * 99)
    image = open_image(tmp_path / "shard", (77, len(content)))
    assert (np.asarray(image) == np.asarray(picture("RGB", 60, 40))).all()
    with pytest.raises(InputError, match="shard, bytes from 78: not a JPEG"):
        open_image(tmp_path / "shard", (78, len(content)))


KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "EPS", "TIFF")
FILES = {kind: encoded(picture("RGB", 60, 40), kind) for kind in KINDS}
JPEG = FILES["JPEG"]
PNG = FILES["PNG"]


def claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header claims a size."""
    header = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


FOREIGN = "not a JPEG, PNG, WebP, GIF or BMP image"
BOMB = "pixels; scale the image down"


def refused_files() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be used, and what is said of them."""
    files = {
        "a flipped byte": (PNG[:2000] + bytes([PNG[2000] ^ 255]) + PNG[2001:], "damaged"),
        "EPS, which runs Ghostscript": (FILES["EPS"], FOREIGN),
        "TIFF": (FILES["TIFF"], FOREIGN),
        "no pixels": (claiming(0, 5), FOREIGN),
        "too wide": (encoded(Image.new("L", (201, 1)), "PNG"), "201 x 1 pixels are too long"),
        "too tall": (encoded(Image.new("L", (3, 601)), "PNG"), "3 x 601 pixels are too long"),
    }
    for cut in (1, 2, 50, len(JPEG) // 2, len(JPEG) - 700):
        files[f"JPEG less {cut} bytes"] = (JPEG[:-cut], "damaged")
    for cut in (30, 100, len(PNG) // 2, len(PNG) - 60):
        files[f"PNG less {cut} bytes"] = (PNG[:-cut], "damaged")
    for kind in ("WEBP", "GIF", "BMP"):
        files[f"half a {kind}"] = (FILES[kind][: len(FILES[kind]) // 2], "damaged")
    for kind in ("JPEG", "PNG"):
        for size in (1, 4):
            files[f"{size} bytes of a {kind}"] = (FILES[kind][:size], FOREIGN)
    for index, content in enumerate([bytes(range(256)) * 9, *NOT_JSON]):
        files[f"foreign {index}"] = (content, FOREIGN)
    for side in (9_500, 20_000, 2**31 - 1):
        files[f"a bomb of {side} squared"] = (claiming(side, side), BOMB)
    return files


REFUSED = refused_files()


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_image_is_named(opened, tmp_path, name):
    """A broken, foreign, gigantic or very long image gives one error with its path and why."""
    content, hint = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "picture")) + ": .*" + hint):
        opened(content)


def test_limits_are_not_lower(opened):
    """An aspect ratio of 200 is still read, and so are 16 million pixels."""
    assert opened(encoded(Image.new("L", (200, 1)), "PNG")).shape == (1, 200, 3)
    assert opened(encoded(Image.new("L", (4000, 4000)), "PNG")).shape == (4000, 4000, 3)


@pytest.mark.parametrize(
    "name,hint", [("absent.jpg", "no such image"), ("", "directory"), ("a\0b", "null")]
)
def test_unusable_path_is_named(tmp_path, name, hint):
    """A missing file, a directory or an impossible name gives one error, path and reason."""
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name)) + "(?s:.*)" + hint):
        open_image(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/passwd", "a/../../x", "link/x", "loop", "a\0b", "\ud800.jpg"]
)
def test_paths_stay_inside(tmp_path, name):
    """A path from a stranger's file that leaves its root, or that is no path, gives one error."""
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "loop").symlink_to("loop")
    assert inside(tmp_path, "a/../b/1.jpg") == tmp_path / "b/1.jpg"
    with pytest.raises(InputError):
        inside(tmp_path, name)


# ---- Batches


def test_a_batch_worked_by_hand(tmp_path):
    """Four samples: with both captions, with one of each kind, and one that could not be read."""
    tiny_llama().save(str(tmp_path / "tokenizer.json"))
    layout = Layout(TextTokenizer(tmp_path), 2)
    pixels = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
    samples = [
        Sample(pixels[0], "A dog", [7, 8, 9]),
        Sample(None, None, None, error="x.jsonl, record 1: no such image"),
        Sample(pixels[2], "dog", None),
        Sample(pixels[3], None, [5]),
    ]
    batch = collate(samples, layout, micro_batch=2, multiple=4)
    assert batch.skipped == ["x.jsonl, record 1: no such image"]
    assert batch.num_pairs == 2
    assert batch.num_tokens == 3 + 1 + 1 + 1  # each caption, and each </s>

    # Shortest first: the image that has no long caption, then the one with a single token.
    first, last = batch.images
    assert first.pair.tolist() == [1, -1]
    assert first.pixel_values[:, 0, 0, 0].tolist() == [2, 3]
    assert last.pair.tolist() == [0]
    assert first.input_ids.shape[1] % 4 == 0
    at = layout.image_summary
    assert first.summary.tolist() == [at, at]
    assert (first.labels[0] == IGNORE).all()
    # The summary position predicts the caption's first token, its last token predicts </s>.
    assert first.labels[1, at : at + 3].tolist() == [5, layout.stop_id, IGNORE]
    assert last.labels[0, at : at + 5].tolist() == [7, 8, 9, layout.stop_id, IGNORE]
    assert (last.labels[0, :at] == IGNORE).all()

    (texts,) = batch.texts
    assert texts.pair.tolist() == [1, 0]
    assert texts.labels is None
    assert texts.pixel_values is None
    for row, caption in enumerate(["dog", "A dog"]):
        ids = layout.text_side(caption)
        assert texts.input_ids[row, : len(ids)].tolist() == ids
        assert texts.summary[row] == len(ids) - 1

    # Of a share of one half only the first two places train their captions. The last sample
    # trains its own all the same, since it has nothing else.
    half = collate(samples, layout, micro_batch=9, caption_share=0.5)
    assert half.num_tokens == 3 + 1 + 1 + 1
    assert collate(samples, layout, micro_batch=9, caption_share=0.0).num_tokens == 1 + 1
