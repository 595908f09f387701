"""Use and test a model: embeddings, captions, the paper's tables.

    python eval.py caption photo.jpg                  what the picture shows, in the model's words
    python eval.py caption *.jpg --question "What colour is the car?" --model llava-1.5-7b-hf
    python eval.py retrieval dataset_flickr30k.json --images flickr30k-images
    python eval.py sugarcrepe sugar-crepe/data --images val2017         (sugarcrepe++ likewise)
    python eval.py winoground examples.jsonl --images winoground/images
    python eval.py imagenet val --classes names.txt
    python eval.py captioning captions.jsonl

`--model` is a Hugging Face LLaVA folder, or a run of train.py with its adapters. In Python:

    embedder = load_embedder("runs/toy")
    images = encode_image(embedder, [open_image("photo.jpg")])     # (1, D), unit length
    texts = encode_text(embedder, ["a red car", "a blue car"])     # (2, D)
    print(images @ texts.T)                                        # cosine similarities

Searching, conversations and other uses are scripts in examples/.
Axes: B batch, T tokens, D hidden.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # waiting threads sleep soon, see train.py

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import backbones
from backbones import Backbone, BackboneConfig
from data import (
    IMAGE_PROMPT,
    TEXT_PROMPT,
    CaptionDataset,
    Chunk,
    ImageProcessor,
    Layout,
    Sample,
    TextTokenizer,
    collate,
    move_images,
    open_image,
    stack_images,
)
from fast.int8 import quantize
from formats.files import ROOT, InputError, LeftOut, find_folder, read_json, tell
from formats.peft import refuse_adapter
from formats.pictures import list_pictures
from formats.testsets import SIZES, read_domains, read_retrieval, read_test
from lora import SoftPrompt, adapters, adapters_disabled, load_adapter
from losses import IGNORE
from runtime.devices import pick_device
from runtime.embeddings import KeptEmbeddings, base_hash, fingerprint_of, key_of_text
from runtime.options import (
    add_answer_options,
    add_cache_option,
    add_file_options,
    add_images_option,
    add_model_options,
    add_prompt_options,
    check_parent,
    positive,
)
from runtime.processes import gather_rows, rank, world_size
from runtime.resuming import read_run
from runtime.terminal import errors_in_one_line

TOY_MODEL = ROOT / "toy" / "tiny-llava"
DESCRIBE = "Describe the image in detail."


@dataclass
class Embedder:
    """A model with all it takes to use it on pictures and text."""

    model: Backbone
    layout: Layout
    processor: ImageProcessor
    base: str = ""  # the base model's hash, see `base_hash`

    @property
    def notes(self) -> dict[str, str]:
        """What adapters belong to, kept in their files."""
        return {**self.layout.notes, "base": self.base}

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.layout.tokenizer

    @property
    def is_adapted(self) -> bool:
        """Whether the model computes with adapters now."""
        return any(module.enabled for module in adapters(self.model).values())

    def prepare(self, images: list[Image.Image | torch.Tensor]) -> list[torch.Tensor]:
        """RGB images, or what the processor made of them -> (3, height, width) fp32 each."""

        def prepare_one(image: Image.Image | torch.Tensor) -> torch.Tensor:
            return image if torch.is_tensor(image) else self.processor(image)

        # Threads, for Pillow and NumPy let go of Python's lock while they resize.
        with ThreadPoolExecutor() as threads:
            return list(threads.map(prepare_one, images))

    def pixel_values(
        self, images: list[Image.Image | torch.Tensor]
    ) -> torch.Tensor | list[torch.Tensor]:
        """RGB images, or what the processor made of them -> (B, 3, height, width), on the model's
        device and in its dtype. Where they differ in size, it is a list."""
        pixels = stack_images(self.prepare(images))
        return move_images(pixels, self.model.device, self.model.dtype)


# ---- Loading


def load_embedder(
    folder: str | Path,
    device: str | None = None,
    image_prompt: str | None = None,
    text_prompt: str | None = None,
    dtype: torch.dtype | None = None,
    max_pixels: int = 0,
) -> Embedder:
    """A LLaVA folder, or a run folder of train.py, ready to embed and to caption.

    A run is its base model, in int8 if it was trained so, with its newest adapters and with the
    prompts that they were trained with. A LLaVA folder has the paper's prompts or those given.
    Raises InputError."""
    folder = find_folder(folder) or Path(folder)
    if not (folder / "checkpoints").is_dir():
        return load_base(
            folder, device, image_prompt, text_prompt, dtype=dtype, max_pixels=max_pixels
        )
    if image_prompt is not None or text_prompt is not None:
        advice = "others are for LLaVA folders"
        raise InputError(f"{folder}: a run keeps the prompts it was trained with; {advice}")
    if max_pixels:
        raise InputError(f"{folder}: a run keeps the max_pixels it was trained with")
    settings, checkpoint = read_run(folder)
    embedder = load_base(
        settings["model"],
        device,
        settings["image_prompt"],
        settings["text_prompt"],
        # Adapters that learned on rounded weights are right on those, not on the whole ones.
        int8=settings["int8"],
        dtype=dtype,
        max_pixels=settings["max_pixels"],
    )
    layout = embedder.layout
    model = embedder.model
    load_adapter(model, checkpoint, layout.image_prompt, layout.text_prompt, embedder.notes)
    # Where prompts were learned, sequences hold their ids, which come after the vocabulary's.
    if isinstance(model.language_model.embed_tokens, SoftPrompt):
        embedder.layout = layout.with_soft_prompts(model.config.text.vocab_size)
    return embedder


def load_base(
    folder: str | Path,
    device: str | torch.device | None = None,
    image_prompt: str | None = None,
    text_prompt: str | None = None,
    int8: bool = False,
    dtype: torch.dtype | None = None,
    mapped: bool = False,
    max_pixels: int = 0,
) -> Embedder:
    """A LLaVA folder as an Embedder, without adapters. Raises InputError.

    Args:
        int8: hold the language model's linear layers in int8.
        dtype: of the weights, if not the one that suits the device.
        mapped: leave the weights on the CPU as a view of their file, in its dtype: of them only
            those pages are read that are needed.
        max_pixels: the largest picture, where the model's pictures differ in size; 0 is what
            its files say."""
    folder, config, layout, processor = read_folder(folder, image_prompt, text_prompt, max_pixels)
    device, best_dtype = pick_device(device)
    if mapped:
        model = backbones.load(folder, None, "cpu")
    elif int8:
        # Made smaller before it moves: the GPU need not hold the whole weights.
        model = backbones.load(folder, dtype or best_dtype, "cpu")
    else:
        model = backbones.load(folder, dtype or best_dtype, device)
    model.config.eos_token_ids = config.eos_token_ids
    # Hashed from a view of its file: the numbers of `model` may be rounded already.
    base = base_hash(backbones.load(folder, None))
    if int8:
        quantize(model)
    if not mapped:
        model = model.to(device)
    return Embedder(model, layout, processor, base)


def read_folder(
    folder: str | Path,
    image_prompt: str | None = None,
    text_prompt: str | None = None,
    max_pixels: int = 0,
) -> tuple[Path, BackboneConfig, Layout, ImageProcessor]:
    """A LLaVA folder without its weights: where it is, and what its small files say, checked.

    The prompts are the paper's where none are given. Raises InputError."""
    given = folder
    folder = find_folder(given)
    if folder is None:
        advice = "give a Hugging Face LLaVA folder or a run of train.py"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(given)):  # a name on the Hub, perhaps
            advice += f"; `hf download {given} --local-dir DIR` gets one"
        raise InputError(f"{given}: no such folder; {advice}")
    refuse_adapter(folder)
    config = backbones.read_config(folder)
    if image_prompt is None:
        image_prompt = IMAGE_PROMPT
    if text_prompt is None:
        text_prompt = TEXT_PROMPT
    # The files must agree with each other: a folder put together by hand often mixes two models.
    layout = Layout(
        TextTokenizer(folder),
        config.num_image_tokens,
        image_prompt,
        text_prompt,
        template=backbones.family_of(folder).template,
    )
    if layout.image_id != config.image_token_id:
        found = f"{layout.template.image_token} is {layout.image_id} in tokenizer.json"
        found += f", {config.image_token_id} in config.json"
        raise InputError(f"{folder}: {found}: the files belong to different models")
    refuse_unknown_ids(folder, layout.tokenizer, config)
    processor = read_processor(folder, config, max_pixels)
    # The end of an answer in the chat template ends it, whether or not the config lists it.
    config.eos_token_ids = tuple({*config.eos_token_ids, layout.stop_id})
    return folder, config, layout, processor


