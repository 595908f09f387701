"""Use and test a model: captions, conversations, embeddings, search, the paper's tables.

    python eval.py caption photo.jpg                          what the picture shows, in the model's words
    python eval.py caption *.jpg --question "What colour is the car?" --model llava-1.5-7b-hf
    python eval.py chat photo.jpg                             a conversation about one picture
    python eval.py search --images photos "a red car"         ranks the pictures of a folder, draws the best
    python eval.py match photo.jpg "a red car" "a blue car"   which caption fits best
    python eval.py embed photos.npy photos                    embeddings of pictures or lines of text, in a file
    python eval.py retrieval dataset_flickr30k.json --images flickr30k-images
    python eval.py sugarcrepe sugar-crepe/data --images val2017               (sugarcrepe++ likewise)
    python eval.py winoground examples.jsonl --images winoground/images
    python eval.py imagenet val --classes names.txt
    python eval.py captioning captions.jsonl

`--model` is a Hugging Face LLaVA folder, or a run of train.py with its adapters. In Python:

    run = load_run("runs/toy")
    images = encode_image(run, [open_image("photo.jpg")])     # (1, D), unit length
    texts = encode_text(run, ["a red car", "a blue car"])     # (2, D)
    print(images @ texts.T)                                   # cosine similarities
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
from data import DataError, ImageProcessor, Layout, TextTokenizer, open_image, read_json
from lora import AdapterError, SoftPrompt, adapters, load_adapter, quantize
from model import CheckpointError, Llava, LlavaConfig

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
    base: str = ""  # the base model's hash

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
        """RGB images, or what the processor made of them -> (B, 3, height, width) on the model's device."""
        with ThreadPoolExecutor() as threads:
            ready = threads.map(lambda image: image if torch.is_tensor(image) else self.processor(image), images)
            return torch.stack(list(ready)).to(self.model.device, self.model.dtype)


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


def load_run(folder: str | Path, device: str | None = None, *prompts: str, dtype: torch.dtype | None = None) -> Run:
    """Read a Hugging Face LLaVA folder, to be used with the paper's prompts or others (the image's, the text's), or a
    run folder of train.py: its base model, in int8 if it was trained so, with its newest adapters, and the prompts that
    they were trained with. Raises CheckpointError, DataError or AdapterError."""
    folder = Path(folder)
    if not (folder / "checkpoints").is_dir():
        return load_base(folder, device, *prompts, dtype=dtype)
    if prompts:
        raise DataError(f"{folder}: a run keeps the prompts it was trained with; others are for LLaVA folders")
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


def load_base(folder: str | Path, device=None, *prompts: str, int8=False, dtype=None, mapped=False) -> Run:
    """`mapped` leaves the weights on the CPU, as their file is, of which pages are read when they are needed."""
    folder, config, layout, processor = inspect_base(folder, *prompts)
    where, best = pick_device(device)
    model = Llava.from_pretrained(folder, None if mapped else dtype or best, "cpu" if int8 or mapped else where)
    model.config.eos_token_ids, base = config.eos_token_ids, base_hash(Llava.from_pretrained(folder, None))
    if int8:  # before it moves: the GPU need not hold the whole weights
        quantize(model)
    return Run(model if mapped else model.to(where), layout, processor, base)


