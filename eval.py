"""Use and test a model: captions, conversations, embeddings, the paper's tables.

    python eval.py caption photo.jpg                          what the picture shows, in the model's words
    python eval.py caption *.jpg --question "What colour is the car?" --model llava-1.5-7b-hf
    python eval.py chat photo.jpg                             a conversation about one picture
    python eval.py retrieval dataset_flickr30k.json --images flickr30k-images
    python eval.py sugarcrepe sugar-crepe/data --images val2017
    python eval.py sugarcrepe++ scpp/data --images val2017
    python eval.py winoground examples.jsonl --images winoground/images
    python eval.py captioning captions.jsonl

`--model` is a Hugging Face LLaVA folder, or a run of train.py with its adapters (`--no-adapters` for its base model).
In Python:

    run = load_run("runs/toy")
    images = encode_image(run, [open_image("photo.jpg")])     # (1, D), unit length
    texts = encode_text(run, ["a red car", "a blue car"])     # (2, D)
    print(images @ texts.T)                                   # cosine similarities
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from data import (
    IGNORE,
    CaptionDataset,
    DataError,
    ImageProcessor,
    Layout,
    TextTokenizer,
    collate,
    open_image,
    read_json,
    read_karpathy,
    read_sugarcrepe,
    read_winoground,
)
from lora import AdapterError, SoftPrompt, adapters, adapters_disabled, load_adapter, quantize
from model import CheckpointError, Llava, LlavaConfig, canonical_name, is_unused, open_weights, weight_files

ROOT = Path(__file__).parent
TOY_MODEL = ROOT / "toy" / "tiny-llava"
DESCRIBE = "Describe the image in detail."
USER_ERRORS = (CheckpointError, DataError, AdapterError, OSError)  # shown as one line, without a traceback


@dataclass
class Run:
    """A model with what it takes to use it on pictures and text."""

    model: Llava
    layout: Layout
    processor: ImageProcessor
    base: str = ""  # the base model's fingerprint

    @property
    def notes(self) -> dict[str, str]:
        """What adapters belong to, kept in their files."""
        return self.layout.notes | {"base": self.base}

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.layout.tokenizer

    @property
    def is_adapted(self) -> bool:
        return any(module.enabled for module in adapters(self.model).values())

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        """RGB images -> (B, 3, height, width) on the model's device."""
        return torch.stack([self.processor(image) for image in images]).to(self.model.device, self.model.dtype)