def read_processor(folder: Path, config: BackboneConfig, max_pixels: int) -> ImageProcessor:
    """What prepares pictures for the model in a folder, as its config wants them.

    Raises InputError."""
    processor = backbones.family_of(folder).processor.from_pretrained(folder)
    if max_pixels:
        processor.limit(max_pixels)
    side = config.vision.image_size
    if processor.size != (side, side):
        found = f"preprocessor_config.json makes images of {processor.size}"
        raise InputError(f"{folder}: {found}, config.json wants {side} x {side}")
    return processor


def refuse_unknown_ids(folder: Path, tokenizer: TextTokenizer, config: BackboneConfig) -> None:
    """Raise InputError where the tokenizer makes ids that the model has no embedding for.

    The ids that come next are those of soft prompts: such a token would become one of them."""
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=vocabulary.get)
    if vocabulary[token] >= config.text.vocab_size:
        found = f"{token!r} has id {vocabulary[token]} in tokenizer.json, the embedding has "
        found += f"{config.text.vocab_size} rows (vocab_size in config.json)"
        advice = "take the tokenizer that belongs to the model, or add rows with transformers' "
        advice += "resize_token_embeddings"
        raise InputError(f"{folder}: {found}; {advice}")


# ---- Embeddings: the last hidden state at the summary position, at unit length


def encode_image(
    embedder: Embedder, images: list[Image.Image | torch.Tensor], batch_size: int = 64
) -> torch.Tensor:
    """RGB images, or what the processor made of them -> (B, D) fp32 on the CPU, unit length."""
    parts = [torch.empty(0, embedder.model.config.text.hidden_size)]
    # A batch at a time is prepared: pixels take more room than files.
    for start in range(0, len(images), batch_size):
        prepared = embedder.prepare(images[start : start + batch_size])
        sequences = [embedder.layout.image_side(image=image) for image in prepared]
        parts.append(encode(embedder, sequences, prepared, batch_size))
    return torch.cat(parts)


def encode_text(embedder: Embedder, texts: list[str], batch_size: int = 256) -> torch.Tensor:
    """Texts -> (B, D) fp32 on the CPU, unit length."""
    sequences = [embedder.layout.text_side(text) for text in texts]
    return encode(embedder, sequences, None, batch_size)


@torch.no_grad()
def encode(
    embedder: Embedder,
    sequences: list[list[int]],
    images: list[Image.Image | torch.Tensor] | None,
    batch_size: int,
) -> torch.Tensor:
    """Token ids that end at the summary position, and an image for each sequence or for none
    -> (B, D) fp32 on the CPU, unit length.

    Raises InputError for a sequence that is longer than the model's positions."""
    model = embedder.model
    refuse_too_long(sequences, model)
    # By length, so that sequences of like length share a batch and little of it is padding.
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    embeddings = torch.empty(len(sequences), model.config.text.hidden_size)
    for start in range(0, len(sequences), batch_size):
        chosen = order[start : start + batch_size]
        ids = [torch.tensor(sequences[index], device=model.device) for index in chosen]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (b, T)
        pixel_values = None
        if images:
            pixel_values = embedder.pixel_values([images[index] for index in chosen])
        # No mask: under causal attention nothing sees the padding, which comes after everything.
        hidden = model(input_ids, pixel_values)  # (b, T, D)
        # Never [:, -1]: that is padding in all sequences but the longest.
        summary = torch.tensor([len(each) - 1 for each in ids], device=model.device)  # (b,)
        states = hidden[torch.arange(len(chosen), device=model.device), summary]  # (b, D)
        # In fp32, for bf16 has two to three digits. Written back in the order given.
        embeddings[chosen] = F.normalize(states.float(), dim=-1).cpu()
    return embeddings


