"""Files in, batches out: tokenizer, image processor, the layout of a sequence, the training data, the test sets.

    tokenizer, processor = TextTokenizer(folder), ImageProcessor.from_pretrained(folder)
    layout = Layout(tokenizer, num_image_tokens=576)
    dataset = CaptionDataset("train.jsonl", layout, processor)

One record of the training data is one line of JSON. Image paths are relative to the file's folder (or `image_root`):

    {"image": "cats/017.jpg", "short": ["Two cats on a sofa."], "long": ["The photo shows two grey cats that ..."]}

Every caption is routed by its length, whatever its key ("captions" is another): under 30 tokens it feeds the
contrastive loss, from 30 to 500 the autoregressive loss (as in the paper), and a longer one is cut behind a sentence
(ours). Records that share a value under the optional key "group" stay neighbours, so that (but for a batch's border)
they are each other's hard negatives. A picture may also be a "part" of a larger file, [offset, bytes]. Other people's
files become such lines with `python data.py convert`, and `python data.py stats` tells what training makes of them.

Everything read here is data from strangers: captions cannot inject special tokens, paths cannot leave their root, and
what is broken is refused with a DataError or counted by reason, never skipped in silence. Axes: B batch, T tokens.
"""

import io
import json
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

IMAGE_PROMPT = "Summarize the provided image in one word:"
TEXT_PROMPT = "Summarize the provided text in one word:"
LONG = 30  # tokens from which a caption counts as long (paper)
LONGEST = 500
IGNORE = -100  # label of a position that is not supervised


class DataError(ValueError):
    """A file that cannot be used; the message names it, the field, what was found and what to do."""


def read_json(path: str | Path, expected: type | tuple[type, ...] = dict):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, expected):
        raise DataError(f"{path}: holds a JSON {type(content).__name__}, not what was expected here")
    return content


def sync(path: Path) -> None:
    """Come back when a file, or a folder's list of names, has reached the disk."""
    if os.name != "nt":  # Windows does not open folders
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_whole(path: Path, content: str | Callable[[Path], object]) -> None:
    """Replace a file, by a text or by what a function writes, so that the old one or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(content) if isinstance(content, str) else content(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def inside(root: Path, name: str) -> Path:
    """The path `name` below `root`. Raises DataError where it is absolute or leads outside, by `..` or a link."""
    with suppress(OSError, ValueError, RuntimeError):  # no path at all: a null byte, a lone surrogate, a loop of links
        path = (root / name).resolve()
        if path.is_relative_to(root.resolve()):
            return path
    raise DataError(f"{name!r} lies outside of {root}; set the image root to a folder that holds all images")


# ---- Text
class TextTokenizer:
    """The checkpoint's own tokenizer.json. Text is always plain text, unless a template of ours asks for more."""

    def __init__(self, folder: str | Path):
        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.tokenizer.encode("any \0 ☃")  # every text must have ids, those of [UNK] if need be
            self.begin = self.tokenizer.encode("").ids  # [1], LLaMA's <s>; nothing for Qwen
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library raises bare Exceptions, and panics, which are not even that
            raise DataError(f"{path}: not a tokenizer, perhaps a Git LFS pointer or a web page ({error})") from None
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: index for index, token in added.items() if token.special}
        self.special_pattern = re.compile(f"({'|'.join(map(re.escape, self.special_ids)) or '(?!)'})")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text -> ids, nothing put in front. `special` reads <image>, </s> and the like as special tokens: for our
        own templates only, since a caption that contains such a string means the string."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, legal in JSON, become question marks
        self.tokenizer.encode_special_tokens = not special
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_sentences(self, text: str, limit: int) -> list[int]:
        """The ids of as many whole sentences as fit the limit, cut hard where that would lose more than half of it."""
        self.tokenizer.encode_special_tokens = True
        encoding = self.tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
        if len(encoding.ids) <= limit:
            return encoding.ids
        fitting = text[: encoding.offsets[limit - 1][1] + 1]
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", fitting)]
        whole = self.encode(text[: ends[-1]]) if ends else []
        return whole if limit // 2 <= len(whole) <= limit else encoding.ids[:limit]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.tokenizer.decode(ids).strip()


@dataclass(frozen=True)
class ChatTemplate:
    """How a family of models writes a conversation: before a question, between question and answer, after an answer."""

    user: str
    assistant: str
    end: str  # one token