def base_hash(model: Llava) -> str:
    """SHA-256 of the names and shapes of a model's tensors, and of the first row of each in bf16: the same in whatever
    layout and shards its files are, in fp32 and in bf16. Of a model as its file is: fp16 would round it otherwise."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if name != "lm_head.weight":  # where it is tied, it has no name of its own
            row = tensor.detach()[:1].bfloat16().cpu().flatten().view(torch.uint8)
            digest.update(f"{name} {list(tensor.shape)}".encode() + row.numpy().tobytes())
    return digest.hexdigest()


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
    longest, known = max(map(len, rows), default=0), run.model.config.text.max_position_embeddings
    if longest > known:
        raise DataError(f"a text and its prompt are {longest} tokens, the model has {known} positions; shorten it")
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
    """Embeddings of pictures and captions, each distinct one computed once: distinct by the content of a file, or the
    words. In a `folder` they are kept, as they are computed, for the same model's next tables: what was interrupted
    goes on, what was computed takes seconds."""

    def __init__(self, run: Run, folder: str | Path | None = None):
        self.run, self.folder, self.index = run, None, Path(folder or ".") / "files.json"
        self.known: dict[bytes, torch.Tensor] = {}
        self.files: dict[str, list] = {}  # of each path its size, time and content's digest
        if folder is None:
            return
        self.folder = Path(folder) / fingerprint(run)
        self.files = read_json(self.index) if self.index.exists() else {}
        for path in self.folder.glob("*.safetensors"):
            try:
                part = load_file(path)
                self.known.update(zip(map(bytes, part["keys"].numpy()), part["vectors"]))
            except (SafetensorError, OSError, KeyError) as error:
                raise DataError(f"{path}: damaged ({error}); delete it, its embeddings are computed again") from None

    def images(self, paths: list[Path]) -> torch.Tensor:
        """Paths of pictures -> (pictures, D)."""
        before = dict(self.files)
        keys = [self.digest(path) for path in tqdm(paths, desc="looking at pictures", delay=2, leave=False)]
        if self.folder and self.files != before:
            data.write_whole(self.index, json.dumps(self.files))
        load = lambda path: self.run.processor(open_image(path))  # noqa: E731
        return self.look_up(keys, paths, 64, "pictures", load, encode_image)

    def texts(self, captions: list[str]) -> torch.Tensor:
        """Strings -> (captions, D)."""
        keys = [hashlib.sha256(b"text " + text.encode("utf-8", "replace")).digest() for text in captions]
        return self.look_up(keys, captions, 2048, "captions", str, encode_text)

    def digest(self, path: Path) -> bytes:
        """SHA-256 of a file, which is read again only when its size or time has changed."""
        name = os.path.abspath(path)  # a cache may be used from several folders
        try:
            stat = path.stat()
            if self.files.get(name, [])[:2] != [stat.st_size, stat.st_mtime_ns]:
                digest = hashlib.sha256()
                with open(path, "rb") as file:
                    while block := file.read(2**20):
                        digest.update(block)
                self.files[name] = [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]
        except OSError as error:
            raise DataError(f"{path}: no such image ({error.strerror})") from None
        return bytes.fromhex(self.files[name][2])

    def look_up(self, keys: list[bytes], items: list, size: int, name: str, load: Callable, encode: Callable):
        """A row for each item, whose key says what is the same; what is new is loaded and encoded, `size` at a time."""
        if not items:
            raise DataError(f"there are no {name} to embed")
        new = list({key: item for key, item in zip(keys, items) if key not in self.known}.items())

        def read_and_encode(some: list) -> torch.Tensor:
            with ThreadPoolExecutor() as threads:
                return encode(self.run, list(threads.map(load, some)))

        for start in tqdm(range(0, len(new), size), desc=f"embedding {len(new)} {name}", delay=2, leave=False):
            part = dict(new[start : start + size])
            vectors = self.share([*part.values()], read_and_encode)
            if not vectors.isfinite().all():
                raise DataError(f"embeddings of {name} are not finite; the model has diverged, or overflows in fp16")
            self.known.update(zip(part, vectors))
            if self.folder:
                digests = torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).view(len(part), -1)
                path = self.folder / f"{next(iter(part)).hex()}.safetensors"
                data.write_whole(path, partial(save_file, {"keys": digests, "vectors": vectors}))
        return torch.stack([self.known[key] for key in keys])

    def share(self, items: list, encode: Callable) -> torch.Tensor:
        """encode(items), of which each process does a part; all get all. Every part is of one length, the last ones
        begin again: sharded layers meet in each forward pass."""
        if not dist.is_initialized():
            return encode(items)
        rank, world = dist.get_rank(), dist.get_world_size()
        rounds = math.ceil(len(items) / world)
        mine = encode([items[i % len(items)] for i in range(rank, rounds * world, world)]).to(self.run.model.device)
        dist.all_gather(parts := [torch.empty_like(mine) for _ in range(world)], mine)
        return torch.stack(parts, dim=1).flatten(0, 1)[: len(items)].cpu()


def fingerprint(run: Run) -> str:
    """Names what an embedding depends on besides its input: the settings, the prompts, the tokenizer, the preparation
    of pixels, and every tensor, by its sums along each axis."""
    p, layout, lora = run.processor, run.layout, [getattr(each, "config", 0) for each in adapters(run.model).values()]
    digest = hashlib.sha256(repr([layout.image_side(), layout.text_side(""), run.is_adapted]).encode())
    digest.update(repr([p.size, p.resized, p.resample, p.table.tolist(), run.model.config, lora]).encode())
    digest.update(run.tokenizer.tokenizer.to_str().encode())
    for name, tensor in run.model.state_dict().items():
        bits = tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for sums in [bits.sum(axis, dtype=torch.int64) for axis in range(bits.ndim)] if bits.ndim > 1 else [bits]:
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- Metrics, all in percent. A tie never counts as a success: equal embeddings must not score by luck.
def recall_at_k(scores: torch.Tensor, image_of_text: torch.Tensor, ks=(1, 5, 10)) -> dict[str, float]:
    """Retrieval in both directions; ties are counted against the model.
    scores (texts, images), image_of_text (texts,): the image that each text describes -> "t2i_r1", ...: texts whose
    image is among the k best of all images, "i2t_r1", ...: images with a text among the k best of all texts."""
    own = scores.gather(1, image_of_text[:, None])  # (texts, 1)
    t2i_rank = (scores >= own).sum(dim=1) - 1
    best = scores.new_full((scores.shape[1],), -torch.inf).scatter_reduce(0, image_of_text, own[:, 0], "amax")
    as_good = torch.zeros_like(best).index_add(0, image_of_text, (own[:, 0] == best[image_of_text]).to(best.dtype))
    i2t_rank = ((scores >= best).sum(dim=0) - as_good)[best > -torch.inf]  # of images that have a text
    ranks = {"t2i": t2i_rank, "i2t": i2t_rank}
    return {f"{way}_r{k}": percent(rank < k) for way, rank in ranks.items() for k in ks}


def percent(correct: torch.Tensor) -> float:  # of True in a boolean tensor
    return 100 * correct.double().mean().item()


def retrieval(embeddings: Embeddings, items: list[tuple[Path, list[str]]]) -> dict[str, float]:
    """Flickr30k, COCO, nocaps: `items` are (image, its captions); all images and all captions compete."""
    images = embeddings.images([path for path, _ in items])
    texts = embeddings.texts([text for _, captions in items for text in captions])
    image_of_text = torch.tensor([index for index, (_, captions) in enumerate(items) for _ in captions])
    return recall_at_k(texts @ images.T, image_of_text)


def sugarcrepe(embeddings: Embeddings, files: dict[str, list[dict]]) -> dict[str, float]:
    """SugarCrepe (arXiv 2306.14610), the items of each file: the caption must beat its negative, strictly."""
    result = {}
    for kind, items in files.items():
        images = embeddings.images([item["image"] for item in items])
        right, wrong = ((images * embeddings.texts([item[key] for item in items])).sum(-1) for key in PAIR)
        result[kind] = percent(right > wrong)
    return result


def sugarcrepe_pp(embeddings: Embeddings, files: dict[str, list[dict]]) -> dict[str, float]:
    """SugarCrepe++ (arXiv 2406.11171). itt: for the image, both captions must beat the negative. tot: by text alone,
    the two captions must be nearer to each other than either is to the negative."""
    result = {}
    for kind, items in files.items():
        image = embeddings.images([item["image"] for item in items])
        first, second, negative = (embeddings.texts([item[key] for item in items]) for key in TRIPLE)
        wrong, pair = (image * negative).sum(-1), (first * second).sum(-1)
        itt = ((image * first).sum(-1) > wrong) & ((image * second).sum(-1) > wrong)
        tot = (pair > (first * negative).sum(-1)) & (pair > (second * negative).sum(-1))
        result |= {f"{kind}_itt": percent(itt), f"{kind}_tot": percent(tot)}
    return result


def winoground(embeddings: Embeddings, items: list[dict]) -> dict[str, float]:
    """Winoground (arXiv 2204.03162): two images, two captions of the same words; chance is 25, 25 and 16.7."""
    images = [embeddings.images([item[f"image_{i}"] for item in items]) for i in range(2)]
    captions = [embeddings.texts([item[f"caption_{i}"] for item in items]) for i in range(2)]
    s = [[(caption * image).sum(-1) for image in images] for caption in captions]  # s[caption][image]
    text = (s[0][0] > s[1][0]) & (s[1][1] > s[0][1])
    image = (s[0][0] > s[0][1]) & (s[1][1] > s[1][0])
    return {"text": percent(text), "image": percent(image), "group": percent(text & image)}


def imagenet(embeddings: Embeddings, items: tuple, templates: list[str] | None = None) -> dict[str, float]:
    """Zero-shot classification, as CLIP (arXiv 2103.00020) is tested: a class is the mean of its name's embeddings in
    all templates (CLIP's 80, if none are given). `items` are a list of (image, class) and the classes' names; classes
    of one name (ImageNet has some) count as one."""
    (pictures, names), classes = items, []
    templates = templates or (ROOT / "docs" / "imagenet_templates.txt").read_text().splitlines()
    if missing := [template for template in templates if "{}" not in template]:
        raise DataError(f"--template {missing[0]!r}: has no {{}} where the class's name goes")
    for start in range(0, len(names), 25):  # of 1,000 classes, 80,000 texts
        part = [template.replace("{}", name) for name in names[start : start + 25] for template in templates]
        classes.append(embeddings.texts(part).unflatten(0, (-1, len(templates))).mean(dim=1))
    classes, label = F.normalize(torch.cat(classes), dim=-1), torch.tensor([index for _, index in pictures])
    scores = embeddings.images([path for path, _ in pictures]) @ classes.T  # (images, classes)
    namesakes = torch.tensor([[name == other for other in names] for name in names])[label]
    rank = ((scores >= scores.gather(1, label[:, None])) & ~namesakes).sum(dim=1)
    return {f"top{k}": percent(rank < k) for k in (1, 5)}


def cider_d(generated: list[str], references: list[list[str]]) -> dict[str, float]:
    """CIDEr-D (arXiv 1411.5726) in the usual percent: agreement in the n-grams, n = 1 to 4, that few images share. As
    in the authors' code, but that words are runs of letters, digits and apostrophes (theirs: Stanford's tokenizer)."""

    def grams(text: str, n: int) -> Counter:
        words = re.findall(r"[\w']+", text.lower())
        return Counter(zip(*(words[i:] for i in range(n))))

    def agreement(guess: str, reference: str, n: int, weight: dict) -> float:
        a, b = grams(guess, n), grams(reference, n)
        squares = [sum((count * weight.get(gram, rarest)) ** 2 for gram, count in each.items()) for each in (a, b)]
        common = sum(min(a[gram], count) * count * weight[gram] ** 2 for gram, count in b.items())
        longer = grams(guess, 2).total() - grams(reference, 2).total()  # in pairs of words, as in the authors' code
        return math.exp(-(longer**2) / (2 * 6.0**2)) * common / math.sqrt(math.prod(squares) or 1.0)

    total, rarest = 0.0, math.log(len(references))
    for n in range(1, 5):
        images_with = Counter(gram for texts in references for gram in set().union(*(grams(t, n) for t in texts)))
        weight = {gram: rarest - math.log(count) for gram, count in images_with.items()}
        for guess, texts in zip(generated, references, strict=True):
            total += sum(agreement(guess, text, n, weight) for text in texts) / len(texts)
    return {"cider_d": 100 * 10 * total / 4 / len(generated)}


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
    all tokens before. `score(generated, references)` may add measures of greedy captions; all there is for files in
    retrieval's formats (.json), whose captions are short."""
    layout = run.layout if question is None and run.is_adapted else run.layout.with_image_prompt(question or DESCRIBE)
    prompt, right, total, generated, references = layout.image_side(), 0, 0, [], []
    room, is_short = room_for_answer(run, prompt, 128), path.suffix == ".json"
    if is_short:
        items = [item for item in data.read_retrieval(path, images) if item[1]]
    else:
        items = data.CaptionDataset(path, layout, run.processor, images)
    count = min(limit, len(items))
    for start in tqdm(range(0, count, 64), desc="captioning", delay=2, leave=False):
        some = range(start, min(start + 64, count))
        if is_short:
            pixels, captions = zip(*((run.processor(open_image(items[i][0])), items[i][1]) for i in some))
        else:
            samples = [items[i, 0] for i in some]
            batch = data.collate(samples, layout, micro_batch=32)
            if batch.skipped:
                raise DataError(f"{path}: {batch.skipped[0]}")
            right, total = right + tokens_right(run, batch), total + batch.num_tokens
            pixels = [sample.pixel_values for sample in samples if sample.long]
            captions = [[run.tokenizer.decode(sample.long)] for sample in samples if sample.long]
        if score and pixels:
            answers = run.model.generate([prompt] * len(pixels), run.pixel_values(pixels), room)
            generated += [run.tokenizer.decode(answer) for answer in answers]
            references += captions
    if not (is_short or total):
        raise DataError(f"{path}: no long captions")
    result = {} if is_short else {"token_accuracy": 100 * right / total}
    return result | (score(generated, references) if score else {})


