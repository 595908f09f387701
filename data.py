"""Files in, batches out: tokenizer, layout of a sequence, image processor, training data.

    tokenizer = TextTokenizer(folder)
    processor = ImageProcessor.from_pretrained(folder)
    layout = Layout(tokenizer, num_image_tokens=576)
    dataset = CaptionDataset("train.jsonl", layout, processor)
    batch = collate([dataset[0, 0], dataset[1, 0]], layout, micro_batch=8)

One record of the training data is one line of JSON. Image paths are relative to the file's folder
(or to `image_root`):

    {"image": "cats/017.jpg", "short": ["Two cats on a sofa."], "long": ["The photo shows ..."]}

A caption is routed by its length, whatever its key ("captions" is another key): under 30 tokens it
feeds the contrastive loss, from 30 to 500 the autoregressive loss, as in the paper; a longer one is
cut at the end of a sentence, which is ours. Two keys are optional:

    "group": 7             with `train.py --groups` records with one value stay neighbours, so that
                           (but for a batch's border) they are hard negatives of each other
    "part": [512, 20480]   the picture is a part of the file "image": offset and length in bytes

`python -m examples.convert` makes such lines of other people's files, `python -m examples.stats`
tells what training makes of them.

Everything read here is data from strangers. Captions cannot inject special tokens, paths cannot
leave their root. What is broken is refused with an InputError, or counted by its reason; nothing is
skipped in silence.

Axes: b sequences of one chunk, T tokens.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from formats.files import (
    InputError,
    inside,
    read_json,
    read_text,
    what_it_may_be,
    without_surrogates,
)
from formats.images import open_image, read_field, read_pixel_table, read_sizes, refuse_unless
from formats.records import LIST_AS_TEXT, PLACEHOLDER, fault_of_caption
from losses import IGNORE

# The paper's hand-written prompts. Soft prompts begin as these.
IMAGE_PROMPT = "Summarize the provided image in one word:"
TEXT_PROMPT = "Summarize the provided text in one word:"

LONG = 30  # tokens from which a caption counts as long (paper)
LONGEST = 500  # tokens of a long caption that are trained on, at most (paper)
CAPTION_KEYS = ("short", "long", "captions")

NO_PAIR = -1  # place of a sequence that has no partner in the contrastive loss


# ---- What comes out


@dataclass
class Sample:
    """One record, read: an image, and one caption of each kind where there is one.

    A record that cannot be read has an `error` that says why, and nothing else."""

    pixel_values: torch.Tensor | None  # (3, height, width) fp32
    short: str | None  # for the contrastive loss; `Layout.text_side` makes it ids
    long: list[int] | None  # for the autoregressive loss; ids, for long ones are cut by tokens
    error: str | None = None


@dataclass
class Chunk:
    """Sequences of similar length, padded on the right: one forward pass.

    Chunks of texts have neither `labels` nor `pixel_values`."""

    input_ids: torch.Tensor  # (b, T) int64
    summary: torch.Tensor  # (b,) int64, the position whose hidden state is the embedding
    pair: torch.Tensor  # (b,) int64, the sequence's place among the contrastive pairs, or NO_PAIR
    labels: torch.Tensor | None = None  # (b, T) int64, the NEXT token, IGNORE outside of captions
    # (b, 3, height, width) fp32; where sizes differ, a list of (3, height, width)
    pixel_values: torch.Tensor | list[torch.Tensor] | None = None

    def to(self, device: torch.device | str) -> "Chunk":
        moved = {}
        for name, value in vars(self).items():
            if value is not None:
                moved[name] = move_images(value, device)
        return Chunk(**moved)


@dataclass
class Batch:
    """The data of one optimizer step, in chunks that are small enough for one forward pass each."""

    images: list[Chunk]
    texts: list[Chunk]
    num_pairs: int
    num_tokens: int  # supervised by the autoregressive loss, in all chunks together
    skipped: list[str]  # why records of this batch could not be used


# ---- Text


class TextTokenizer:
    """The checkpoint's own tokenizer.json. Text is plain text, unless our templates ask for more.

    Raises:
        InputError: when the file is missing, is no tokenizer, or cannot encode every text."""

    def __init__(self, folder: str | Path):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            advice = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
            raise InputError(f"{path}: no such file; transformers' {advice}")
        content = read_text(path)
        try:
            self.tokenizer = Tokenizer.from_str(content)
            # A file may have been saved with either; we want a text's own ids, all of them.
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            # Every text must have ids, those of the unknown token if need be. Better to know now.
            self.tokenizer.encode("any \0 ☃")
            # What stands in front of every sequence: [1] for LLaMA, its <s>; nothing for Qwen.
            self.begin = self.tokenizer.encode("").ids
        except KeyboardInterrupt:
            raise
        # The library raises bare Exceptions, and Rust panics, which are not even that.
        except BaseException as error:
            hint = what_it_may_be(path)
            raise InputError(f"{path}: not a tokenizer ({error}); {hint}") from None

        self.special_ids = {}  # from a special token's string to its id
        for index, token in self.tokenizer.get_added_tokens_decoder().items():
            if token.special:
                self.special_ids[token.content] = index
        escaped = [re.escape(token) for token in self.special_ids]
        # "(?!)" matches nowhere: without special tokens a template is one stretch of plain text.
        self.special_pattern = re.compile(f"({'|'.join(escaped) or '(?!)'})")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text -> ids, with nothing put in front.

        `special` reads <image>, </s> and the like as special tokens. It is for our own templates
        only: a caption that contains such a string means the string."""
        self.tokenizer.encode_special_tokens = not special
        return self.tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_sentences(self, text: str, limit: int) -> list[int]:
        """The ids of as many whole sentences as fit into `limit` tokens.

        Where whole sentences would lose more than half of the limit, the cut is hard."""
        self.tokenizer.encode_special_tokens = True
        encoding = self.tokenizer.encode(without_surrogates(text), add_special_tokens=False)
        if len(encoding.ids) <= limit:
            return encoding.ids

        # One character more than fits, to see whether a last full stop ends a sentence.
        end_of_last_token = encoding.offsets[limit - 1][1]
        fitting = text[: end_of_last_token + 1]
        sentence_ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", fitting)]
        if sentence_ends:
            sentences = self.encode(text[: sentence_ends[-1]])
            if limit // 2 <= len(sentences) <= limit:
                return sentences
        return encoding.ids[:limit]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.tokenizer.decode(ids).strip()


