"""A run of train.py as one Hugging Face folder that other programs open: adapters merged, prompts in the vocabulary.

    python -m examples.export runs/mine mine
    python -m examples.export runs/mine mine --dtype bfloat16 --sentence-transformers

LoRA is folded into the weights. The prompts' embeddings, learned or hand-written, become rows of the embedding table,
and special tokens <image_prompt_0>, ... of the tokenizer: plain transformers embeds and captions with them, and no code
of ours. Behind `USER: <image><image_prompt_0>...`, the hidden state of the last token at unit length is the embedding,
and generation gives a caption. README.md of the folder says it exactly; `--sentence-transformers` adds the small files
with which SentenceTransformer(folder) encodes pictures and texts.

The folder holds: the weights, under transformers' oldest names; config, generation_config; the base model's processor,
tokenizer, chat template and licence files; prompts.json; README.md.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from data import DataError, read_json
from eval import ROOT, USER_ERRORS, Run, load_run, summary
from lora import SoftPrompt, merge_lora

# What is copied from the base model: processor, tokenizer (not tokenizer.model, which would lack the prompts), licence.
COPIED = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*processor_config.json")
COPIED += ("chat_template.*", "LICENSE*", "NOTICE*", "USE_POLICY*")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(run_folder: Path, out: Path, dtype: torch.dtype | None = None, sentence_transformers: bool = False) -> None:
    """Write the folder. Without a dtype the weights keep that of the base model's config. Raises DataError and what
    `load_run` raises."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; choose a new folder")
    settings = read_json(run_folder / "config.json")
    if not (run_folder / "checkpoints").is_dir() or not isinstance(settings.get("model"), str):
        raise DataError(f"{run_folder}: not a run of train.py")
    base = Path(settings["model"]) if Path(settings["model"]).is_dir() else ROOT / settings["model"]
    config = read_json(base / "config.json")
    dtype = dtype or DTYPES.get(config.get("torch_dtype") or config.get("dtype"), torch.float32)
    run = load_run(run_folder, "cpu", dtype=dtype)
    merge_lora(run.model)

    known = run.tokenizer.tokenizer.get_vocab()
    first = max(known.values()) + 1
    start = first if "<image_prompt_0>" in known else 0  # where the base model was such an export itself
    lengths = {"image": len(run.layout.image_prompt), "text": len(run.layout.text_prompt)}
    names = {side: [f"<{side}_prompt_{start + i}>" for i in range(length)] for side, length in lengths.items()}
    tokens = {name: first + i for i, name in enumerate(names["image"] + names["text"])}
    vocabulary = run.model.config.text.vocab_size
    add_rows(run, list(tokens.values()))
    run.model.save_pretrained(out)

    for pattern in COPIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
    add_tokens(out, tokens)
    write_settings(out, base, run, [token for token in tokens.values() if token >= vocabulary])
    user, image, text = run.layout.template.user, "".join(names["image"]), "".join(names["text"])
    prompts = {"image": f"{user}<image>{image}", "text": f"{user}{{text}}{text}"}
    write_json(out / "prompts.json", prompts)
    (out / "README.md").write_text(model_card(run_folder, settings, prompts), encoding="utf-8")
    if sentence_transformers:
        write_sentence_transformers(out, prompts, run.model.config.text.hidden_size)


