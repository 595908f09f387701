"""A run of train.py as one Hugging Face folder that other programs open without code of ours.

    python -m examples.export runs/mine mine
    python -m examples.export runs/mine mine --dtype bfloat16 --sentence-transformers

LoRA is folded into the weights. The prompts' embeddings, learned or hand-written, become rows of
the embedding table, and special tokens <image_prompt_0>, ... of the tokenizer. So plain
transformers embeds and captions: behind `USER: <image><image_prompt_0>...`, the hidden state of
the last token at unit length is the embedding, and generation gives a caption. README.md of the
folder says it exactly; `--sentence-transformers` adds the small files with which
SentenceTransformer(folder) encodes pictures and texts.

The folder holds: the weights, under transformers' oldest names; config, generation_config; the
base model's processor, tokenizer, chat template and licence files; prompts.json; README.md.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from eval import ROOT, Embedder, load_embedder, table_columns
from formats.files import InputError, read_json
from lora import SoftPrompt, merge_lora
from runtime.terminal import errors_in_one_line

# What is copied from the base model: processor, tokenizer, licence. Not tokenizer.model, which
# would lack the prompts.
COPIED = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class PromptTokens:
    """The special tokens that stand for the two prompts: names and, in the same order, ids."""

    image: list[str]
    text: list[str]
    ids: list[int]

    @property
    def by_name(self) -> dict[str, int]:
        return dict(zip(self.image + self.text, self.ids))


def export(
    run_folder: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    sentence_transformers: bool = False,
) -> None:
    """Write the folder. Without a dtype the weights keep that of the base model's config.

    Raises InputError for what is not a run, and where `out` holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; choose a new folder")
    settings = read_json(run_folder / "config.json")
    if not (run_folder / "checkpoints").is_dir() or not isinstance(settings.get("model"), str):
        raise InputError(f"{run_folder}: not a run of train.py")
    base = Path(settings["model"])
    if not base.is_dir():
        base = ROOT / base  # toy/tiny-llava is found from anywhere
    if dtype is None:
        dtype = dtype_of_base(base)
    embedder = load_embedder(run_folder, "cpu", dtype=dtype)
    model = embedder.model
    keys = model.config.processor_keys()  # some backbones refuse here
    merge_lora(model)

    tokens = name_prompts(embedder)
    vocabulary = model.config.text.vocab_size  # before it grows
    add_rows(embedder, tokens.ids)
    model.save_pretrained(out)

    for pattern in COPIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
    add_tokens(out, tokens.by_name)
    # Ids in the table's spare rows need no ban: the head was trained never to say those.
    write_generation_config(out, base, [index for index in tokens.ids if index >= vocabulary])
    write_processor_config(out, embedder, keys)
    prompts = prompts_in_words(embedder, tokens)
    write_json(out / "prompts.json", prompts)
    card = model_card(run_folder, settings, prompts)
    (out / "README.md").write_text(card, encoding="utf-8")
    if sentence_transformers:
        write_sentence_transformers(out, prompts, model.config.text.hidden_size)


def dtype_of_base(base: Path) -> torch.dtype:
    """What the base model's config.json says; fp32 where it says nothing known."""
    config = read_json(base / "config.json")
    name = config.get("torch_dtype") or config.get("dtype")  # transformers' old key, and its new
    return DTYPES.get(name, torch.float32)


# ---- The prompts as tokens, in the weights and in the tokenizer's files


def name_prompts(embedder: Embedder) -> PromptTokens:
    """Names and ids, behind all of the tokenizer's, for the tokens of both prompts."""
    known = embedder.tokenizer.tokenizer.get_vocab()
    first_id = max(known.values()) + 1
    # Where the base model was such an export itself, these names are taken: large numbers are not.
    start = first_id if "<image_prompt_0>" in known else 0
    layout = embedder.layout
    image = [f"<image_prompt_{start + place}>" for place in range(len(layout.image_prompt))]
    text = [f"<text_prompt_{start + place}>" for place in range(len(layout.text_prompt))]
    ids = range(first_id, first_id + len(image) + len(text))
    return PromptTokens(image, text, list(ids))