# ---- Layout


@dataclass(frozen=True)
class ChatTemplate:
    """How a family of models writes a conversation."""

    user: str  # in front of a question
    assistant: str  # between a question and its answer
    end: str  # after an answer, one token
    # What the templates in this file do without, and those of other backbones need.
    begin: str = ""  # in front of a conversation, once
    image_token: str = "<image>"
    image_turn: str = ""  # in front of a question about an image; empty: user + image_token
    around_image: tuple[str, str] = ("", "")  # what transformers' processor adds to an image token
    behind_image: str = "\n"  # between an image and its question
    answer: str = ""  # in front of an answer's words
    between: str = ""  # between an answer's end and the next question

    @property
    def first_turn(self) -> str:
        """All that stands in front of the first question, where it is about an image."""
        return self.begin + (self.image_turn or self.user + self.image_token)


VICUNA = ChatTemplate("USER: ", " ASSISTANT:", "</s>")  # LLaVA-1.5 and TinyLLaVA, as trained
CHATML = ChatTemplate(  # llava-interleave-qwen
    "<|im_start|>user ", "<|im_end|><|im_start|>assistant\n", "<|im_end|>"
)
LLAMA3 = ChatTemplate(  # xtuner's LLaVAs on Llama-3
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
)
JOYCAPTION = ChatTemplate(  # on Llama-3.1, whose dates are a part of the words
    begin="<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"
    "You are a helpful image captioner.<|eot_id|>",
    user=LLAMA3.user,
    assistant=LLAMA3.assistant,
    end=LLAMA3.end,
    image_token="<|reserved_special_token_69|>",
    image_turn=LLAMA3.user + "<|reserved_special_token_70|><|reserved_special_token_69|>"
    "<|reserved_special_token_71|>",
    behind_image="",
)