def pick_device(name: str | None = None) -> tuple[torch.device, torch.dtype]:
    """The best device here, or the one asked for, with the fastest dtype that it computes well in: on CUDA bf16 where
    the GPU has it, else fp16; on MPS and CPU fp32."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    if device.type != "cuda":
        return device, torch.float32
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_run(folder: str | Path, device: str | None = None, dtype: torch.dtype | None = None) -> Run:
    """Read a Hugging Face LLaVA folder, or a run folder of train.py: its base model, in int8 if it was trained so, with
    its newest adapters. Raises CheckpointError, DataError or AdapterError."""
    folder = Path(folder)
    if not (folder / "checkpoints").is_dir():
        return load_base(folder, device, dtype=dtype)
    settings = read_json(folder / "config.json")
    base, *prompts = (settings.get(key) for key in ("model", "image_prompt", "text_prompt"))
    newest = (folder / "checkpoints" / "latest").read_bytes().decode("ascii", "replace").strip()
    if not all(isinstance(text, str) for text in (base, *prompts)) or not re.fullmatch(r"step-\d+", newest):
        raise DataError(f"{folder}: not a complete run of train.py (config.json, checkpoints/latest)")
    run = load_base(base, device, *prompts, int8=settings.get("int8") is True, dtype=dtype)
    load_adapter(run.model, folder / "checkpoints" / newest, run.layout.image_prompt, run.layout.text_prompt, run.notes)
    if isinstance(run.model.language_model.embed_tokens, SoftPrompt):
        run.layout = run.layout.with_soft_prompts(run.model.config.text.vocab_size)
    return run


def load_base(
    folder: str | Path, device: str | None, *prompts: str, int8: bool = False, dtype: torch.dtype | None = None
) -> Run:
    folder, config, layout, processor = inspect_base(folder, *prompts)
    where, best = pick_device(device)
    model = Llava.from_pretrained(folder, dtype or best, "cpu" if int8 else where)
    model.config.eos_token_ids = config.eos_token_ids
    if int8:  # before it moves: the GPU need not hold the whole weights
        quantize(model)
    return Run(model.to(where), layout, processor, fingerprint(folder, config))


def fingerprint(folder: Path, config: LlavaConfig) -> str:
    """SHA-256 of a checkpoint's tensors in use: names, shapes, and the first row of each in bf16. One model has one
    fingerprint, in whatever layout, shards and precision its files are."""
    parts = {}
    for path in weight_files(folder):
        with open_weights(path) as file:
            for stored in file.keys():  # noqa: SIM118, the handle is not a dict
                name, tensor = canonical_name(stored), file.get_slice(stored)
                if not is_unused(name, config) and name != "lm_head.weight":  # which may be left out where it is tied
                    row = tensor[:1].bfloat16().flatten().view(torch.uint8).numpy().tobytes()
                    parts[name] = f"{name} {tensor.get_shape()}".encode() + row
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


def inspect_base(folder: str | Path, *prompts: str) -> tuple[Path, LlavaConfig, Layout, ImageProcessor]:
    """A LLaVA folder without its weights, checked: where it is, and what its small files say. `prompts` are the image
    prompt and the text prompt, where they are not the paper's."""
    given, folder = folder, Path(folder) if Path(folder).is_dir() else ROOT / folder  # toy/tiny-llava from anywhere
    if not folder.is_dir():
        raise CheckpointError(f"{given}: no such folder; give a Hugging Face LLaVA folder or a run of train.py")
    config = LlavaConfig.from_pretrained(folder)
    layout = Layout(TextTokenizer(folder), config.num_image_tokens, *prompts)
    if layout.image_id != config.image_token_id:
        found = f"<image> is {layout.image_id} in tokenizer.json, {config.image_token_id} in config.json"
        raise DataError(f"{folder}: {found}: the files belong to different models")
    processor, side = ImageProcessor.from_pretrained(folder), config.vision.image_size
    if processor.size != (side, side):
        found = f"preprocessor_config.json makes images of {processor.size}, config.json wants {side} x {side}"
        raise DataError(f"{folder}: {found}")
    config.eos_token_ids = tuple({*config.eos_token_ids, layout.stop_id})
    return folder, config, layout, processor


# ---- Embeddings: the last hidden state at the summary position, at unit length. Axes: B batch, T tokens, D hidden.


def encode_image(run: Run, images: list[Image.Image], batch_size: int = 64) -> torch.Tensor:
    """RGB images -> (B, D) fp32 on the CPU, unit length."""
    return encode(run, [run.layout.image_side()] * len(images), images, batch_size)


def encode_text(run: Run, texts: list[str], batch_size: int = 256) -> torch.Tensor:
    """Texts -> (B, D) fp32 on the CPU, unit length."""
    return encode(run, [run.layout.text_side(text) for text in texts], None, batch_size)