VICUNA = ChatTemplate("USER: ", " ASSISTANT:", "</s>")  # LLaVA-1.5, TinyLLaVA, as they were trained
CHATML = ChatTemplate("<|im_start|>user ", "<|im_end|><|im_start|>assistant\n", "<|im_end|>")  # interleave-qwen


class Layout:
    """Where everything stands in a sequence; every decision about it is made here, once.

        image side   <s> USER: <image> x N | \\nSummarize the provided image in one word: ASSISTANT: | long caption </s>
        text side    <s> USER: caption     | \\nSummarize the provided text in one word: ASSISTANT:
                                                                                               ^ the summary position

    Each part between bars is tokenized on its own, so that a prompt's ids never depend on the text around it (which
    puts LLaMA's space token in front of the text prompt's line break, as it stands there after an image). With
    `soft_start`, the prompts' tokens are replaced by the ids soft_start, soft_start + 1, ... that lora.SoftPrompt
    embeds; `prompt_ids` are the hand-written tokens that these ids began as."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        num_image_tokens: int,
        image_prompt: str = IMAGE_PROMPT,
        text_prompt: str = TEXT_PROMPT,
        soft_start: int | None = None,
    ):
        self.tokenizer, self.num_image_tokens = tokenizer, num_image_tokens
        self.template = CHATML if "<|im_start|>" in tokenizer.special_ids else VICUNA
        try:
            self.image_id, self.stop_id = (tokenizer.special_ids[token] for token in ("<image>", self.template.end))
        except KeyError as token:
            raise DataError(f"tokenizer.json has no special token {token}; it is not a LLaVA's tokenizer") from None
        self.prompt_texts = image_prompt, text_prompt
        self.image_prompt, self.text_prompt = (self.prompt(text) for text in self.prompt_texts)
        self.prompt_ids = self.image_prompt + self.text_prompt
        if soft_start is not None:
            soft = list(range(soft_start, soft_start + len(self.prompt_ids)))
            self.image_prompt, self.text_prompt = soft[: len(self.image_prompt)], soft[len(self.image_prompt) :]
        self.image_prefix = tokenizer.begin + self.fill(self.template.user + "<image>")
        self.image_summary = len(self.image_side()) - 1

    @property
    def notes(self) -> dict[str, str]:
        """What soft prompts depend on, in words: kept with them and compared when they are loaded."""
        template = "{user}[image or text]\n[prompt]{assistant}[caption]{end}".format(**vars(self.template))
        return dict(zip(("image_prompt", "text_prompt"), self.prompt_texts)) | {"template": template}

    def with_soft_prompts(self, soft_start: int) -> "Layout":
        return Layout(self.tokenizer, self.num_image_tokens, *self.prompt_texts, soft_start)

    def with_image_prompt(self, text: str) -> "Layout":
        return Layout(self.tokenizer, self.num_image_tokens, text, self.prompt_texts[1])

    def fill(self, template: str, text: str = "") -> list[int]:
        """Ids of a template with {text} filled in. Special tokens count in the template, never in the text."""
        ids = []
        for part in self.tokenizer.special_pattern.split(template):
            if part in self.tokenizer.special_ids:
                ids += [self.tokenizer.special_ids[part]] * (self.num_image_tokens if part == "<image>" else 1)
            elif stretch := part.replace("{text}", text):
                ids += self.tokenizer.encode(stretch)
        return ids

    def prompt(self, text: str) -> list[int]:
        """What follows an image or a caption, up to where the model answers."""
        return self.fill("\n{text}" + self.template.assistant, text)

    def image_side(self, caption: list[int] | None = None) -> list[int]:
        """An image, its prompt, and the ids of a long caption, which the summary at `image_summary` cannot see."""
        return self.image_prefix + self.image_prompt + (caption + [self.stop_id] if caption else [])

    def text_side(self, caption: str) -> list[int]:
        """A caption and its prompt. The text is summarized at the last position."""
        return self.tokenizer.begin + self.fill(self.template.user + "{text}", caption.strip()) + self.text_prompt

    def question(self, text: str) -> list[int]:
        """The start of a conversation about an image."""
        return self.image_prefix + self.prompt(text)

    def next_question(self, text: str) -> list[int]:
        """What follows an answer in a conversation."""
        return self.fill(self.template.end + self.template.user + "{text}" + self.template.assistant, text)


# ---- Images
def open_image(path: str | Path, part: tuple[int, int] | None = None) -> Image.Image:
    """Read a picture, a whole file or `part` (offset, bytes) of one, as upright RGB. Raises DataError for what is
    missing, broken, a decompression bomb, or too long.

    Decided: rotation by EXIF is applied (as transformers' load_image does); transparency is composited on white (as
    transformers 5 does); 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white); of an animation the
    first frame is taken; only JPEG, PNG, WebP, GIF and BMP are opened (other readers of Pillow run programs)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = path
            if part:
                with open(path, "rb") as file:
                    file.seek(part[0])
                    source, path = io.BytesIO(file.read(part[1])), f"{path}, bytes from {part[0]}"
            with Image.open(source, formats=["JPEG", "PNG", "WEBP", "GIF", "BMP"]) as image:
                rgb = to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels; scale the image down") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a JPEG, PNG, WebP, GIF or BMP image") from None
    except Exception as error:  # whatever Pillow's decoders find: truncated data, bad checksums, broken headers
        raise DataError(f"{path}: the image is damaged ({error})") from None
    if max(rgb.size) > 200 * min(rgb.size):  # resizing its short side would take gigabytes
        raise DataError(f"{path}: {rgb.width} x {rgb.height} pixels are too long for an image")
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow opens 16-bit grey PNGs as either
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