def llava_template(special_ids: dict[str, int]) -> ChatTemplate:
    """How a LLaVA writes a conversation, told by its tokenizer's special tokens."""
    if "<|im_start|>" in special_ids:
        return CHATML
    if "<|eot_id|>" in special_ids:
        return LLAMA3 if "<image>" in special_ids else JOYCAPTION
    return VICUNA


class Layout:
    r"""Where everything stands in a sequence. Every decision about it is made here, once.

    image side
      <s> USER: <image> x N | \nSummarize the provided image in one word: ASSISTANT: | caption </s>
                                                                                   ^
    text side                                                            the summary position
                                                                                  v
      <s> USER: caption     | \nSummarize the provided text in one word: ASSISTANT:

    Each part between bars is tokenized on its own, so that a prompt's ids never depend on the text
    around it. (LLaMA's tokenizer then puts its space token in front of the text prompt's line
    break, where it also stands behind an image.)

    With `soft_start`, the tokens of both prompts are replaced by the ids soft_start,
    soft_start + 1, ..., which lora.SoftPrompt embeds.

    Args:
        num_image_tokens: N, how many tokens one image takes; for models whose images differ in
            size, a function of (height, width).
        image_prompt, text_prompt: the prompts in words; the attributes of these names hold ids.
        soft_start: the first soft id, or None for hand-written prompts.
        template: how the model writes a conversation; None: a LLaVA's, as its tokenizer shows.
    Raises:
        InputError: when the tokenizer lacks <image> or the token that ends an answer."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        num_image_tokens: int | Callable[[int, int], int],
        image_prompt: str = IMAGE_PROMPT,
        text_prompt: str = TEXT_PROMPT,
        soft_start: int | None = None,
        template: ChatTemplate | None = None,
    ):
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        if template is None:
            template = llava_template(tokenizer.special_ids)
        self.template = template
        self.image_id = self.special_id(template.image_token)
        self.stop_id = self.special_id(template.end)

        self.prompt_texts = (image_prompt, text_prompt)
        self.image_prompt = self.prompt(image_prompt)
        self.text_prompt = self.fill("\n{text}" + template.assistant, text_prompt)
        # The hand-written tokens, also where soft ids stand for them: soft prompts begin as these.
        self.prompt_ids = self.image_prompt + self.text_prompt
        if soft_start is not None:
            # As many soft ids as there are hand-written ones, the image prompt's first.
            border = soft_start + len(self.image_prompt)
            end = soft_start + len(self.prompt_ids)
            self.image_prompt = list(range(soft_start, border))
            self.text_prompt = list(range(border, end))

        # What stands in front of an image's tokens, and after them.
        first_turn = tokenizer.begin + self.fill(template.first_turn)
        place = first_turn.index(self.image_id)
        self.before_image = first_turn[:place]
        self.behind_image = first_turn[place + 1 :]

    def count_image_tokens(self, image: torch.Tensor | None) -> int:
        """N of a prepared picture (3, height, width). None will do where all have as many."""
        if isinstance(self.num_image_tokens, int):
            return self.num_image_tokens
        if image is None:
            raise ValueError("this model's images take different numbers of tokens: give the image")
        height, width = image.shape[-2:]
        return self.num_image_tokens(height, width)

    def prefix(self, image: torch.Tensor | None = None) -> list[int]:
        """What stands in front of the prompt: the beginning, and a prepared picture's tokens."""
        image_tokens = [self.image_id] * self.count_image_tokens(image)
        return self.before_image + image_tokens + self.behind_image

    @property
    def image_prefix(self) -> list[int]:
        """`prefix`, where all images take as many tokens."""
        return self.prefix()

    @property
    def image_summary(self) -> int:
        """The summary's position on the image side, where all images take as many tokens."""
        return len(self.image_side()) - 1

    def special_id(self, token: str) -> int:
        if token not in self.tokenizer.special_ids:
            raise InputError(
                f"tokenizer.json has no special token {token!r}, which the model's conversations "
                "need; a LLaVA's are told by </s> (Vicuna), <|im_start|> (ChatML) or <|eot_id|> "
                "(Llama-3), and others are not known"
            )
        return self.tokenizer.special_ids[token]

    @property
    def notes(self) -> dict[str, str]:
        """What soft prompts depend on, in words: kept with them, compared when they are loaded."""
        image_prompt, text_prompt = self.prompt_texts
        template = self.template
        question = f"{template.begin}{template.user}[image or text]{template.behind_image}[prompt]"
        answer = f"{template.assistant}{template.answer}[caption]{template.end}"
        return {
            "image_prompt": image_prompt,
            "text_prompt": text_prompt,
            "template": question + answer,
        }

    def with_prompts(self, image: str, text: str, soft_start: int | None = None) -> "Layout":
        """The same layout with other prompts."""
        number = self.num_image_tokens
        return Layout(self.tokenizer, number, image, text, soft_start, self.template)

    def with_soft_prompts(self, soft_start: int) -> "Layout":
        """The same layout, with soft ids in place of the prompts' tokens."""
        return self.with_prompts(*self.prompt_texts, soft_start)

    def with_image_prompt(self, text: str) -> "Layout":
        """The same layout with another image prompt, hand-written."""
        return self.with_prompts(text, self.prompt_texts[1])

    def fill(self, template: str, text: str = "") -> list[int]:
        """The ids of a template with {text} filled in.

        Special tokens count as such in the template, never in the text."""
        before, behind = self.template.around_image
        image_token = self.template.image_token
        template = template.replace(image_token, before + image_token + behind)
        ids = []
        for part in self.tokenizer.special_pattern.split(template):
            if part in self.tokenizer.special_ids:
                ids.append(self.tokenizer.special_ids[part])
            else:
                plain = part.replace("{text}", text)
                if plain:
                    ids.extend(self.tokenizer.encode(plain))
        return ids

    def prompt(self, text: str) -> list[int]:
        """What follows an image, up to where the model answers."""
        return self.fill(self.template.behind_image + "{text}" + self.template.assistant, text)

    def image_side(
        self, caption: list[int] | None = None, image: torch.Tensor | None = None
    ) -> list[int]:
        """An image, its prompt, and the ids of a long caption if there is one.

        image: the prepared picture; None will do where all take as many tokens.
        The summary, at the prompt's last token, cannot see the caption: attention is causal."""
        ids = self.prefix(image) + self.image_prompt
        if caption:
            ids = ids + caption + [self.stop_id]
        return ids

    def text_side(self, caption: str) -> list[int]:
        """A caption and its prompt. The text is summarized at the last position."""
        turn = self.template.begin + self.template.user
        caption_ids = self.fill(turn + "{text}", caption.strip())
        return self.tokenizer.begin + caption_ids + self.text_prompt

    def answer(self, text: str) -> str:
        """A caption as the model would say it, to be tokenized on its own."""
        return self.template.answer + text.strip()

    def question(self, text: str, image: torch.Tensor | None = None) -> list[int]:
        """The start of a conversation about an image, for which see `image_side`."""
        return self.prefix(image) + self.prompt(text)

    def next_question(self, text: str) -> list[int]:
        """What follows an answer in a conversation."""
        turn = self.template.end + self.template.between + self.template.user
        return self.fill(turn + "{text}" + self.template.assistant, text)