def tokens_right(run: Run, batch: data.Batch) -> int:
    """How many tokens of a batch's long captions are the likeliest, given the image and all tokens before."""
    right = 0
    for chunk in batch.images:
        chunk = chunk.to(run.model.device)
        known = chunk.labels != data.IGNORE
        logits = run.model.logits(run.model(chunk.input_ids, chunk.pixel_values)[known])
        right += (logits.argmax(-1) == chunk.labels[known]).sum().item()
    return right


# ---- A set of tests, and how its results are shown
TESTS = {"retrieval": retrieval, "sugarcrepe": sugarcrepe, "sugarcrepe++": sugarcrepe_pp, "winoground": winoground}
TESTS["imagenet"] = imagenet
SUGARCREPE = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
PAIR, TRIPLE = ("caption", "negative_caption"), ("caption", "caption2", "negative_caption")  # SugarCrepe's, and ++'s
SIZES = {  # of the published test sets: images and captions, items a file, items, images and classes
    "retrieval": {(1000, 5000): "Flickr30k", (5000, 25010): "COCO", (5000, 25000): "COCO", (4500, 45000): "nocaps"},
    "sugarcrepe": {(1652, 788, 1406, 245, 666, 2062, 692): "SugarCrepe"},
    "sugarcrepe++": {(1652, 788, 1406, 245, 666): "SugarCrepe++"},
    "winoground": {(400,): "Winoground"},
    "imagenet": {(50000, 1000): "ImageNet"},
}