class ImageProcessor:
    """Picture -> pixel values, as preprocessor_config.json says; bit for bit transformers' PIL image processors."""

    def __init__(self, raw: dict, where: str = "preprocessor_config.json"):
        def read(key, convert, default=None):
            value = raw.get(key, default)
            try:
                return convert(value)
            except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
                found = "missing" if value is None else f"{value!r}, which cannot be used"
                raise DataError(f"{where}: {key} is {found}") from None

        def size(value) -> tuple[int, ...]:
            """(height, width), or the length of the shortest edge alone. An integer is a square."""
            given = {"height": value, "width": value} if type(value) is int else value
            given = {key: length for key, length in given.items() if length is not None}
            lengths = (given["height"], given["width"]) if given.keys() != {"shortest_edge"} else tuple(given.values())
            if not all(type(length) is int and 0 < length <= 4096 for length in lengths):
                raise ValueError
            return lengths

        crop = read("crop_size", size) if raw.get("do_center_crop", "crop_size" in raw) else None
        self.resized = read("size", size)
        if crop and type(raw["size"]) is int:  # so old CLIP configs write the shortest edge
            self.resized = self.resized[:1]
        self.size = crop or self.resized  # (height, width) of what comes out
        if len(self.size) == 1 or any(wanted > there for wanted, there in zip(self.size, self.resized * 2)):
            raise DataError(f"{where}: size {raw['size']!r} and crop_size {crop} do not give images of one size")
        self.resample = read("resample", Image.Resampling, 3)
        mean, std = (read(key, lambda rgb: np.array(rgb, np.float32).reshape(3)) for key in ("image_mean", "image_std"))
        factor = read("rescale_factor", float, 1 / 255) if raw.get("do_rescale", True) else 1.0
        for key, wanted in (("do_resize", True), ("do_normalize", True), ("do_pad", False)):
            if raw.get(key, wanted) not in (wanted, None):
                raise DataError(f"{where}: {key} is {raw[key]!r}, which is not implemented")
        # A pixel has 256 values, so rescaling and normalising are a table; the roundings are transformers' own.
        with np.errstate(all="ignore"):
            values = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
            self.table = (values - mean[:, None]) / std[:, None]  # (3, 256)
        if not np.isfinite(self.table).all() or not np.isfinite(std).all():
            raise DataError(f"{where}: rescale_factor, image_mean and image_std do not give finite pixel values")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageProcessor":
        """From preprocessor_config.json, or from the newer processor_config.json, where it is nested."""
        path = Path(folder) / "preprocessor_config.json"
        if path.exists():
            return cls(read_json(path), str(path))
        path = Path(folder) / "processor_config.json"
        raw = read_json(path).get("image_processor")
        if not isinstance(raw, dict):
            raise DataError(f"{path}: has no image_processor, and there is no preprocessor_config.json beside it")
        return cls(raw, f"{path}: image_processor")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, height, width) fp32."""
        if len(self.resized) == 1:
            width, height = (int(self.resized[0] * side / min(image.size)) for side in image.size)  # not rounded
        else:
            height, width = self.resized
        pixels = np.asarray(image.resize((width, height), self.resample))  # (height, width, 3) uint8
        top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2  # 0 where nothing is cropped
        pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        return torch.from_numpy(np.stack([self.table[c][pixels[..., c]] for c in range(3)]))


# ---- Training data
@dataclass
class Sample:
    """One record, read: an image and one caption of each kind, where there is one."""

    pixel_values: torch.Tensor  # (3, height, width) fp32
    short: str | None  # for the contrastive loss
    long: list[int] | None  # ids, for the autoregressive loss


@dataclass
class Chunk:
    """Sequences of similar length, padded on the right."""

    input_ids: torch.Tensor  # (b, T) int64
    summary: torch.Tensor  # (b,) the position whose hidden state is the embedding
    pair: torch.Tensor  # (b,) the sequence's place among the pairs of the contrastive loss, -1 if it has none
    labels: torch.Tensor | None = None  # (b, T) the NEXT token, IGNORE outside of long captions; images only
    pixel_values: torch.Tensor | None = None  # (b, 3, height, width); images only

    def to(self, device) -> "Chunk":
        return Chunk(**{name: value.to(device) for name, value in vars(self).items() if value is not None})


@dataclass
class Batch:
    """One optimiser step's data, as chunks small enough for one forward pass each."""

    images: list[Chunk]
    texts: list[Chunk]
    num_pairs: int
    num_tokens: int  # supervised by the autoregressive loss, in all chunks together
    skipped: list[str]  # why records of this batch could not be used