def prompts_in_words(embedder: Embedder, tokens: PromptTokens) -> dict[str, str]:
    """What stands in a text for transformers: an image's part, and a text's with {text} in it."""
    template = embedder.layout.template
    image = "".join(tokens.image)
    text = "".join(tokens.text)
    return {
        "image": f"{template.first_turn}{image}",
        "text": f"{template.begin}{template.user}{{text}}{text}",
    }


def add_rows(embedder: Embedder, ids: list[int]) -> None:
    """Put the prompts' embeddings into the rows `ids` of the table, which grows where it must.

    The head grows too and is untied. There the new rows repeat the image token's, so that no new
    token is likelier than a token that is never said."""
    model = embedder.model
    embedding = model.language_model.embed_tokens
    table = embedding.weight.detach()  # (V, D)
    head = model.lm_head.weight.detach()  # (V, D)
    if isinstance(embedding, SoftPrompt):
        prompts = torch.cat([embedding.image, embedding.text]).detach().to(table.dtype)
    else:
        prompts = table[embedder.layout.prompt_ids]
    # LLaVA's tables are padded: often there are rows enough.
    missing = max(ids) + 1 - len(table)
    if missing > 0:
        table = torch.cat([table, table.new_zeros(missing, table.shape[1])])
        image_row = head[embedder.layout.image_id]
        head = torch.cat([head, image_row.expand(missing, -1)])
    table = table.clone()
    table[ids] = prompts
    model.language_model.embed_tokens = nn.Embedding.from_pretrained(table)
    vocabulary, dimension = head.shape
    # "meta" allocates nothing: the weight is there already.
    model.lm_head = nn.Linear(dimension, vocabulary, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(head.clone())
    model.config.text.vocab_size = vocabulary
    model.config.text.tie_word_embeddings = False


def add_tokens(out: Path, tokens: dict[str, int]) -> None:
    """Make them special tokens in every file that lists such."""
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    files = {}
    for path in out.glob("*.json"):
        if path.name.startswith(("token", "special", "added")):
            files[path.name] = read_json(path)
    for name, index in tokens.items():
        token = {"id": index, "content": name, **flags}
        files["tokenizer.json"]["added_tokens"].append(token)
    if "added_tokens.json" in files:
        files["added_tokens.json"].update(tokens)
    config = files.setdefault("tokenizer_config.json", {})
    # This class takes tokenizer.json as it stands; others build it again from other files.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "added_tokens_decoder" in config:
        for name, index in tokens.items():
            config["added_tokens_decoder"][str(index)] = {"content": name, **flags}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if "additional_special_tokens" in files.get(file, {}):
            files[file]["additional_special_tokens"] += list(tokens)
    for file, content in files.items():
        write_json(out / file, content)


# ---- Settings of transformers and sentence-transformers


def write_generation_config(out: Path, base: Path, never: list[int]) -> None:
    """The base model's generation_config.json, with tokens that are `never` to be said."""
    settings = {}
    if (base / "generation_config.json").exists():
        settings = read_json(base / "generation_config.json")
    settings.update(read_json(out / "generation_config.json"))  # what save_pretrained wrote
    # With this key transformers would take the file for a guess of its own, and make a new one.
    settings.pop("_from_model_config", None)
    if never:
        settings["suppress_tokens"] = never
    write_json(out / "generation_config.json", settings)


def write_processor_config(out: Path, embedder: Embedder, keys: dict) -> None:
    """The two files of transformers' processor, made to follow from config.json and from how
    pictures were prepared here: released files say otherwise."""
    path = out / "processor_config.json"
    processor = read_json(path) if path.exists() else {}
    processor.update(keys)
    if "image_token" in processor:
        processor["image_token"] = embedder.layout.template.image_token
    images = out / "preprocessor_config.json"
    if images.exists():
        write_json(images, {**read_json(images), **embedder.processor.changes})
    elif "image_processor" in processor:  # newer files hold it inside
        processor["image_processor"].update(embedder.processor.changes)
    write_json(path, processor)


def write_sentence_transformers(out: Path, prompts: dict[str, str], dimension: int) -> None:
    """What SentenceTransformer(out) reads: modules of its own only, and a chat template that puts
    pictures and texts into their prompts."""
    write_json(
        out / "modules.json",
        [
            module(0, "", "Transformer"),
            module(1, "1_Pooling", "Pooling"),
            module(2, "2_Normalize", "Normalize"),
        ],
    )
    text = prompts["text"].replace("{text}", "{{ part['text'] | trim }}")
    template = "{%- for message in messages %}{% for part in message['content'] %}"
    template += "{% if part['type'] == 'image' %}" + prompts["image"]
    template += "{% else %}" + text
    template += "{% endif %}{% endfor %}{% endfor %}"
    method = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": method,
            "image": method,
            "message": {**method, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processor_kwargs": {"backend": "pil"},  # torchvision, where it is, would be preferred
        "processing_kwargs": {"chat_template": {"chat_template": template}},
    }
    write_json(out / "sentence_bert_config.json", transformer)
    similarity = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(out / "config_sentence_transformers.json", similarity)
    (out / "1_Pooling").mkdir()
    (out / "2_Normalize").mkdir()
    pooling = {
        "word_embedding_dimension": dimension,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
    }
    write_json(out / "1_Pooling" / "config.json", pooling)


def module(index: int, path: str, name: str) -> dict:
    """An entry of modules.json."""
    kind = f"sentence_transformers.models.{name}"
    return {"idx": index, "name": str(index), "path": path, "type": kind}


def write_json(path: Path, content: dict | list) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


# ---- The folder's README.md

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [embeddings, image-text-retrieval, vladva]
---
# {name}

{base} fine-tuned into an embedding model that still captions, by
[VladVA](https://arxiv.org/abs/2412.04378)'s recipe, with nanoVladVA. The license of {base} holds
for this folder too.

## Embeddings

The hidden state of the last token, at unit length; the dot product of two is their cosine
similarity. The prompts are:

| | |
|---|---|
| an image | `{image}` |
| a text, without white space at its ends | `{text}` |

```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, image = ".", Image.open("photo.jpg").convert("RGB")  # this folder, any picture
model = AutoModelForImageTextToText.from_pretrained(folder)
# As in training; torchvision resizes otherwise.
processor = AutoProcessor.from_pretrained(folder, backend="pil")
inputs = processor(images=image, text="{image}", return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]  # (1, T, D)
embedding = torch.nn.functional.normalize(hidden[0, -1], dim=-1)
```

A text goes the same way, with its prompt and without `images`. Several rows are padded on the
left, so that the last token is the last position. A text must not hold the name of a special
token, such as `<image>`. `model.generate(**inputs, max_new_tokens=256)` on the same inputs
captions the image (transformers' default stops after 20 tokens). Where the folder has a
modules.json, `SentenceTransformer(folder).encode([image, "a text"])` gives the same vectors.

## Recipe

{recipe}

## Results

{results}
"""


def model_card(run_folder: Path, settings: dict, prompts: dict[str, str]) -> str:
    return CARD.format(
        name=run_folder.name,
        base=Path(settings["model"]).name,
        image=prompts["image"],
        text=prompts["text"],
        recipe=recipe_table(settings),
        results=results_table(run_folder, settings),
    )


def recipe_table(settings: dict) -> str:
    """The run's settings in Markdown, without what says where on a disk something stood."""
    lines = ["| setting | value |", "|---|---|"]
    for key, value in settings.items():
        if key in ("out", "device", "workers"):
            continue
        if key in ("model", "data", "tests", "image_root") and value:
            value = Path(value).name
        lines.append(f"| {key} | {value} |")
    return "\n".join(lines)


def results_table(run_folder: Path, settings: dict) -> str:
    """The run's tables before and after training, in Markdown."""
    path = run_folder / "results.json"
    tables = read_json(path) if path.exists() else {}
    if not tables.get("after"):
        return "None were measured."
    rows = {}
    for name in ("before", "after"):
        if tables.get(name):
            rows[name] = table_columns(tables[name])
    columns = list(rows["after"])
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = []
        for column in columns:
            cells.append(f"{row[column]:.1f}" if column in row else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    tests = Path(settings.get("tests") or "toy/data/test").name
    return f"On the tests of `{tests}`, in percent:\n\n" + "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dtype = "of the weights (default: what the base model's config.json says)"
    files = "also the files of SentenceTransformer(OUT)"
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new")
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    parser.add_argument("--sentence-transformers", action="store_true", help=files)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        export(args.run, args.out, DTYPES.get(args.dtype), args.sentence_transformers)
        print(f"{args.out}: written; its README.md says how to use it")


if __name__ == "__main__":
    main()