# ---- Images


class ImageProcessor:
    """Picture -> pixel values, as preprocessor_config.json says.

    Bit for bit what transformers' PIL image processors (CLIPImageProcessor, SiglipImageProcessor)
    make of the same picture.

    Args:
        raw: the file's content.
        where: what error messages call the file.
    Raises:
        InputError: for a field that is missing, wrong, or asks for what is not implemented."""

    # What transformers must read in preprocessor_config.json to do the same, where files differ.
    changes: dict = {}

    def __init__(self, raw: dict, where: str = "preprocessor_config.json"):
        # What a picture is resized to, in pixels: (height, width) or (shortest edge,).
        # And what the centre crop leaves of it, which comes out: (height, width).
        self.resized, self.size = read_sizes(raw, where)
        self.resample = read_field(raw, "resample", Image.Resampling, where, default=3)
        # (3, 256) fp32: the pixel value of each channel's 256 levels
        self.table = read_pixel_table(raw, where)
        refuse_unless(raw, "do_resize", True, where)
        refuse_unless(raw, "do_normalize", True, where)
        refuse_unless(raw, "do_pad", False, where)

    def limit(self, max_pixels: int) -> None:
        """Make no picture of more pixels. Raises InputError: here all are of one size."""
        raise InputError(f"max_pixels: this model's images are all {self.size} pixels")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageProcessor":
        """From preprocessor_config.json, or from the newer processor_config.json that nests it."""
        path = Path(folder) / "preprocessor_config.json"
        if path.exists():
            return cls(read_json(path), str(path))
        path = Path(folder) / "processor_config.json"
        raw = read_json(path).get("image_processor")
        if not isinstance(raw, dict):
            beside = "there is no preprocessor_config.json beside it"
            raise InputError(f"{path}: has no image_processor, and {beside}")
        return cls(raw, f"{path}: image_processor")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, height, width) fp32."""
        if len(self.resized) == 1:
            # The longer edge follows in proportion; transformers cuts the fraction off.
            shortest = min(image.size)
            width = int(self.resized[0] * image.width / shortest)
            height = int(self.resized[0] * image.height / shortest)
        else:
            height, width = self.resized
        resized = image.resize((width, height), self.resample)
        pixels = np.asarray(resized)  # (height, width, 3) uint8
        # The centre crop: both are 0 where nothing is cropped.
        top = (height - self.size[0]) // 2
        left = (width - self.size[1]) // 2
        pixels = pixels[top : top + self.size[0], left : left + self.size[1]]
        return self.normalised(pixels)

    def normalised(self, pixels: np.ndarray) -> torch.Tensor:
        """(height, width, 3) uint8 -> (3, height, width) fp32."""
        channels = [self.table[channel][pixels[..., channel]] for channel in range(3)]
        return torch.from_numpy(np.stack(channels))


def stack_images(images: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """Prepared pictures (3, height, width) -> (images, 3, height, width).

    Where a model's pictures differ in size they stay a list: a model that makes such takes both."""
    if len({image.shape for image in images}) > 1:
        return images
    return torch.stack(images)