@torch.no_grad()
def encode(run: Run, rows: list[list[int]], images: list[Image.Image] | None, batch_size: int) -> torch.Tensor:
    """Token ids that end at the summary position, and an image for each row or for none -> (B, D)."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding
    embeddings = torch.empty(len(rows), run.model.config.text.hidden_size)
    device = run.model.device
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        padded = [torch.tensor(rows[index], device=device) for index in chosen]
        last = torch.tensor([len(row) - 1 for row in padded], device=device)
        pixel_values = run.pixel_values([images[index] for index in chosen]) if images else None
        hidden = run.model(torch.nn.utils.rnn.pad_sequence(padded, batch_first=True), pixel_values)  # (b, T, D)
        summary = hidden[torch.arange(len(chosen), device=device), last]
        embeddings[chosen] = F.normalize(summary.float(), dim=-1).cpu()
    return embeddings


class Embeddings:
    """Embeddings of files and captions, each distinct one computed once."""

    def __init__(self, run: Run):
        self.run = run
        self.known: dict[Path | str, torch.Tensor] = {}

    def images(self, paths: list[Path]) -> torch.Tensor:
        return self.look_up(paths, 64, "pictures", lambda part: encode_image(self.run, [open_image(p) for p in part]))

    def texts(self, captions: list[str]) -> torch.Tensor:
        return self.look_up(captions, 2048, "captions", lambda part: encode_text(self.run, part))

    def look_up(self, keys: list, size: int, name: str, encode: Callable[[list], torch.Tensor]) -> torch.Tensor:
        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        for start in tqdm(range(0, len(new), size), desc=f"embedding {len(new)} {name}", delay=2, leave=False):
            part = new[start : start + size]
            vectors = encode(part)
            if not vectors.isfinite().all():
                raise DataError(f"embeddings of {name} are not finite; the model has diverged, or overflows in fp16")
            self.known.update(zip(part, vectors))
        return torch.stack([self.known[key] for key in keys])


# ---- Metrics, all in percent. A tie never counts as a success: equal embeddings must not score by luck.


def recall_at_k(scores: torch.Tensor, image_of_text: torch.Tensor, ks=(1, 5, 10)) -> dict[str, float]:
    """Retrieval in both directions; ties are counted against the model.
    scores (texts, images), image_of_text (texts,): the image that each text describes -> "t2i_r1", ...: texts whose
    image is among the k best of all images, "i2t_r1", ...: images with a text among the k best of all texts."""
    own = scores.gather(1, image_of_text[:, None])  # (texts, 1)
    t2i_rank = (scores >= own).sum(dim=1) - 1
    is_own = image_of_text[:, None] == torch.arange(scores.shape[1])
    best_own = scores.masked_fill(~is_own, -torch.inf).amax(dim=0)  # (images,)
    i2t_rank = ((scores >= best_own) & ~is_own).sum(dim=0)
    ranks = {"t2i": t2i_rank, "i2t": i2t_rank}
    return {f"{way}_r{k}": percent(rank < k) for way, rank in ranks.items() for k in ks}


def percent(correct: torch.Tensor) -> float:
    """The share of True in a boolean tensor."""
    return 100 * correct.double().mean().item()


def retrieval(embeddings: Embeddings, items: list[tuple[Path, list[str]]]) -> dict[str, float]:
    """Flickr30k, COCO: `items` are (image, its captions); all images and all captions compete."""
    images = embeddings.images([path for path, _ in items])
    texts = embeddings.texts([text for _, captions in items for text in captions])
    image_of_text = torch.tensor([index for index, (_, captions) in enumerate(items) for _ in captions])
    return recall_at_k(texts @ images.T, image_of_text)


def sugarcrepe(embeddings: Embeddings, items: list[dict]) -> float:
    """One file of SugarCrepe (arXiv 2306.14610): the caption must beat its negative, strictly."""
    images = embeddings.images([item["image"] for item in items])
    right, wrong = ((images * embeddings.texts([item[key] for item in items])).sum(-1) for key in PAIR)
    return percent(right > wrong)


def sugarcrepe_pp(embeddings: Embeddings, items: list[dict]) -> dict[str, float]:
    """One file of SugarCrepe++ (arXiv 2406.11171). itt: for the image, both captions must beat the negative. tot: by
    text alone, the two captions must be nearer to each other than either is to the negative."""
    image = embeddings.images([item["image"] for item in items])
    first, second, negative = (embeddings.texts([item[key] for item in items]) for key in TRIPLE)
    wrong, pair = (image * negative).sum(-1), (first * second).sum(-1)
    itt = ((image * first).sum(-1) > wrong) & ((image * second).sum(-1) > wrong)
    tot = (pair > (first * negative).sum(-1)) & (pair > (second * negative).sum(-1))
    return {"itt": percent(itt), "tot": percent(tot)}


def winoground(embeddings: Embeddings, items: list[dict]) -> dict[str, float]:
    """Winoground (arXiv 2204.03162): two images, two captions of the same words; chance is 25, 25 and 16.7."""
    images = [embeddings.images([item[f"image_{i}"] for item in items]) for i in range(2)]
    captions = [embeddings.texts([item[f"caption_{i}"] for item in items]) for i in range(2)]
    s = [[(caption * image).sum(-1) for image in images] for caption in captions]  # s[caption][image]
    text = (s[0][0] > s[1][0]) & (s[1][1] > s[0][1])
    image = (s[0][0] > s[0][1]) & (s[1][1] > s[1][0])
    return {"text": percent(text), "image": percent(image), "group": percent(text & image)}


# ---- Captions


def caption(
    run: Run, images: list[Image.Image], question: str | None = None, max_new_tokens: int = 256, temperature: float = 0
) -> list[str]:
    """Describe each image, or answer one question about each; greedily unless a temperature is given. Without a
    question, an adapted model is asked through the image prompt that it was trained to caption with."""
    layout = run.layout
    prompt = layout.image_side() if question is None and run.is_adapted else layout.question(question or DESCRIBE)
    room = room_for_answer(run, prompt, max_new_tokens)
    answers = run.model.generate([prompt] * len(images), run.pixel_values(images), room, temperature)
    return [run.tokenizer.decode(answer) for answer in answers]


def room_for_answer(run: Run, prompt: list[int], wanted: int) -> int:
    """As many new tokens as are wanted and as the model has positions for. Raises DataError where there are none."""
    room = run.model.config.text.max_position_embeddings - len(prompt)
    if room < 1:
        raise DataError(f"{len(prompt)} tokens fill the model's positions; ask less, or start a new conversation")
    return min(wanted, room)


@torch.no_grad()
def captioning(
    run: Run, path: Path, images: Path, question: str | None = None, limit: int = 256, score: Callable | None = None
) -> dict[str, float]:
    """Of the first `limit` records, the share of the long captions' tokens that are the likeliest, given the image and
    all tokens before. `score(generated, references)` may add measures of greedy captions."""
    layout = run.layout if question is None and run.is_adapted else run.layout.with_image_prompt(question or DESCRIBE)
    dataset = CaptionDataset(path, layout, run.processor, images)
    samples = [dataset[index, 0] for index in range(min(limit, len(dataset)))]
    batch = collate(samples, layout, micro_batch=32)
    if batch.skipped or not batch.num_tokens:
        raise DataError(f"{path}: {(batch.skipped or ['no long captions'])[0]}")
    right = 0
    for chunk in batch.images:
        chunk = chunk.to(run.model.device)
        hidden = run.model(chunk.input_ids, chunk.pixel_values)
        known = chunk.labels != IGNORE
        right += (run.model.logits(hidden[known]).argmax(-1) == chunk.labels[known]).sum().item()
    result = {"token_accuracy": 100 * right / batch.num_tokens}
    if score:
        pixels = torch.stack([sample.pixel_values for sample in samples]).to(run.model.device, run.model.dtype)
        answers = run.model.generate([layout.image_side()] * len(samples), pixels, max_new_tokens=128)
        references = [run.tokenizer.decode(sample.long) for sample in samples]
        result |= score([run.tokenizer.decode(answer) for answer in answers], references)
    return result


class Conversation:
    """Questions and answers about one image. What was said stays in the key-value cache and is not computed again."""

    def __init__(self, run: Run, image: Image.Image, max_new_tokens: int = 256):
        self.run, self.image, self.max_new_tokens = run, image, max_new_tokens
        self.ids: list[int] = []
        self.cache = run.model.new_cache(1)

    def ask(self, question: str) -> str:
        layout, first = self.run.layout, not self.ids
        ids = self.ids + (layout.question(question) if first else layout.next_question(question))
        pixels = self.run.pixel_values([self.image]) if first else None
        room = room_for_answer(self.run, ids, self.max_new_tokens)
        answer = self.run.model.generate([ids], pixels, room, cache=self.cache)[0]
        self.ids = ids + answer
        return self.run.tokenizer.decode(answer)


# ---- A set of tests, and how its results are shown

TESTS = ("retrieval", "sugarcrepe", "sugarcrepe++", "winoground", "captioning")
SUGARCREPE = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
PAIR = ("caption", "negative_caption")  # SugarCrepe's fields
TRIPLE = ("caption", "caption2", "negative_caption")  # SugarCrepe++'s
PAPER_TABLE_4 = {  # LLaVA-1.5-7B, 1 M samples: T2I R@1, I2T R@1 (Flickr30k), SugarCrepe replace, swap, add
    "no training": (59.6, 65.6, 81.9, 59.8, 64.7),
    "soft prompts": (76.7, 91.7, 86.4, 66.9, 89.3),
    "LoRA": (79.1, 91.4, 87.0, 69.8, 88.8),
    "LoRA + soft prompts": (79.6, 92.9, 87.1, 72.0, 88.6),
    "LoRA + soft prompts + AR": (80.6, 91.8, 89.5, 75.5, 89.5),
}


def run_test(name: str, embeddings: Embeddings, file: Path, images: Path, split: str = "test") -> dict[str, float]:
    """One of TESTS but captioning, on the authors' files."""
    if name == "retrieval":
        return retrieval(embeddings, read_karpathy(file, images, split))
    if name == "winoground":
        return winoground(embeddings, read_winoground(file, images))
    kinds, captions = (SUGARCREPE, PAIR) if name == "sugarcrepe" else (SUGARCREPE[:5], TRIPLE)  # ++ has no add_* files
    files = {kind: read_sugarcrepe(file / f"{kind}.json", images, captions) for kind in kinds}
    if name == "sugarcrepe":
        return {kind: sugarcrepe(embeddings, items) for kind, items in files.items()}
    scores = {kind: sugarcrepe_pp(embeddings, items) for kind, items in files.items()}
    return {f"{kind}_{test}": value for kind, pair in scores.items() for test, value in pair.items()}