class CaptionDataset(Dataset):
    """A JSONL file of captioned images (see the top of this file). Lines are read when they are needed.

    Items are asked for as (record, draw): `draw` picks among a record's captions, so that the same pair always gives
    the same Sample. What cannot be read comes back as a sentence that says why.

    Args:
        contrast: which captions feed the contrastive loss; "long" is for showing why it must be "short".
    Raises:
        DataError: when a file has no usable record, or more than 1 % of its lines are faulty."""

    def __init__(
        self,
        path: str | Path,
        layout: Layout,
        processor: ImageProcessor,
        image_root: str | Path | None = None,
        contrast: str = "short",
    ):
        self.path, self.layout, self.processor, self.contrast = Path(path), layout, processor, contrast
        self.root = Path(image_root) if image_root else self.path.parent
        offset, offsets, groups, first_fault, self.faults = 0, [], {}, "", Counter()
        self.units: list[int] = []  # records of one unit stay neighbours
        for number, line in enumerate(self.lines(), 1):
            try:
                if line.strip():
                    group = parse_record(line).get("group")
                    self.units.append(number if group is None else groups.setdefault(group, number))
                    offsets.append(offset)
            except DataError as error:
                self.faults[str(error)] += 1
                first_fault = first_fault or f"line {number}: {error}"
            offset += len(line)
        self.offsets = np.array(offsets, np.int64)
        faulty, usable = self.faults.total(), len(offsets)
        if not faulty and not usable:
            raise DataError(f"{path}: is empty")
        if faulty > 0.01 * (faulty + usable) or not usable:
            counts = "; ".join(f"{count} x {reason}" for reason, count in self.faults.most_common(5))
            raise DataError(f"{path}: {faulty} of {faulty + usable} lines cannot be used, {first_fault} ({counts})")

    def lines(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                yield from tqdm(file, desc=f"reading {self.path.name}", unit=" lines", delay=2, leave=False)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None

    def __len__(self) -> int:
        return len(self.offsets)

    def record(self, index: int) -> dict:
        """{"image", "short", "long", ...} as it stands in the file."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return parse_record(file.readline())

    def captions(self, record: dict) -> tuple[list[str], list[list[int]]]:
        """All captions of a record by their length: short ones as text, long ones as ids of at most LONGEST tokens."""
        short, long = [], []
        for text in record["short"] + record["long"] + record["captions"]:
            ids = self.layout.tokenizer.encode_sentences(text.strip(), LONGEST)
            if len(ids) >= LONG:
                long.append(ids)
            elif ids:
                short.append(text)
        if self.contrast == "long":
            short = [self.layout.tokenizer.decode(ids) for ids in long]
        return short, long

    def __getitem__(self, key: tuple[int, int]) -> Sample | str:
        index, draw = key
        try:
            record = self.record(index)
            chosen = [kind[draw % len(kind)] if kind else None for kind in self.captions(record)]
            if not any(chosen):
                raise DataError("no caption is left")
            pixels = self.processor(open_image(inside(self.root, record["image"]), record.get("part")))
            return Sample(pixels, *chosen)
        except DataError as error:
            return f"{self.path.name}, record {index}: {error}"


def parse_record(line: bytes) -> dict:
    """One line of the training data, checked, with both lists of captions present."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise DataError('no "image" with the path of a picture')
    record = {"short": [], "long": [], "captions": []} | record
    for key in ("short", "long", "captions"):
        if not isinstance(record[key], list) or not all(isinstance(text, str) for text in record[key]):
            raise DataError(f'"{key}" is not a list of captions')
    if not any(text.strip() for text in record["short"] + record["long"] + record["captions"]):
        raise DataError("no caption")
    part = record.get("part", [0, 1])
    if not isinstance(part, list) or len(part) != 2 or not all(type(n) is int and 0 <= n < 2**48 for n in part):
        raise DataError('"part" is not [offset, bytes]')
    if not isinstance(record.get("group"), str | int | None):
        raise DataError('"group" is neither a string nor a number')
    return record


class ResumableSampler(Sampler):
    """Batches of (record, draw) for `CaptionDataset`: a function of the seed and the step, so any step can be resumed.

    Every epoch is a new permutation; the records of one unit stay neighbours (a batch's border may part them). An
    epoch's last records that do not fill a batch wait for the next permutation. Of every batch, `places` are yielded:
    range(rank, batch_size, processes) is the share of one of several processes."""

    def __init__(self, units: list[int], batch_size: int, steps: int, seed=0, first_step=0, places: range = None):
        if len(units) < batch_size:
            raise DataError(f"{len(units)} usable records do not fill a batch of {batch_size}; lower the batch size")
        self.units, self.batch_size, self.seed = np.asarray(units), batch_size, seed
        self.first_step, self.steps, self.places = first_step, steps, places or range(batch_size)

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch, loaded = len(self.units) // self.batch_size, None
        for step in range(self.first_step, self.steps):
            number, place = divmod(step, per_epoch)
            if number != loaded:
                random, loaded = np.random.default_rng([self.seed, number]), number
                rank = random.permutation(self.units.max() + 1)[self.units]
                order, draws = np.argsort(rank, kind="stable"), random.integers(2**31, size=len(rank))
            part = np.array(self.places) + place * self.batch_size
            yield list(zip(order[part].tolist(), draws[part].tolist()))


def collate(
    samples: list[Sample | str], layout: Layout, micro_batch: int, caption_share: float = 1.0, multiple: int = 1,
    places: range | None = None
) -> Batch:  # fmt: skip
    """Lay samples out as sequences, sort them by length, pad them on the right, `micro_batch` at a time, to the next
    `multiple` of tokens (GPUs, and what is compiled, like few and round lengths).

    Long captions are trained on in the first `caption_share` of the batch's places; an image that has only a long one
    always trains it. `places` are the samples' in the global batch, range(rank, batch_size, processes)."""
    places = places or range(len(samples))
    supervised = math.ceil(caption_share * places.stop)
    images, texts, num_tokens = [], [], 0
    for place, sample in zip(places, samples):
        if isinstance(sample, str):  # why it could not be read
            continue
        caption = sample.long if sample.short is None or place < supervised else None
        pair = len(texts) if sample.short is not None else -1
        if pair >= 0:
            texts.append((layout.text_side(sample.short), pair, None))
        if pair >= 0 or caption:
            images.append((layout.image_side(caption), pair, sample.pixel_values))
            num_tokens += len(caption) + 1 if caption else 0

    def chunks(sequences) -> Iterator[Chunk]:
        sequences = sorted(sequences, key=lambda sequence: len(sequence[0]))
        for first in range(0, len(sequences), micro_batch):
            ids, pairs, pixels = zip(*sequences[first : first + micro_batch])
            width = math.ceil(max(map(len, ids)) / multiple) * multiple
            input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids])
            lengths = torch.tensor([len(row) for row in ids])
            if pixels[0] is None:
                yield Chunk(input_ids, lengths - 1, torch.tensor(pairs))
                continue
            position = torch.arange(input_ids.shape[1])
            # Position t predicts token t + 1: from the summary position on (it predicts the caption's first token) ...
            predicts = (position >= layout.image_summary) & (position < lengths[:, None] - 1)
            labels = input_ids.roll(-1, dims=1).masked_fill(~predicts, IGNORE)
            summary = torch.full_like(lengths, layout.image_summary)
            yield Chunk(input_ids, summary, torch.tensor(pairs), labels, torch.stack(pixels))

    skipped = [sample for sample in samples if isinstance(sample, str)]
    return Batch(list(chunks(images)), list(chunks(texts)), len(texts), num_tokens, skipped)