def read_test(name: str, file: Path, images: Path, split="test", captions_per_image=None, classes=None):
    """One of TESTS from its authors' files: what its function wants, and how much of it there is, as in SIZES."""
    if name == "retrieval":
        items = data.read_retrieval(file, images, split, captions_per_image)
        return items, (len(items), sum(len(captions) for _, captions in items))
    if name == "winoground":
        items = data.read_winoground(file, images)
        return items, (len(items),)
    if name == "imagenet":
        items = data.read_imagenet(file, classes)
        return items, tuple(map(len, items))
    if not file.is_dir():
        raise DataError(f"{file}: is not a folder; give the one that holds {SUGARCREPE[0]}.json and the other files")
    kinds, captions = (SUGARCREPE, PAIR) if name == "sugarcrepe" else (SUGARCREPE[:5], TRIPLE)  # ++ has no add_* files
    items = {kind: data.read_sugarcrepe(file / f"{kind}.json", images, captions) for kind in kinds}
    return items, tuple(map(len, items.values()))


def evaluate(embeddings: Embeddings, tests: Path, score: Callable | None = None) -> dict[str, dict[str, float]]:
    """Every test that a tests.json names, on one model. For example:

    {"retrieval": {"file": "karpathy.json", "images": "images", "split": "test"},
     "sugarcrepe": {"file": "sugar-crepe/data", "images": "val2017"}, "sugarcrepe++": {...},
     "winoground": {"file": "examples.jsonl", "images": "images"}, "captioning": {"file": "captions.jsonl"}}

    Paths are relative to the file. `score` is `captioning`'s."""
    run, tables = embeddings.run, {}
    for name, settings in read_json(tests).items():
        known = name in (*TESTS, "captioning")
        if not known or not isinstance(settings, dict) or not isinstance(settings.get("file"), str):
            raise DataError(f'{tests}: {name!r} must be one of {", ".join(TESTS)}, captioning, with a "file"')
        file, images = tests.parent / settings["file"], tests.parent / str(settings.get("images", "."))
        if name != "captioning":
            items, _ = read_test(name, file, images, settings.get("split", "test"), classes=settings.get("classes"))
            tables[name] = TESTS[name](embeddings, items)
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