def evaluate(embeddings: Embeddings, tests: Path, score: Callable | None = None) -> dict[str, dict[str, float]]:
    """Every test that a tests.json names, on one model. For example:

    {"retrieval": {"file": "karpathy.json", "images": "images", "split": "test"},
     "sugarcrepe": {"file": "sugar-crepe/data", "images": "val2017"}, "sugarcrepe++": {...},
     "winoground": {"file": "examples.jsonl", "images": "images"}, "captioning": {"file": "captions.jsonl"}}

    Paths are relative to the file. `score` is `captioning`'s.
    """
    run, tables = embeddings.run, {}
    for name, settings in read_json(tests).items():
        if name not in TESTS or not isinstance(settings, dict) or not isinstance(settings.get("file"), str):
            raise DataError(f'{tests}: {name!r} must be one of {", ".join(TESTS)}, with a "file"')
        file, images = tests.parent / settings["file"], tests.parent / str(settings.get("images", "."))
        if name != "captioning":
            tables[name] = run_test(name, embeddings, file, images, settings.get("split", "test"))
            continue
        tables[name] = captioning(run, file, images, score=score)
        if run.is_adapted:  # and is the plain question still understood?
            plain = captioning(run, file, images, DESCRIBE, score=score)
            tables[name] |= {f"describe_{key}": value for key, value in plain.items()}
    return tables