def move_images(
    images: torch.Tensor | list[torch.Tensor],
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """What `stack_images` gave, on a device and in a dtype."""
    if torch.is_tensor(images):
        return images.to(device, dtype)
    return [image.to(device, dtype) for image in images]


# ---- Training data


class CaptionDataset(Dataset):
    """A JSONL file of captioned images (see the top of this file). Lines are read when needed.

    Items are asked for as (record, draw): `draw` picks one among a record's captions, so that the
    same pair always gives the same Sample.

    Args:
        image_root: where image paths begin; the file's own folder if it is None.
        contrast: the captions that feed the contrastive loss; "long" shows why it must be "short".
    Raises:
        InputError: when a file has no usable record, or more than 1 % of its lines are faulty."""

    def __init__(
        self,
        path: str | Path,
        layout: Layout,
        processor: ImageProcessor | None,
        image_root: str | Path | None = None,
        contrast: str = "short",
    ):
        self.path = Path(path)
        self.layout = layout
        self.processor = processor
        self.root = Path(image_root) if image_root else self.path.parent
        self.contrast = contrast
        # For each record the number of its unit: records of one unit stay neighbours.
        self.units: list[int] = []
        self.faults = Counter()  # how many lines were left out, by the reason
        self.digest = ""  # of the whole file
        self.offsets = self.index_lines()  # (records,) int64: the byte where each line begins

    def index_lines(self) -> np.ndarray:
        """Read the file once: fills units, faults and digest, returns where usable lines begin."""
        offsets = []
        digest = hashlib.sha256()
        unit_of_group = {}
        first_fault = ""
        end = 0
        for number, line in enumerate(self.lines(), start=1):
            begin = end
            end += len(line)
            digest.update(line)
            if not line.strip():
                continue
            try:
                record = parse_record(line)
            except InputError as error:
                self.faults[str(error)] += 1
                first_fault = first_fault or f"line {number}: {error}"
                continue
            group = record.get("group")
            unit = number if group is None else unit_of_group.setdefault(group, number)
            self.units.append(unit)
            offsets.append(begin)
        self.refuse_faulty_file(len(offsets), first_fault)
        self.digest = digest.hexdigest()
        return np.array(offsets, np.int64)

    def fingerprint(self) -> dict[str, str]:
        """Digests that tell on --resume whether lines, or the sizes of pictures, have changed.

        Of at most 256 pictures, from the first to the last, the sizes in bytes are taken."""
        digest = hashlib.sha256(f"{len(self)} pictures".encode())
        step = max(1, len(self) // 256)
        for index in range(0, len(self), step):
            try:
                size = inside(self.root, self.record(index)["image"]).stat().st_size
            except (InputError, OSError):
                size = -1
            digest.update(f" {size}".encode())
        return {"lines": self.digest, "pictures": digest.hexdigest()}

    def refuse_faulty_file(self, usable: int, first_fault: str) -> None:
        """A few faulty lines are left out and told. Many mean that it is the wrong file."""
        faulty = self.faults.total()
        if not faulty and not usable:
            raise InputError(f"{self.path}: is empty")
        if not usable or faulty > 0.01 * (faulty + usable):
            commonest = self.faults.most_common(5)
            counts = "; ".join(f"{count} x {reason}" for reason, count in commonest)
            share = f"{faulty} of {faulty + usable} lines cannot be used"
            advice = what_it_may_be(self.path)
            if "download" not in advice or "incomplete" in advice:
                advice = "python -m examples.convert makes such lines of other people's files"
            raise InputError(f"{self.path}: {share}, {first_fault} ({counts}); {advice}")

    def lines(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                name = f"reading {self.path.name}"
                yield from tqdm(file, desc=name, unit=" lines", delay=2, leave=False)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None

    def __len__(self) -> int:
        return len(self.offsets)

    def record(self, index: int) -> dict:
        """{"image", "short", "long", "captions", ...} as it stands in the file."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return parse_record(file.readline())

    def captions(self, record: dict) -> tuple[list[str], list[list[int]]]:
        """A record's captions by their length: short ones as text, long ones as ids.

        The long ones have LONG to LONGEST ids."""
        short = []
        long = []
        for text in captions_of(record):
            ids = self.layout.tokenizer.encode_sentences(self.layout.answer(text), LONGEST)
            if len(ids) >= LONG:
                long.append(ids)
            elif ids:
                short.append(text)
        if self.contrast == "long":
            short = [self.layout.tokenizer.decode(ids) for ids in long]
        return short, long

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, draw = key
        try:
            return self.read_sample(self.record(index), draw)
        except InputError as error:
            return Sample(None, None, None, error=f"{self.path.name}, record {index}: {error}")

    def read_sample(self, record: dict, draw: int) -> Sample:
        short, long = self.captions(record)
        # Some captions have no tokens: control characters, which a normalizer drops.
        if not short and not long:
            raise InputError("no caption is left")
        path = inside(self.root, record["image"])
        image = open_image(path, record.get("part"))
        return Sample(
            pixel_values=self.processor(image),
            short=short[draw % len(short)] if short else None,
            long=long[draw % len(long)] if long else None,
        )


def parse_record(line: bytes) -> dict:
    """One line of the training data, checked, with all three lists of captions present.

    Raises:
        InputError: with what is wrong; who knows the file and the line adds them."""
    try:
        record = json.loads(line)
    # RecursionError: a line of a million opening brackets.
    except (ValueError, RecursionError):
        raise InputError("not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise InputError('no "image" with the path of a picture')
    for key in CAPTION_KEYS:
        captions = record.setdefault(key, [])
        if not isinstance(captions, list):
            raise InputError(f'"{key}" is not a list of captions')
        if not all(isinstance(text, str) for text in captions):
            raise InputError(f'"{key}" is not a list of captions')
    if not any(text.strip() for text in captions_of(record)):
        raise InputError("no caption")
    if any(is_no_caption(text) for text in captions_of(record)):
        raise InputError('a caption is a placeholder, such as "nan", or a list as text')
    if "part" in record and not is_part(record["part"]):
        raise InputError('"part" is not [offset, bytes]')
    if not isinstance(record.get("group"), str | int | None):
        raise InputError('"group" is neither a string nor a number')
    return record


def is_no_caption(text: str) -> bool:
    """Is a text that is not blank what a program wrote in place of captions?"""
    is_placeholder = fault_of_caption(text) == PLACEHOLDER
    return is_placeholder or LIST_AS_TEXT.fullmatch(text) is not None


def captions_of(record: dict) -> list[str]:
    """All captions of a record, whatever their key."""
    return record["short"] + record["long"] + record["captions"]


def is_part(value) -> bool:
    """Is this [offset, bytes]? The limit is far above any file, and fits what `seek` takes."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(number) is int and 0 <= number < 2**48 for number in value)


def check_batch_size(records: int, batch_size: int) -> None:
    """Raise InputError where there are fewer records than a batch needs."""
    if records < batch_size:
        found = f"{records} usable records do not fill a batch of {batch_size}"
        raise InputError(f"{found}; lower the batch size")


class ResumableSampler(Sampler):
    """Batches of (record, draw) for `CaptionDataset`.

    They are a function of the seed and the step alone, so training can go on from any step. Every
    epoch is a new permutation; the records of one unit stay neighbours (a batch's border may part
    them). An epoch's last records that do not fill a batch wait for the next permutation.

    Args:
        units: for each record the number of its unit, as `CaptionDataset.units`.
        batch_size: records of a batch, of all processes together.
        steps, first_step: where training ends, and where it goes on.
        places: which of a batch's places are yielded; range(rank, batch_size, processes) is the
            share of one of several processes, None is all of them.
    Raises:
        InputError: when the records do not fill one batch."""

    def __init__(
        self,
        units: list[int],
        batch_size: int,
        steps: int,
        seed: int = 0,
        first_step: int = 0,
        places: range | None = None,
    ):
        check_batch_size(len(units), batch_size)
        self.units = np.asarray(units)
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.first_step = first_step
        self.places = range(batch_size) if places is None else places

    def __len__(self) -> int:
        return self.steps - self.first_step

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The records of an epoch in their order, and a draw for each of them."""
        generator = np.random.default_rng([self.seed, number])
        place_of_unit = generator.permutation(self.units.max() + 1)
        place = place_of_unit[self.units]  # (records,)
        # Stable: the records of a unit, whose places are equal, stay in the file's order.
        order = np.argsort(place, kind="stable")
        draws = generator.integers(2**31, size=len(place))
        return order, draws

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches_of_epoch = len(self.units) // self.batch_size
        current = None
        for step in range(self.first_step, self.steps):
            number, batch = divmod(step, batches_of_epoch)
            if number != current:
                order, draws = self.epoch(number)
                current = number
            mine = batch * self.batch_size + np.array(self.places, np.int64)
            yield list(zip(order[mine].tolist(), draws[mine].tolist()))


# ---- Batches


@dataclass
class Sequence:
    """One sample on one side, before it is padded."""

    ids: list[int]
    pair: int
    summary: int  # the position whose hidden state is the embedding
    pixel_values: torch.Tensor | None = None  # (3, height, width) fp32; images only


def collate(
    samples: list[Sample],
    layout: Layout,
    micro_batch: int,
    caption_share: float = 1.0,
    multiple: int = 1,
    places: range | None = None,
) -> Batch:
    """Lay samples out as sequences, sort these by length, and pad them on the right.

    Args:
        micro_batch: sequences of a chunk, at most.
        caption_share: long captions are trained on in this first share of the batch's places. An
            image that has only a long caption always trains it.
        multiple: chunks are padded to a multiple of so many tokens; GPUs like round lengths.
        places: the samples' places in the global batch, range(rank, batch_size, processes)."""
    if places is None:
        places = range(len(samples))
    captions = choose_captions(samples, places, caption_share)
    images, texts = lay_out(samples, captions, layout)
    return Batch(
        images=make_chunks(images, micro_batch, multiple),
        texts=make_chunks(texts, micro_batch, multiple),
        num_pairs=len(texts),
        # One more each: the token that ends a caption is learned too.
        num_tokens=sum(len(caption) + 1 for caption in captions if caption),
        skipped=[sample.error for sample in samples if sample.error is not None],
    )


def choose_captions(
    samples: list[Sample], places: range, caption_share: float
) -> list[list[int] | None]:
    """For each sample the long caption that it trains in this batch, or None."""
    batch_size = places.stop  # of all processes, so all draw the same line
    supervised = math.ceil(caption_share * batch_size)
    captions = []
    for place, sample in zip(places, samples):
        # Without its long caption an image that has no short one would train nothing.
        if place < supervised or sample.short is None:
            captions.append(sample.long)
        else:
            captions.append(None)
    return captions


def lay_out(
    samples: list[Sample], captions: list[list[int] | None], layout: Layout
) -> tuple[list[Sequence], list[Sequence]]:
    """The sequences of the image side and those of the text side, partners numbered alike."""
    images = []
    texts = []
    for sample, caption in zip(samples, captions):
        pair = NO_PAIR
        if sample.short is not None:
            pair = len(texts)
            ids = layout.text_side(sample.short)
            texts.append(Sequence(ids, pair, summary=len(ids) - 1))
        # Neither a partner nor a caption: the sample could not be read.
        if pair != NO_PAIR or caption:
            image = sample.pixel_values
            prompt = layout.image_side(image=image)  # the summary is its last token
            ids = layout.image_side(caption, image)
            images.append(Sequence(ids, pair, len(prompt) - 1, image))
    return images, texts


def make_chunks(sequences: list[Sequence], micro_batch: int, multiple: int) -> list[Chunk]:
    """Sequences of similar length together, since padding is computed for nothing."""
    by_length = sorted(sequences, key=lambda sequence: len(sequence.ids))
    chunks = []
    for first in range(0, len(by_length), micro_batch):
        chunks.append(make_chunk(by_length[first : first + micro_batch], multiple))
    return chunks


def make_chunk(sequences: list[Sequence], multiple: int) -> Chunk:
    longest = max(len(sequence.ids) for sequence in sequences)
    width = math.ceil(longest / multiple) * multiple
    # Any id may pad: attention is causal, so no real token sees what comes after it.
    padded = [sequence.ids + [0] * (width - len(sequence.ids)) for sequence in sequences]
    input_ids = torch.tensor(padded)  # (b, T)
    lengths = torch.tensor([len(sequence.ids) for sequence in sequences])  # (b,)
    pair = torch.tensor([sequence.pair for sequence in sequences])  # (b,)
    summary = torch.tensor([sequence.summary for sequence in sequences])  # (b,)
    if sequences[0].pixel_values is None:  # the text side
        return Chunk(input_ids, summary, pair)
    return Chunk(
        input_ids,
        summary,
        pair,
        labels=next_tokens(input_ids, lengths, summary),
        pixel_values=stack_images([sequence.pixel_values for sequence in sequences]),
    )


def empty_text_chunk() -> Chunk:
    """One token, in no pair: it teaches nothing. For processes that must do as many as others."""
    return Chunk(torch.zeros(1, 1, dtype=torch.long), torch.tensor([0]), torch.tensor([NO_PAIR]))


def empty_image_chunk(config) -> Chunk:
    """One image, in no pair and without a caption: it teaches nothing. config: the model's."""
    side = config.vision.image_size
    tokens = config.num_image_tokens
    if callable(tokens):  # a backbone whose images differ in size
        tokens = tokens(side, side)
    input_ids = torch.full((1, tokens), config.image_token_id)
    labels = torch.full((1, tokens), IGNORE)
    pixel_values = torch.zeros(1, 3, side, side)
    summary = torch.tensor([tokens - 1])
    return Chunk(input_ids, summary, torch.tensor([NO_PAIR]), labels, pixel_values)


def next_tokens(
    input_ids: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """Labels: what each position predicts, (b, T), from position `first` to the last token but one.

    `first` (b,) is the summary position: it predicts the first token of the caption. Behind it each
    token predicts the next one; the last token, </s>, predicts nothing, nor does padding. So a
    sequence without a caption, which ends at the summary, has no labels at all."""
    position = torch.arange(input_ids.shape[1])  # (T,)
    predicts = (position >= first[:, None]) & (position < lengths[:, None] - 1)  # (b, T)
    return input_ids.roll(-1, dims=1).masked_fill(~predicts, IGNORE)