def paper_rows(table: str = "ablation") -> dict[str, dict[str, float]]:
    """The paper's own numbers: of a data set, or of its ablation (table 4)."""
    return {f"paper: {name}": row for name, row in read_json(ROOT / "docs" / "paper.json")[table].items()}


def gallery(path: Path, rows: list[tuple[str, list[tuple[Path, bool, str]]]], size: int = 96) -> None:
    """A PNG: each row a query, and pictures with what stands below them; the right ones are framed in green."""
    font, left, columns, step = ImageFont.load_default(13), 330, max(len(found) for _, found in rows), size + 26
    sheet = Image.new("RGB", (left + columns * (size + 12), len(rows) * step + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, found) in enumerate(rows):
        top, lines = row * step + 6, [""]
        for word in query.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if draw.textlength(longer, font) < left - 20 else [*lines, word]
        draw.multiline_text((8, top + 4), "\n".join(lines), fill="black", font=font)
        for column, (image, right, label) in enumerate(found):
            x = left + column * (size + 12)
            draw.rectangle((x - 4, top - 4, x + size + 3, top + size + 3), fill="limegreen" if right else "white")
            sheet.paste(ImageOps.pad(open_image(image), (size, size), color="gray"), (x, top))
            draw.text((x, top + size + 3), label, fill="dimgray", font=font)
    sheet.save(path, "PNG")


if __name__ == "__main__":
    from examples.commands import main  # what is at the top of this file; nothing here needs it

    main()