# ---- Test sets, in the formats that their authors publish
@contextmanager
def fields_of(path: str | Path) -> Iterator[None]:
    """Turn what a file of another shape runs into, a missing key or a wrong type, into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8
        raise DataError(f"{path}: not in the expected format ({type(error).__name__}: {error})") from None


def pictures_in(folder: str | Path) -> list[Path]:
    """The pictures in a folder and in the folders below it, by their names' endings, in order."""
    endings = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings and path.is_file())


def read_retrieval(
    path: str | Path, image_root: str | Path, split: str = "test", most: int | None = None
) -> list[tuple[Path, list[str]]]:
    """(image, its captions), at most `most` of them, from Karpathy's JSON (one split of it), from COCO's and nocaps'
    (annotations in any order), or from BLIP's. An image without captions stays: one more to be mistaken."""
    content, captions = read_json(path, (dict, list)), defaultdict(list)
    with fields_of(path):
        if isinstance(content, list):
            items = [(item["image"], item["caption"]) for item in content]
        elif "annotations" in content:
            for annotation in content["annotations"]:
                captions[annotation["image_id"]].append(annotation["caption"])
            items = [(image["file_name"], captions[image["id"]]) for image in content["images"]]
        else:
            chosen = [image for image in content["images"] if image["split"] == split]
            names = [str(Path(image.get("filepath", "")) / image["filename"]) for image in chosen]
            items = [(name, [each["raw"] for each in image["sentences"]]) for name, image in zip(names, chosen)]
        joined = defaultdict(list)  # some files have a line for each caption; an image must not compete with itself
        for name, texts in items:
            joined[name] += [texts] if isinstance(texts, str) else texts
        items = joined.items()
        if not any(texts for _, texts in items):
            raise DataError(f"{path}: no captions of images (of split {split!r}, if it has splits)")
        return [(inside(Path(image_root), name), [text.strip() for text in texts[:most]]) for name, texts in items]