def add_rows(run: Run, ids: list[int]) -> None:
    """Put the prompts' embeddings into the rows `ids` of the table, which grows where it must. The head grows too and
    is untied: there the new rows repeat the image token's, so that no new token is likelier than a token never said."""
    model, embedding = run.model, run.model.language_model.embed_tokens
    if isinstance(embedding, SoftPrompt):
        prompts = torch.cat([embedding.image, embedding.text]).detach().to(embedding.weight.dtype)
    else:
        prompts = embedding.weight.detach()[run.layout.prompt_ids]
    table, head = embedding.weight.detach(), model.lm_head.weight.detach()
    missing = max(ids) + 1 - len(table)
    if missing > 0:
        table = torch.cat([table, table.new_zeros(missing, table.shape[1])])
        head = torch.cat([head, head[run.layout.image_id].expand(missing, -1)])
    table = table.clone()
    table[ids] = prompts
    model.language_model.embed_tokens = nn.Embedding.from_pretrained(table)
    model.lm_head = nn.Linear(*head.shape[::-1], bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(head.clone())
    model.config.text.vocab_size, model.config.text.tie_word_embeddings = len(table), False


def add_tokens(out: Path, tokens: dict[str, int]) -> None:
    """Make them special tokens in every file that lists such."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    files = {
        path.name: read_json(path) for path in out.glob("*.json") if path.name.startswith(("token", "special", "added"))
    }
    files["tokenizer.json"]["added_tokens"] += [{"id": i, "content": name} | flags for name, i in tokens.items()]
    if "added_tokens.json" in files:
        files["added_tokens.json"] |= tokens
    config = files.setdefault("tokenizer_config.json", {})
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # tokenizer.json as it stands; other classes rebuild it
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(i): {"content": name} | flags for name, i in tokens.items()}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if "additional_special_tokens" in files.get(name, {}):
            files[name]["additional_special_tokens"] += list(tokens)
    for name, content in files.items():
        write_json(out / name, content)


def write_settings(out: Path, base: Path, run: Run, never: list[int]) -> None:
    """generation_config.json, with tokens that are `never` to be said, and processor_config.json, whose number of image
    tokens is made to follow from config.json (released files had it wrong)."""
    old, config = base / "generation_config.json", run.model.config
    settings = (read_json(old) if old.exists() else {}) | read_json(out / "generation_config.json")
    settings.pop("_from_model_config", None)
    write_json(out / "generation_config.json", settings | ({"suppress_tokens": never} if never else {}))
    path = out / "processor_config.json"
    processor = read_json(path) if path.exists() else {"processor_class": "LlavaProcessor", "image_token": "<image>"}
    processor |= {"patch_size": config.vision.patch_size, "num_additional_image_tokens": int(config.vision.is_clip)}
    processor |= {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    write_json(path, processor)


def write_sentence_transformers(out: Path, prompts: dict[str, str], dimension: int) -> None:
    """What SentenceTransformer(out) reads: its own modules only, and a template that tells pictures from texts."""
    image, text = prompts["image"], prompts["text"].replace("{text}", "{{ part['text'] | trim }}")
    template = "{%- for message in messages %}{% for part in message['content'] %}"
    template += "{% if part['type'] == 'image' %}" + image + "{% else %}" + text + "{% endif %}{% endfor %}{% endfor %}"
    method = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": method, "image": method, "message": method | {"format": "structured"}},
        "module_output_name": "token_embeddings",
        "processor_kwargs": {"backend": "pil"},  # where torchvision is installed, it would be preferred
        "processing_kwargs": {"chat_template": {"chat_template": template}},
    }
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    kinds = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules.items())
    ]
    write_json(out / "modules.json", kinds)
    write_json(out / "sentence_bert_config.json", transformer)
    write_json(
        out / "config_sentence_transformers.json", {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    )
    (out / "2_Normalize").mkdir()
    (out / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": dimension, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    write_json(out / "1_Pooling" / "config.json", pooling)


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


CARD = '''---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, embeddings, image-text-retrieval, vladva]
---
# {name}

{base} fine-tuned into an embedding model that still captions, by [VladVA](https://arxiv.org/abs/2412.04378)'s recipe,
with nanoVladVA. The license of {base} holds for this folder too.

## Embeddings

The hidden state of the last token, at unit length; the dot product of two is their cosine similarity. The prompts are:

| | |
|---|---|
| an image | `{image}` |
| a text, without white space at its ends | `{text}` |

```python
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder, image = ".", Image.open("photo.jpg").convert("RGB")  # this folder, any picture
model = LlavaForConditionalGeneration.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder, backend="pil")  # as in training; torchvision resizes otherwise
inputs = processor(images=image, text="{image}", return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]  # (1, T, D)
embedding = torch.nn.functional.normalize(hidden[0, -1], dim=-1)
```

A text goes the same way, with its prompt and without `images`. Several rows are padded on the left, so that the last
token is the last position. A text must not hold the name of a special token, such as `<image>`.
`model.generate(**inputs, max_new_tokens=256)` on the same inputs captions the image (transformers' default stops after
20 tokens). Where the folder has a modules.json, `SentenceTransformer(folder).encode([image, "a text"])` gives the same
vectors.

## Recipe

{recipe}

## Results

{results}
'''  # fmt: skip


def model_card(run_folder: Path, settings: dict, prompts: dict[str, str]) -> str:
    base = Path(settings["model"]).name
    recipe = "| setting | value |\n|---|---|\n" + "\n".join(
        f"| {key} | {Path(value).name if key in ('model', 'data', 'tests', 'image_root') and value else value} |"
        for key, value in settings.items()
        if key not in ("out", "device", "workers")
    )
    path, results = run_folder / "results.json", "None were measured."
    tables = read_json(path) if path.exists() else {}
    if tables.get("after"):
        rows = {name: summary(tables[name]) for name in ("before", "after") if tables.get(name)}
        columns = list(rows["after"])
        results = f"On the tests of `{Path(settings.get('tests') or 'toy/data/test').name}`, in percent:\n\n"
        results += f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n" + "\n".join(
            f"| {name} | {' | '.join(f'{row[c]:.1f}' if c in row else '-' for c in columns)} |"
            for name, row in rows.items()
        )
    return CARD.format(name=run_folder.name, base=base, recipe=recipe, results=results, **prompts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: what the base model's config.json says)"
    )
    parser.add_argument(
        "--sentence-transformers", action="store_true", help="also the files of SentenceTransformer(OUT)"
    )
    args = parser.parse_args(arguments)
    try:
        export(args.run, args.out, DTYPES.get(args.dtype), args.sentence_transformers)
        print(f"{args.out}: written; its README.md says how to use it")
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