def refuse_too_long(sequences: list[list[int]], model: Backbone) -> None:
    """Raise InputError for a sequence that is longer than the model's positions.

    Rotary embeddings would go on, to where nothing was trained."""
    longest = max((len(sequence) for sequence in sequences), default=0)
    positions = model.config.text.max_position_embeddings
    if longest > positions:
        found = f"a text and its prompt are {longest} tokens, the model has {positions} positions"
        raise InputError(f"{found}; shorten it")


class Embeddings:
    """Embeddings of pictures and captions, each distinct one computed once.

    Distinct is the content of a file, or the words. In a `folder` they are kept as they are
    computed, for the same model's next tables: what was interrupted goes on."""

    def __init__(self, embedder: Embedder, folder: str | Path | None = None):
        self.embedder = embedder
        if folder is None:
            self.kept = KeptEmbeddings()
        else:
            # Of each model in a folder of its own: with other weights the vectors are others.
            self.kept = KeptEmbeddings(Path(folder), fingerprint(embedder))

    def images(self, paths: list[Path]) -> torch.Tensor:
        """Paths of pictures -> (pictures, D). Raises InputError."""
        keys = self.kept.keys_of_files(paths)
        # One batch at a time: what a stop can lose is one batch of them.
        self.compute_missing(keys, paths, self.encode_files, 64, "pictures")
        return self.kept.vectors_of(keys)

    def texts(self, captions: list[str]) -> torch.Tensor:
        """Strings -> (captions, D). Raises InputError."""
        keys = [key_of_text(text) for text in captions]
        # Several batches at a time, so that sorting by length has something to sort.
        self.compute_missing(keys, captions, self.encode_captions, 2048, "captions")
        return self.kept.vectors_of(keys)

    def encode_files(self, paths: list[Path]) -> torch.Tensor:
        """Pictures are read here, not before: thousands of them would not fit the memory."""

        def read(path: Path) -> torch.Tensor:
            return self.embedder.processor(open_image(path))

        with ThreadPoolExecutor() as threads:
            pixels = list(threads.map(read, paths))
        return encode_image(self.embedder, pixels)

    def encode_captions(self, captions: list[str]) -> torch.Tensor:
        return encode_text(self.embedder, captions)

    def compute_missing(
        self, keys: list[bytes], items: list, embed: Callable, at_a_time: int, name: str
    ) -> None:
        """Embed the items whose keys are not known, and keep each part as soon as it is there.

        embed: list of items -> (items, D)."""
        if not items:
            raise InputError(f"there are no {name} to embed")
        missing = {}  # one item for each key: copies are computed once
        for key, item in zip(keys, items):
            if key not in self.kept:
                missing[key] = item
        new_keys = list(missing)
        starts = range(0, len(new_keys), at_a_time)
        label = f"embedding {len(new_keys)} {name}"
        for start in tqdm(starts, desc=label, delay=2, leave=False):
            part = new_keys[start : start + at_a_time]
            vectors = self.share([missing[key] for key in part], embed)
            # Every comparison with NaN is false, so the tie rule would not catch it.
            if not vectors.isfinite().all():
                cause = "the model has diverged, or overflows in fp16"
                raise InputError(f"embeddings of {name} are not finite; {cause}")
            self.kept.add(part, vectors)

    def share(self, items: list, embed: Callable) -> torch.Tensor:
        """embed(items) -> (items, D), of which each process computes a part and all get all.

        Every part is of one length, for sharded layers meet in each forward pass: where the items
        do not go round, the first ones are computed again."""
        processes = world_size()
        if processes == 1:
            return embed(items)
        rounds = math.ceil(len(items) / processes)
        places = range(rank(), rounds * processes, processes)
        mine = embed([items[place % len(items)] for place in places])  # (rounds, D)
        vectors = gather_rows(mine.to(self.embedder.model.device))  # (processes * rounds, D)
        # From one process after another to the order of the items.
        vectors = vectors.unflatten(0, (processes, rounds)).transpose(0, 1).flatten(0, 1)
        return vectors[: len(items)].cpu()


def fingerprint(embedder: Embedder) -> str:
    """A name for what an embedding depends on besides its input: the settings, the prompts, the
    tokenizer, the preparation of pixels, and every tensor."""
    layout = embedder.layout
    processor = embedder.processor
    model = embedder.model
    # Any picture will do: only the prompt around it counts here.
    blank = torch.zeros(3, *processor.size)
    prompts = [layout.image_side(image=blank), layout.text_side(""), embedder.is_adapted]
    lora_configs = [getattr(each, "config", 0) for each in adapters(model).values()]
    pixels = [processor.size, processor.resized, processor.resample, processor.table.tolist()]
    settings = [
        repr(prompts),
        repr([*pixels, model.config, lora_configs]),
        layout.tokenizer.tokenizer.to_str(),
    ]
    tensors = model.state_dict()
    return fingerprint_of(tensors, settings)


# ---- Metrics, all in percent. A tie never counts as a success: equal embeddings must not score by
# luck, and a model that says the same of everything must score nothing.