def read_imagenet(root: str | Path, names: str | Path | None = None) -> tuple[list[tuple[Path, int]], list[str]]:
    """A folder a class -> (image, class) and the classes' names, in the folders' sorted order.

    `names` is a text file with a name a line or a JSON list, in that order; or a JSON object from folders to names, or
    from anything to [folder, name]. Without it, the folders' names are the classes'."""
    root = Path(root)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    classes = [folder.replace("_", " ") for folder in folders]
    if names and Path(names).suffix == ".json":
        with fields_of(names):
            content = read_json(names, (dict, list))
            if isinstance(content, dict):
                pairs = [value if isinstance(value, list) else (key, value) for key, value in content.items()]
                content = list(map(dict(pairs).__getitem__, folders))
            classes = [name.replace("_", " ").strip() for name in content]
    elif names:
        with fields_of(names), open(names, encoding="utf-8") as file:
            classes = [line.strip() for line in file if line.strip()]
    if not folders or len(classes) != len(folders):
        raise DataError(f"{names or root}: {len(classes)} class names for the {len(folders)} folders of {root}")
    pictures = [(path, index) for index, folder in enumerate(folders) for path in pictures_in(root / folder)]
    if not pictures:
        raise DataError(f"{root}: no pictures in its {len(folders)} folders")
    return pictures, classes


def read_sugarcrepe(path: str | Path, image_root: str | Path, captions: tuple[str, ...]) -> list[dict]:
    """One file of SugarCrepe (an object keyed by numbers, with gaps) or SugarCrepe++ (a list) -> its items, each with
    the path of its "image" and the fields named in `captions`."""
    content = read_json(path, (dict, list))
    items = list(content.values()) if isinstance(content, dict) else content
    if not items:
        raise DataError(f"{path}: holds no items")
    with fields_of(path):
        return [
            {"image": inside(Path(image_root), item["filename"])} | {key: item[key].strip() for key in captions}
            for item in items
        ]


def read_winoground(path: str | Path, image_root: str | Path) -> list[dict]:
    """examples.jsonl -> items with "caption_0", "caption_1" and the images of "image_0", "image_1" as paths."""
    try:
        items = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not items:
        raise DataError(f"{path}: holds no examples")
    with fields_of(path):
        return [
            {key: item[key].strip() for key in ("caption_0", "caption_1")}
            | {key: inside(Path(image_root), item[key] + ".png") for key in ("image_0", "image_1")}
            for item in items
        ]


if __name__ == "__main__":  # convert and stats; nothing here needs them
    from examples.prepare import main

    main()