def summary(tables: dict) -> dict[str, float]:
    """The columns of the printed table, as far as they were measured."""
    r, s, w, c = (tables.get(name, {}) for name in ("retrieval", "sugarcrepe", "winoground", "captioning"))
    columns = {f"{way.upper()}@{k}": r.get(f"{way}_r{k}") for way in ("t2i", "i2t") for k in (1, 10)}
    for group in ("replace", "swap", "add"):
        values = [value for name, value in s.items() if name.startswith(group)]
        columns[group] = sum(values) / len(values) if values else None
    columns |= {f"wino {key}": w.get(key) for key in ("text", "image", "group")}
    columns |= {"tokens": c.get("token_accuracy"), "attributes": c.get("attributes"), "objects": c.get("objects")}
    columns["described"] = c.get("describe_attributes", c.get("attributes"))  # by the plain question
    return {name: value for name, value in columns.items() if value is not None}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Rows of `summary` under each other."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, rows))
    print(" " * width, *(f"{name:>{max(6, len(name))}}" for name in columns))
    for label, row in rows.items():
        cells = (f"{row[name]:{'+' if label == 'difference' else ''}.1f}" if name in row else "-" for name in columns)
        print(f"{label:<{width}}", *(f"{cell:>{max(6, len(name))}}" for cell, name in zip(cells, columns)))


def paper_rows() -> dict[str, dict[str, float]]:
    columns = ("T2I@1", "I2T@1", "replace", "swap", "add")
    return {f"paper: {name}": dict(zip(columns, row)) for name, row in PAPER_TABLE_4.items()}