def recall_at_k(
    scores: torch.Tensor, image_of_text: torch.Tensor, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Retrieval in both directions, as the literature counts it.

    Args:
        scores: (texts, images), similarities.
        image_of_text: (texts,), the image that each text describes.
    Returns:
        "t2i_r1", ...: texts whose image is among the k best of all images.
        "i2t_r1", ...: images with one of their texts among the k best of all texts."""
    # The rank of an answer is the number of wrong ones that score at least as high: >=, not >, so
    # that a tie counts as lost.
    own_score = scores.gather(1, image_of_text[:, None])  # (texts, 1)
    t2i_rank = (scores >= own_score).sum(dim=1) - 1  # without the right image itself

    # An image may have several texts: the best of them is its answer, and none of them is wrong.
    i2t_rank = []
    for image in image_of_text.unique():  # an image without a text is not asked for one
        of_all_texts = scores[:, image]
        of_own_texts = of_all_texts[image_of_text == image]
        best = of_own_texts.max()
        i2t_rank.append((of_all_texts >= best).sum() - (of_own_texts >= best).sum())
    i2t_rank = torch.stack(i2t_rank)

    recalls = {}
    for direction, ranks in (("t2i", t2i_rank), ("i2t", i2t_rank)):
        for k in ks:
            # Rank 0 is the first place.
            recalls[f"{direction}_r{k}"] = percent(ranks < k)
    return recalls


def percent(correct: torch.Tensor) -> float:
    """The share of True in a boolean tensor."""
    return 100 * correct.double().mean().item()


def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of a[i] with b[i], both (B, D) of unit length -> (B,)."""
    return (a * b).sum(-1)


def retrieval(embeddings: Embeddings, items: list[tuple[Path, list[str]]]) -> dict[str, float]:
    """Flickr30k, COCO, nocaps: all images and all captions compete.

    items: (image, its captions); an image without captions is one more to be mistaken for."""
    paths = []
    texts = []
    image_of_text = []
    for number, (path, captions) in enumerate(items):
        paths.append(path)
        texts += captions
        image_of_text += [number] * len(captions)
    image_embeddings = embeddings.images(paths)  # (images, D)
    text_embeddings = embeddings.texts(texts)  # (texts, D)
    return recall_at_k(text_embeddings @ image_embeddings.T, torch.tensor(image_of_text))


def retrieval_by_domain(
    embeddings: Embeddings, items: list[tuple[Path, list[str]]], domains: dict[Path, str]
) -> dict[str, float]:
    """nocaps' other protocol: `retrieval` among the pictures of each domain, and the mean of it."""
    of_domain = {}
    for path, captions in items:
        of_domain.setdefault(domains.get(path), []).append((path, captions))
    tables = [retrieval(embeddings, some) for some in of_domain.values()]
    return {key: sum(table[key] for table in tables) / len(tables) for key in tables[0]}


def sugarcrepe(embeddings: Embeddings, files: dict[str, list[dict]]) -> dict[str, float]:
    """SugarCrepe (arXiv 2306.14610): the caption must beat its negative, strictly.

    files: the items of each of its files; so are the results."""
    result = {}
    for kind, items in files.items():
        image = embeddings.images([item["image"] for item in items])
        caption = embeddings.texts([item["caption"] for item in items])
        negative = embeddings.texts([item["negative_caption"] for item in items])
        result[kind] = percent(similarity(image, caption) > similarity(image, negative))
    return result


def sugarcrepe_pp(embeddings: Embeddings, files: dict[str, list[dict]]) -> dict[str, float]:
    """SugarCrepe++ (arXiv 2406.11171): two captions that are true in different words.

    itt: for the image, both captions must beat the negative.
    tot: by text alone, the captions must be nearer to each other than either to the negative."""
    result = {}
    for kind, items in files.items():
        image = embeddings.images([item["image"] for item in items])
        first = embeddings.texts([item["caption"] for item in items])
        second = embeddings.texts([item["caption2"] for item in items])
        negative = embeddings.texts([item["negative_caption"] for item in items])

        wrong = similarity(image, negative)
        first_wins = similarity(image, first) > wrong
        second_wins = similarity(image, second) > wrong
        result[f"{kind}_itt"] = percent(first_wins & second_wins)

        pair = similarity(first, second)
        nearer_to_first = pair > similarity(first, negative)
        nearer_to_second = pair > similarity(second, negative)
        result[f"{kind}_tot"] = percent(nearer_to_first & nearer_to_second)
    return result


def winoground(embeddings: Embeddings, items: list[dict]) -> dict[str, float]:
    """Winoground (arXiv 2204.03162): two images, and two captions of the same words.

    text: each image chooses its caption. image: each caption chooses its image. group: both.
    Chance is 25, 25 and 16.7."""
    image_0 = embeddings.images([item["image_0"] for item in items])
    image_1 = embeddings.images([item["image_1"] for item in items])
    caption_0 = embeddings.texts([item["caption_0"] for item in items])
    caption_1 = embeddings.texts([item["caption_1"] for item in items])
    # The four similarities of each example: two right ones, two wrong ones.
    right_0 = similarity(caption_0, image_0)
    right_1 = similarity(caption_1, image_1)
    caption_0_image_1 = similarity(caption_0, image_1)
    caption_1_image_0 = similarity(caption_1, image_0)
    text = (right_0 > caption_1_image_0) & (right_1 > caption_0_image_1)
    image = (right_0 > caption_0_image_1) & (right_1 > caption_1_image_0)
    return {"text": percent(text), "image": percent(image), "group": percent(text & image)}


def imagenet(
    embeddings: Embeddings,
    items: tuple[list[tuple[Path, int]], list[str]],
    templates: list[str] | None = None,
) -> dict[str, float]:
    """Zero-shot classification, as CLIP (arXiv 2103.00020) is tested.

    A class is the mean of its name's embeddings in all templates. Classes of one name (ImageNet has
    some) count as one.

    Args:
        items: a list of (image, number of its class), and the classes' names.
        templates: with {} where the name goes; CLIP's 80 if none are given.
    Raises:
        InputError: for a template without {}."""
    pictures, names = items
    if not templates:
        templates = (ROOT / "docs" / "imagenet_templates.txt").read_text().splitlines()
    for template in templates:
        if "{}" not in template:
            raise InputError(f"--template {template!r}: has no {{}} where the class's name goes")
    label = torch.tensor([number for _, number in pictures])
    class_embeddings = embed_classes(embeddings, names, templates)  # (classes, D)
    scores = embeddings.images([path for path, _ in pictures]) @ class_embeddings.T
    own_score = scores.gather(1, label[:, None])  # (images, 1)
    # All classes of a name have the number of the first: none of them is a wrong answer.
    name_number = torch.tensor([names.index(name) for name in names])
    is_wrong = name_number[label][:, None] != name_number  # (images, classes)
    rank_of_label = ((scores >= own_score) & is_wrong).sum(dim=1)
    return {"top1": percent(rank_of_label < 1), "top5": percent(rank_of_label < 5)}


def embed_classes(embeddings: Embeddings, names: list[str], templates: list[str]) -> torch.Tensor:
    """The mean of each name's embeddings in all templates, at unit length -> (classes, D)."""
    means = []
    for start in range(0, len(names), 25):  # ImageNet's 1,000 classes are 80,000 texts
        texts = []
        for name in names[start : start + 25]:
            texts += [template.replace("{}", name) for template in templates]
        vectors = embeddings.texts(texts)  # (25 * templates, D)
        vectors = vectors.unflatten(0, (-1, len(templates)))  # (25, templates, D)
        means.append(vectors.mean(dim=1))
    # A mean of unit vectors is shorter than they are, of each class by another factor.
    return F.normalize(torch.cat(means), dim=-1)


# ---- CIDEr-D


def cider_d(generated: list[str], references: list[list[str]]) -> dict[str, float]:
    """CIDEr-D (arXiv 1411.5726) in the usual percent: agreement in the n-grams, n = 1 to 4, that
    few images share.

    As in the authors' code, but that words are runs of letters, digits and apostrophes (theirs:
    Stanford's tokenizer). One generated caption an image, one or more references an image.
    Returns {} where nothing can be told: of a single picture, or of pictures with the same
    captions, no n-gram is rarer than another, and a perfect caption would get 0."""
    weights_of = {n: ngram_weights(references, n) for n in range(1, 5)}
    if not any(any(weights.values()) for weights in weights_of.values()):
        return {}
    rarest = math.log(len(references))  # the weight of an n-gram that no reference has
    total = 0.0
    for n, weights in weights_of.items():
        for guess, texts in zip(generated, references, strict=True):
            agreements = [cider_agreement(guess, text, n, weights, rarest) for text in texts]
            total += sum(agreements) / len(texts)
    # The paper's scores are times 10; the usual percent is times 100 again.
    return {"cider_d": 100 * 10 * total / 4 / len(generated)}


def ngrams(text: str, n: int) -> Counter:
    """How often each run of n words stands in a text."""
    words = re.findall(r"[\w']+", text.lower())
    counts = Counter()
    for start in range(len(words) - n + 1):
        counts[tuple(words[start : start + n])] += 1
    return counts


def ngram_weights(references: list[list[str]], n: int) -> dict[tuple, float]:
    """The inverse document frequency of every n-gram: the log of images / images that have it."""
    images_with = Counter()
    for texts in references:
        of_this_image = set()
        for text in texts:
            of_this_image.update(ngrams(text, n))
        images_with.update(of_this_image)
    log_images = math.log(max(len(references), 1))
    return {gram: log_images - math.log(count) for gram, count in images_with.items()}


def cider_agreement(guess: str, reference: str, n: int, weights: dict, rarest: float) -> float:
    """The cosine of two captions' weighted n-grams, less for captions of different lengths."""
    guessed = ngrams(guess, n)
    wanted = ngrams(reference, n)
    guessed_square = sum(
        (count * weights.get(gram, rarest)) ** 2 for gram, count in guessed.items()
    )
    wanted_square = sum((count * weights[gram]) ** 2 for gram, count in wanted.items())
    # min: saying a word twice is no better (the D in CIDEr-D).
    common = sum(
        min(guessed[gram], count) * count * weights[gram] ** 2 for gram, count in wanted.items()
    )
    # Length is counted in pairs of words, as in the authors' code; 6 is the paper's sigma.
    difference = ngrams(guess, 2).total() - ngrams(reference, 2).total()
    penalty = math.exp(-(difference**2) / (2 * 6.0**2))
    # A caption of fewer than n words has no n-grams, and no length: then 0 / 1.
    return penalty * common / math.sqrt(guessed_square * wanted_square or 1.0)


# ---- Captions


def caption(
    embedder: Embedder,
    images: list[Image.Image],
    question: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0,
) -> list[str]:
    """Describe each image, or answer one question about each; greedily unless a temperature is
    given. Raises InputError where the question leaves no room for an answer."""
    layout = caption_layout(embedder, question)
    return answers_about(embedder, layout, images, max_new_tokens, temperature)


def answers_about(
    embedder: Embedder,
    layout: Layout,
    images: list[Image.Image | torch.Tensor],
    max_new_tokens: int,
    temperature: float = 0,
) -> list[str]:
    """What the model says of each image, after the layout's image prompt. Raises InputError."""
    prepared = embedder.prepare(images)
    prompts = [layout.image_side(image=image) for image in prepared]
    room = room_for_answer(embedder, max(prompts, key=len), max_new_tokens)
    pixel_values = embedder.pixel_values(prepared)
    answers = embedder.model.generate(prompts, pixel_values, room, temperature)
    return [embedder.tokenizer.decode(answer) for answer in answers]


def caption_layout(embedder: Embedder, question: str | None) -> Layout:
    """The layout in which an image is followed by the question, or by a request to describe it.

    Without a question, an adapted model is asked through the image prompt that it was trained to
    caption with."""
    if question is None and embedder.is_adapted:
        return embedder.layout
    return embedder.layout.with_image_prompt(question or DESCRIBE)


def room_for_answer(embedder: Embedder, prompt: list[int], wanted: int) -> int:
    """As many new tokens as are wanted and as the model has positions for. Raises InputError where
    there are none."""
    room = embedder.model.config.text.max_position_embeddings - len(prompt)
    if room < 1:
        found = f"{len(prompt)} tokens fill the model's positions"
        raise InputError(f"{found}; ask less, or start a new conversation")
    return min(wanted, room)


def captioning(
    embedder: Embedder,
    path: Path,
    images: Path,
    question: str | None = None,
    limit: int = 256,
    score: Callable | None = None,
) -> dict[str, float]:
    """What the model says of the first `limit` pictures of a file, measured in two ways.

    `token_accuracy`, of a training file: of files in retrieval's formats (.json) there is none, for
    they have short captions only. And what `score_greedy_captions` finds, where there is a `score`.

    Args:
        images: the folder of the pictures.
        question: what to ask, see `caption_layout`.
        score: score(generated, references) -> more measures, such as `cider_d`.
    Raises:
        InputError: for a training file without long captions, a picture that cannot be read."""
    layout = caption_layout(embedder, question)
    result = {}
    if path.suffix == ".json":
        left_out = LeftOut()
        items = read_retrieval(path, images, left_out=left_out)
        tell(path, left_out)
        items = [item for item in items if item[1]]  # some pictures have no caption
        pictures = pictures_of_test(embedder, items[:limit])
    else:
        dataset = CaptionDataset(path, layout, embedder.processor, images)
        result["token_accuracy"] = token_accuracy(embedder, dataset, limit)
        pictures = pictures_of_records(dataset, limit)
    if score is not None:
        result.update(score_greedy_captions(embedder, layout, pictures, score))
    return result


@torch.no_grad()
def token_accuracy(embedder: Embedder, dataset: CaptionDataset, limit: int) -> float:
    """Of the first `limit` records, the share of the long captions' tokens that are the likeliest,
    given the image and all tokens before (teacher forcing), in percent. Raises InputError."""
    right = 0
    total = 0
    for samples in samples_of(dataset, limit):
        batch = collate(samples, dataset.layout, micro_batch=32)
        # Token by token, as the loss counts: a longer caption weighs more.
        for chunk in batch.images:
            right += tokens_right(embedder.model, chunk)
        total += batch.num_tokens
    if not total:
        raise InputError(f"{dataset.path}: no long captions")
    return 100 * right / total


def tokens_right(model: Backbone, chunk: Chunk) -> int:
    """How many of the tokens that a chunk's positions should predict are the likeliest there."""
    chunk = chunk.to(model.device)
    # Only positions that have a label meet the head: logits are the largest tensor of all.
    supervised = chunk.labels != IGNORE
    hidden = model(chunk.input_ids, chunk.pixel_values)[supervised]  # (N, D)
    predicted = model.logits(hidden).argmax(-1)  # (N,)
    return (predicted == chunk.labels[supervised]).sum().item()


def score_greedy_captions(
    embedder: Embedder, layout: Layout, pictures: Iterator[tuple], score: Callable
) -> dict[str, float]:
    """score(generated, references): of each picture a greedy caption, and those that it has.

    pictures: yields prepared pictures, (3, height, width) each, and a list of captions of each."""
    generated = []
    references = []
    for pixels, captions in pictures:
        generated += answers_about(embedder, layout, pixels, max_new_tokens=128)
        references += captions
    return score(generated, references)


def pictures_of_test(embedder: Embedder, items: list[tuple[Path, list[str]]]) -> Iterator[tuple]:
    """64 pictures of a retrieval test at a time, prepared, and all captions of each."""
    for part in parts_of(len(items)):
        pixels = [embedder.processor(open_image(items[index][0])) for index in part]
        yield pixels, [items[index][1] for index in part]


def pictures_of_records(dataset: CaptionDataset, limit: int) -> Iterator[tuple]:
    """Of 64 records of a training file at a time the pictures, prepared, and their long captions.

    They are read again after `token_accuracy`: a picture takes far less time to read than to
    describe, and all of them together would not fit the memory."""
    decode = dataset.layout.tokenizer.decode
    for samples in samples_of(dataset, limit):
        samples = [sample for sample in samples if sample.long]
        if samples:
            pixels = [sample.pixel_values for sample in samples]
            yield pixels, [[decode(sample.long)] for sample in samples]


def samples_of(dataset: CaptionDataset, limit: int) -> Iterator[list[Sample]]:
    """The first `limit` records, 64 at a time. Raises InputError."""
    for part in parts_of(min(limit, len(dataset))):
        # Draw 0: of several long captions always the first, so that a table can be repeated.
        samples = [dataset[index, 0] for index in part]
        for sample in samples:
            # Training may go on without a picture; a table would be of another set.
            if sample.error is not None:
                raise InputError(f"{dataset.path}: {sample.error}")
        yield samples


def parts_of(count: int) -> Iterator[range]:
    """0 to count - 1, 64 at a time."""
    for start in tqdm(range(0, count, 64), desc="captioning", delay=2, leave=False):
        yield range(start, min(start + 64, count))


# ---- A set of tests


METRICS = {
    "retrieval": retrieval,
    "sugarcrepe": sugarcrepe,
    "sugarcrepe++": sugarcrepe_pp,
    "winoground": winoground,
    "imagenet": imagenet,
}


def evaluate(
    embeddings: Embeddings, tests: Path, score: Callable | None = None
) -> dict[str, dict[str, float]]:
    """Every test that a tests.json names, on one model. For example:

    {"retrieval": {"file": "karpathy.json", "images": "images", "split": "test"},
     "sugarcrepe": {"file": "sugar-crepe/data", "images": "val2017"}, "sugarcrepe++": {...},
     "winoground": {"file": "examples.jsonl", "images": "images"},
     "captioning": {"file": "captions.jsonl"}}

    Paths are relative to the file. `score` is `captioning`'s. Raises InputError."""
    embedder = embeddings.embedder
    tables = {}
    for name, settings in read_json(tests).items():
        is_known = name in METRICS or name == "captioning"
        has_file = isinstance(settings, dict) and isinstance(settings.get("file"), str)
        if not is_known or not has_file:
            known = ", ".join(METRICS)
            raise InputError(f'{tests}: {name!r} must be one of {known}, captioning, with a "file"')
        file = tests.parent / settings["file"]
        images = tests.parent / str(settings.get("images", "."))
        if name == "captioning":
            tables[name] = captioning_both_ways(embedder, file, images, score)
            continue
        split = settings.get("split", "test")
        classes = settings.get("classes")
        if classes is not None:
            classes = tests.parent / classes
        left_out = LeftOut()
        items, _ = read_test(name, file, images, split, classes=classes, left_out=left_out)
        tell(file, left_out)
        tables[name] = METRICS[name](embeddings, items)
    return tables


def captioning_both_ways(
    embedder: Embedder, file: Path, images: Path, score: Callable | None
) -> dict[str, float]:
    """`captioning`, and of an adapted model whether it still understands the plain question."""
    table = captioning(embedder, file, images, score=score)
    if embedder.is_adapted:
        plain = captioning(embedder, file, images, DESCRIBE, score=score)
        for key, value in plain.items():
            table[f"describe_{key}"] = value
    return table


def nearest_pictures(
    embeddings: Embeddings, tests: Path, captions: int, pictures: int
) -> list[tuple[str, list]]:
    """What the first captions of a retrieval test find, for people to look at.

    -> [caption, [[path of a picture, is it the right one, cosine], ...]] of each."""
    test = read_json(tests)["retrieval"]
    items, _ = read_test(
        "retrieval",
        tests.parent / test["file"],
        tests.parent / test.get("images", "."),
        test.get("split", "test"),
    )
    paths = [path for path, _ in items]
    images = embeddings.images(paths)
    found = []
    for own_path, own_captions in items:
        if len(found) == captions:
            break
        if not own_captions:
            continue
        text = embeddings.texts(own_captions[:1])[0]
        best = (images @ text).topk(min(pictures, len(items)))
        row = []
        for score, index in zip(best.values.tolist(), best.indices.tolist()):
            row.append([str(paths[index]), paths[index] == own_path, f"{score:.2f}"])
        found.append([own_captions[0], row])
    return found


# ---- How results are shown


def table_columns(tables: dict) -> dict[str, float]:
    """The columns of the printed table, as far as they were measured."""
    recalls = tables.get("retrieval", {})
    files = tables.get("sugarcrepe", {})
    pairs = tables.get("winoground", {})
    words = tables.get("captioning", {})
    columns = {
        "T2I@1": recalls.get("t2i_r1"),
        "T2I@10": recalls.get("t2i_r10"),
        "I2T@1": recalls.get("i2t_r1"),
        "I2T@10": recalls.get("i2t_r10"),
        "replace": mean_of_files(files, "replace"),
        "swap": mean_of_files(files, "swap"),
        "add": mean_of_files(files, "add"),
        "wino text": pairs.get("text"),
        "wino image": pairs.get("image"),
        "wino group": pairs.get("group"),
        "tokens": words.get("token_accuracy"),
        "attributes": words.get("attributes"),
        "objects": words.get("objects"),
        # By the plain question; a model without adapters is always asked that one.
        "described": words.get("describe_attributes", words.get("attributes")),
    }
    return {name: value for name, value in columns.items() if value is not None}


def mean_of_files(files: dict[str, float], group: str) -> float | None:
    """The mean of SugarCrepe's files of a group, as papers give it; None where there are none."""
    values = [value for name, value in files.items() if name.startswith(group)]
    return sum(values) / len(values) if values else None


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Rows of `table_columns` under each other. Rows called "difference" show their signs."""
    widths = {}  # of the columns, in the order in which rows name them
    for row in rows.values():
        for name in row:
            widths[name] = max(6, len(name))
    label_width = max(len(label) for label in rows)
    header = [f"{name:>{width}}" for name, width in widths.items()]
    print(" " * label_width, *header)
    for label, row in rows.items():
        sign = "+" if label.startswith("difference") else ""
        cells = []
        for name, width in widths.items():
            cell = f"{row[name]:{sign}.1f}" if name in row else "-"
            cells.append(f"{cell:>{width}}")
        print(f"{label:<{label_width}}", *cells)


def paper_rows(table: str = "ablation") -> dict[str, dict[str, float]]:
    """The paper's own numbers: of a data set, or of its ablation (table 4)."""
    tables = read_json(ROOT / "docs" / "paper.json")
    return {f"paper: {name}": row for name, row in tables[table].items()}


def in_words(difference: dict[str, float]) -> list[str]:
    """What became better, what worse, and what the paper's full recipe did to its own model."""
    better = []
    worse = []
    for name, change in difference.items():
        if change >= 0.05:  # what the table shows as a change
            better.append(f"{name} {change:+.1f}")
        elif change <= -0.05:
            worse.append(f"{name} {change:+.1f}")
    lines = [
        f"Better: {', '.join(better) or 'nothing'}.",
        f"Worse: {', '.join(worse) or 'nothing'}.",
    ]
    rows = list(paper_rows().values())
    untrained = rows[0]
    full = rows[-1]
    changes = [f"{name} {full[name] - untrained[name]:+.1f}" for name in full if name in difference]
    if changes:
        lines.append(f"The paper's full recipe, on LLaVA-1.5-7B: {', '.join(changes)}.")
    return lines


# ---- What the options name, opened; for the scripts in examples/ too


def open_embedder(args: argparse.Namespace) -> Embedder:
    """The model that the options ask for. Raises InputError."""
    image_prompt = getattr(args, "image_prompt", None)
    text_prompt = getattr(args, "text_prompt", None)
    max_pixels = args.max_pixels or 0
    embedder = load_embedder(
        args.model, args.device, image_prompt, text_prompt, max_pixels=max_pixels
    )
    if args.no_adapters:
        # For good: this program uses no other model.
        for module in adapters(embedder.model).values():
            module.enabled = False
    return embedder


def open_embeddings(embedder: Embedder, args: argparse.Namespace) -> Embeddings:
    """What was embedded before, kept where the options say. Raises InputError."""
    if args.cache:
        return Embeddings(embedder, args.cache)
    # Never in a LLaVA folder: it is the user's, and may be read-only.
    is_run = (Path(args.model) / "checkpoints").is_dir()
    beside = Path(args.model) if is_run else Path("runs")
    return Embeddings(embedder, beside / "embeddings")


# ---- The commands of this file


def caption_command(embedder: Embedder, args: argparse.Namespace) -> None:
    """Captions, or answers, a few pictures at a time."""
    pictures = list_pictures(args.pictures)
    starts = range(0, len(pictures), args.batch)
    # Each batch is read, answered and printed before the next: the first answer comes soon.
    for start in tqdm(starts, desc="captions", disable=len(starts) < 2):
        paths = pictures[start : start + args.batch]
        images = [open_image(path) for path in paths]
        answers = caption(embedder, images, args.question, args.max_new_tokens, args.temperature)
        for path, answer in zip(paths, answers):
            tqdm.write(f"{path}: {answer}")


def captioning_command(embedder: Embedder, args: argparse.Namespace) -> None:
    """`captioning` on a training file, or on one in retrieval's formats."""
    most = f"the first {args.limit:,} records, where there are as many"
    print(f"{args.file}: {most}; --limit N takes more")
    images = args.images or args.file.parent

    def measure() -> dict[str, float]:
        return captioning(embedder, args.file, images, args.question, args.limit, cider_d)

    rows = measure_rows(embedder, measure, args.both)
    if not all("cider_d" in row for row in rows.values()):
        why = "it weighs words by how few pictures have them; here none is rarer than another"
        print(f"no CIDEr-D: {why}, take more pictures")
    if any(rows.values()):
        print_table(rows)  # the paper has no such table
    write_rows(rows, args)


def table_command(embedder: Embedder, args: argparse.Namespace) -> None:
    """One of METRICS on its authors' files, the paper's rows below."""
    name = args.command
    images = args.images
    if images is None:
        images = args.file if args.file.is_dir() else args.file.parent
    left_out = LeftOut()
    items, sizes = read_test(
        name, args.file, images, args.split, args.captions_per_image, args.classes, left_out
    )
    tell(args.file, left_out)
    # Said first: on fewer items the paper's numbers below mean nothing.
    dataset = print_sizes(name, args.file, sizes)

    def measure() -> dict[str, float]:
        # Opened anew each time: with --both the base model has embeddings of its own.
        embeddings = open_embeddings(embedder, args)
        if name == "imagenet":
            return imagenet(embeddings, items, args.template)
        return METRICS[name](embeddings, items)

    rows = measure_rows(embedder, measure, args.both)
    domains = read_domains(args.file, images) if name == "retrieval" else {}
    if domains:
        rows = both_protocols(rows, embedder, items, domains, args)
    print_table({**rows, **paper_rows(dataset)})
    write_rows(rows, args)
    if name == "sugarcrepe":
        print_means(rows["this model"], sizes)


def both_protocols(
    rows: dict[str, dict],
    embedder: Embedder,
    items: list,
    domains: dict[Path, str],
    args: argparse.Namespace,
) -> dict[str, dict]:
    """nocaps is reported in two ways, of which papers do not say which is theirs: all pictures
    compete, as in the rows given, or only those of one domain, and the mean over the domains."""

    def measure() -> dict[str, float]:
        return retrieval_by_domain(open_embeddings(embedder, args), items, domains)

    named = {f"{name}, all compete": row for name, row in rows.items()}
    number = len(set(domains.values()))
    for name, row in measure_rows(embedder, measure, args.both).items():
        named[f"{name}, mean of {number} domains"] = row
    return named


def print_sizes(name: str, file: Path, sizes: tuple[int, ...]) -> str:
    """Say how much there is, and whether as much as was published -> the data set's name."""
    published = SIZES[name]
    dataset = published.get(sizes)
    if dataset is not None:
        known = f"as many as in {dataset}"
    else:
        known = f"NOT as published: {list(published)}"
        dataset = next(iter(published.values()))
    count = " + ".join(f"{size:,}" for size in sizes)
    print(f"{file}: {count} items, {known}; the paper's rows: on {dataset}")
    return dataset


def print_means(row: dict[str, float], sizes: tuple[int, ...]) -> None:
    """The means of SugarCrepe's files: by group as papers give them, of all files, of all items."""
    means = table_columns({"sugarcrepe": row})
    means["all files"] = sum(row.values()) / len(row)
    weighted = [value * size for value, size in zip(row.values(), sizes)]
    means["all items"] = sum(weighted) / sum(sizes)
    print("means: " + ", ".join(f"{key} {value:.1f}" for key, value in means.items()))


def measure_rows(embedder: Embedder, measure: Callable[[], dict], both: bool) -> dict[str, dict]:
    """What `measure` finds on the model; with `both`, before it on its base model, and the
    difference. Raises InputError."""
    rows = {}
    if both:
        if not embedder.is_adapted:
            advice = "a plain model has nothing to compare"
            raise InputError(f"--both: needs a run of train.py with its adapters; {advice}")
        with adapters_disabled(embedder.model):
            rows["base model"] = measure()
    rows["this model"] = measure()
    if both:
        base = rows["base model"]
        rows["difference"] = {key: value - base[key] for key, value in rows["this model"].items()}
    return rows


def write_rows(rows: dict[str, dict], args: argparse.Namespace) -> None:
    if args.json:
        args.json.write_text(json.dumps({args.command: rows}, indent=2) + "\n")


# ---- Arguments

# The commands that print a table of METRICS, and what --help says of them.
TABLE_COMMANDS = {
    "retrieval": (
        "Flickr30k, COCO, nocaps (Karpathy's, COCO's or BLIP's JSON): R@1, 5, 10 both ways; "
        "a tie counts as lost"
    ),
    "sugarcrepe": "its seven files: the caption must beat its negative, strictly",
    "sugarcrepe++": "its five files: ITT and TOT",
    "winoground": "its examples.jsonl: text, image and group score",
    "imagenet": "zero-shot classes of a folder of folders: top 1 and 5",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    text = "describe pictures, or answer one question about each"
    command = commands.add_parser("caption", help=text, description=text)
    pictures = "pictures, or folders of pictures"
    command.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE", help=pictures)
    add_answer_options(command, DESCRIBE)
    add_model_options(command, TOY_MODEL)
    command.set_defaults(function=caption_command, json=None)

    for name, text in TABLE_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_table_options(command, name)
        command.set_defaults(function=table_command)

    text = "long captions' tokens predicted right (our training format), "
    text += "CIDEr-D (that, or retrieval's formats)"
    command = commands.add_parser("captioning", help=text, description=text)
    add_file_options(command)
    add_images_option(command)
    command.add_argument("--question", help="what to ask, as for caption")
    limit = "records, from the first on (256)"
    command.add_argument("--limit", type=positive, default=256, metavar="N", help=limit)
    add_model_options(command, TOY_MODEL)
    command.set_defaults(function=captioning_command)
    return parser


def add_table_options(command: argparse.ArgumentParser, name: str) -> None:
    """The options of all TABLE_COMMANDS, and those of the one of this name."""
    add_file_options(command)
    add_model_options(command, TOY_MODEL)
    add_prompt_options(command)
    add_cache_option(command)
    # `table_command` asks for these of every test, but only some have them as options.
    command.set_defaults(images=None, split="test", captions_per_image=None, classes=None)
    if name != "imagenet":
        add_images_option(command)
    if name == "retrieval":
        some = "the first N only; 5 makes COCO's 25,010 25,000"
        command.add_argument("--split", default="test", help="Karpathy's split (test)")
        command.add_argument("--captions_per_image", type=positive, metavar="N", help=some)
    if name == "imagenet":
        names = "names in the order of the folders, one a line, or JSON"
        template = '"a photo of a {}.", can be repeated (CLIP\'s 80)'
        command.add_argument("--classes", type=Path, metavar="FILE", help=names)
        command.add_argument("--template", action="append", metavar="TEXT", help=template)


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    with errors_in_one_line():
        check_parent(args.json)
        embedder = open_embedder(args)
        args.function(embedder, args)


if __name__ == "__main__":
    main()