def gallery(path: Path, rows: list[tuple[str, list[tuple[Path, bool]]]], size: int = 96) -> None:
    """A PNG: each row a query and the pictures found for it, the right ones framed in green."""
    font, left, columns = ImageFont.load_default(13), 330, max(len(found) for _, found in rows)
    sheet = Image.new("RGB", (left + columns * (size + 12), len(rows) * (size + 12) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, found) in enumerate(rows):
        top, lines = row * (size + 12) + 6, [""]
        for word in query.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if draw.textlength(longer, font) < left - 20 else [*lines, word]
        draw.multiline_text((8, top + 4), "\n".join(lines), fill="black", font=font)
        for column, (image, right) in enumerate(found):
            x = left + column * (size + 12)
            draw.rectangle((x - 4, top - 4, x + size + 3, top + size + 3), fill="limegreen" if right else "white")
            sheet.paste(ImageOps.pad(open_image(image), (size, size), color="gray"), (x, top))
    sheet.save(path)


# ---- Commands


def caption_command(run: Run, args) -> None:
    batches = [args.images[i : i + args.batch] for i in range(0, len(args.images), args.batch)]
    for batch in tqdm(batches, desc="captions", disable=len(batches) < 2):
        images = [open_image(path) for path in batch]
        for path, answer in zip(batch, caption(run, images, args.question, args.max_new_tokens, args.temperature)):
            tqdm.write(f"{path}: {answer}")


def chat_command(run: Run, args) -> None:
    conversation = Conversation(run, open_image(args.image), args.max_new_tokens)
    print(f"Ask about {args.image}; an empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        print(conversation.ask(question))


def test_command(run: Run, args) -> None:
    file = Path(args.file)
    images = Path(args.images) if args.images else file if file.is_dir() else file.parent
    if args.command == "captioning":
        result = captioning(run, file, images, args.question, args.limit)
    else:
        result = run_test(args.command, Embeddings(run), file, images, getattr(args, "split", "test"))
    for name, value in result.items():
        print(f"{name:>20} {value:6.2f}")
    if columns := summary({args.command: result}):
        print_table({"this model": columns} | {k: v for k, v in paper_rows().items() if v.keys() & columns.keys()})
    if args.json:
        Path(args.json).write_text(json.dumps({args.command: result}, indent=2) + "\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable, help: str) -> Callable:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        command.add_argument("--model", default=TOY_MODEL, metavar="DIR", help="LLaVA folder or run (toy/tiny-llava)")
        command.add_argument("--no-adapters", action="store_true", help="use a run's base model, without its adapters")
        command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best one here)")
        return command.add_argument

    argument = add("caption", caption_command, "describe pictures, or answer one question about each")
    argument("images", nargs="+", metavar="IMAGE")
    argument("--question", help=f"what to ask (default: {DESCRIBE!r}, or the prompt that a run was trained with)")
    argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default), above samples")
    argument("--max_new_tokens", type=positive, default=256, metavar="N", help="longest answer (256)")
    argument("--batch", type=positive, default=8, metavar="N", help="pictures at a time (8)")
    argument = add("chat", chat_command, "talk about a picture")
    argument("image", metavar="IMAGE")
    argument("--max_new_tokens", type=positive, default=256, metavar="N", help="longest answer (256)")
    for name, file, help in (
        ("retrieval", "JSON", "Karpathy's Flickr30k or COCO: R@1, 5, 10 both ways; a tie counts against the model"),
        ("sugarcrepe", "FOLDER", "SugarCrepe's seven files: the caption must beat its negative, strictly"),
        ("sugarcrepe++", "FOLDER", "SugarCrepe++'s five files: ITT and TOT"),
        ("winoground", "JSONL", "Winoground's examples.jsonl: text, image and group score"),
        ("captioning", "JSONL", "our training format: share of the long captions' tokens predicted right"),
    ):
        argument = add(name, test_command, help)
        argument("file", metavar=file)
        argument("--images", metavar="DIR", help="where the pictures are (default: beside the file)")
        argument("--json", metavar="FILE", help="write the numbers here as well")
        if name == "retrieval":
            argument("--split", default="test", help="Karpathy's split (test)")
        if name == "captioning":
            argument("--question", help="what to ask, as for caption")
            argument("--limit", type=positive, default=256, metavar="N", help="records, from the first on (256)")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def temperature(text: str) -> float:
    """An argument that must be a finite number of at least 0."""
    if not 0 <= float(text) < float("inf"):  # where it is no number at all, argparse says so
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return float(text)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        run = load_run(args.model, args.device)
        with adapters_disabled(run.model) if args.no_adapters else nullcontext():
            args.function(run, args)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
