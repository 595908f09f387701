"""examples/export.py: the exported folder in plain transformers and sentence-transformers against
ours."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_json
from PIL import Image
from test_data import tiny_qwen

import train
from eval import TOY_MODEL, caption, encode_image, encode_text, load_embedder, open_image
from examples.export import export, main
from formats.files import InputError
from lora import LoRAConfig, add_lora, add_soft_prompts, freeze, save_adapter, trainable_parameters

TEXTS = [
    "A red ring left of a blue star.",
    "a star",
    "  There are two objects on a gray background. ",
    "é 12",
]


@pytest.fixture(scope="module")
def pictures(small_world):
    return [
        open_image(path) for path in sorted((small_world / "images" / "test").glob("*.png"))[:5]
    ]


@pytest.fixture(scope="module", params=["soft prompts", "LoRA alone", "int8"])
def trained(request, small_world, tmp_path_factory):
    """A run of a few steps, with all kinds of what it may hold."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = [
        "--data",
        str(small_world / "train.jsonl"),
        "--out",
        str(out),
        "--steps",
        "3",
        "--batch_size",
        "12",
    ]
    settings += [
        "--warmup",
        "0",
        "--device",
        "cpu",
        "--tests",
        str(small_world / "test" / "tests.json"),
    ]
    settings += {"soft prompts": [], "LoRA alone": ["--no-soft_prompts"], "int8": ["--int8"]}[
        request.param
    ]
    train.main(settings)
    return out


class Transformers:
    """An exported folder, used as its README.md says."""

    def __init__(self, folder):
        transformers = pytest.importorskip("transformers")
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        self.processor.tokenizer.padding_side = "left"
        self.prompts = json.loads((folder / "prompts.json").read_text())

    @torch.no_grad()
    def embed(self, inputs):
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1]
        return F.normalize(hidden[:, -1], dim=-1)

    def image_inputs(self, images):
        return self.processor(
            images=images, text=[self.prompts["image"]] * len(images), return_tensors="pt"
        )

    def images(self, images):
        return self.embed(self.image_inputs(images))

    def texts(self, texts):
        texts = [self.prompts["text"].replace("{text}", text.strip()) for text in texts]
        return self.embed(self.processor(text=texts, padding=True, return_tensors="pt"))

    def captions(self, images, length):
        inputs = self.image_inputs(images)
        ids = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        return [
            self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids
        ]


def test_transformers_embeds_and_captions_like_us(trained, pictures, tmp_path):
    """Images, texts and captions from the export and plain transformers: vectors within 1e-4, the
    same words."""
    export(trained, tmp_path / "out")
    ours, theirs = load_embedder(trained, "cpu"), Transformers(tmp_path / "out")
    assert (theirs.images(pictures) - encode_image(ours, pictures)).abs().max() < 1e-4
    assert (theirs.texts(TEXTS) - encode_text(ours, TEXTS)).abs().max() < 1e-4
    assert theirs.captions(pictures, 40) == caption(ours, pictures, max_new_tokens=40)
    head, vocabulary = theirs.model.lm_head.weight, ours.model.config.text.vocab_size
    new = head[
        vocabulary:
    ]  # no token of the prompts is likelier to be said than the image token, which never is
    assert len(new) == len(ours.layout.prompt_ids) and (new == head[ours.layout.image_id]).all()
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        theirs.prompts["image"] in card and theirs.prompts["text"] in card and "| T2I@1 |" in card
    )
    assert "| steps | 3 |" in card and str(trained.parent) not in card


def test_sentence_transformers_encodes_like_us(trained, pictures, tmp_path):
    """SentenceTransformer(folder) on pictures and texts, alone and mixed, without code of ours:
    within 1e-4."""
    package = pytest.importorskip("sentence_transformers")
    main([str(trained), str(tmp_path / "out"), "--sentence-transformers"])
    ours, theirs = (
        load_embedder(trained, "cpu"),
        package.SentenceTransformer(str(tmp_path / "out"), device="cpu"),
    )
    images, texts = encode_image(ours, pictures), encode_text(ours, TEXTS)
    assert (theirs.encode(pictures, convert_to_tensor=True) - images).abs().max() < 1e-4
    assert (theirs.encode(TEXTS, convert_to_tensor=True) - texts).abs().max() < 1e-4
    mixed = theirs.encode([TEXTS[0], pictures[0], TEXTS[1]], convert_to_tensor=True)
    assert (mixed - torch.stack([texts[0], images[0], texts[1]])).abs().max() < 1e-4
    assert (theirs.similarity(mixed, mixed).diagonal() - 1).abs().max() < 1e-5


@pytest.fixture
def random_run(make_checkpoint, tmp_path, monkeypatch):
    """A factory of runs on tiny random checkpoints, with the toy's or another tokenizer in it, and
    random adapters."""

    def make(tokenizer=TOY_MODEL, ids=(3, 4), vocabulary=450, **options):
        options = {"text_config": {"vocab_size": vocabulary}} | options
        folder, _ = make_checkpoint(image_token_index=ids[0], pad_token_id=ids[1], **options)
        for path in [
            *tokenizer.glob("token*.json"),
            *tokenizer.glob("special*.json"),
            *tokenizer.glob("added*.json"),
        ]:
            shutil.copyfile(path, folder / path.name)
        shutil.copyfile(TOY_MODEL / "preprocessor_config.json", folder / "preprocessor_config.json")
        edit_json(
            folder / "preprocessor_config.json",
            {"size": {"height": 30, "width": 30}, "do_center_crop": False},
        )
        shutil.copyfile(
            TOY_MODEL / "processor_config.json", folder / "processor_config.json"
        )  # wrong: patches of 12
        embedder = load_embedder(folder, "cpu")
        freeze(embedder.model)
        add_lora(embedder.model, LoRAConfig(4, 6))
        add_soft_prompts(embedder.model, embedder.layout.image_prompt, embedder.layout.text_prompt)
        with torch.no_grad():
            for parameter in trainable_parameters(embedder.model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        out = tmp_path / "run"
        save_adapter(embedder.model, out / "checkpoints" / "step-1", embedder.notes)
        (out / "checkpoints" / "latest").write_text("step-1\n")
        image, text = embedder.layout.prompt_texts
        settings = {"model": str(folder), "image_prompt": image, "text_prompt": text}
        (out / "config.json").write_text(json.dumps(settings))
        return out

    return make


def agree(run_folder, tmp_path, tokens=12):
    images = [
        Image.effect_noise((40, 30), 90).convert("RGB").point(lambda v, s=s: v * s % 256)
        for s in (1, 3)
    ]
    export(run_folder, tmp_path / "out")
    ours, theirs = load_embedder(run_folder, "cpu"), Transformers(tmp_path / "out")
    assert (theirs.images(images) - encode_image(ours, images)).abs().max() < 1e-4
    assert (theirs.texts(TEXTS) - encode_text(ours, TEXTS)).abs().max() < 1e-4
    prompt = [ours.layout.image_side()] * len(images)
    generated = ours.model.generate(prompt, ours.pixel_values(images), tokens)
    inputs = theirs.image_inputs(images)
    ids = theirs.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert [row[: len(answer)] for row, answer in zip(ids.tolist(), generated)] == generated
    return ours, theirs


@pytest.mark.parametrize(
    "vision,text,tied",
    [("clip", "llama", False), ("siglip", "qwen2", True), ("clip", "llama", True)],
)
def test_random_checkpoints(random_run, tmp_path, vision, text, tied):
    """Either family, tied and untied heads: the table grows, and the old logits stay where they
    were."""
    strategy = "full" if vision == "siglip" else "default"
    options = {
        "text_config": {"vocab_size": 450, "tie_word_embeddings": tied},
        "tie_word_embeddings": tied,
    }
    ours, theirs = agree(
        random_run(vision=vision, text=text, vision_feature_select_strategy=strategy, **options),
        tmp_path,
    )
    count = len(ours.layout.prompt_ids)
    assert theirs.model.lm_head.weight.shape[0] == 450 + count
    assert theirs.model.generation_config.suppress_tokens == list(range(450, 450 + count))
    assert (
        tied == ours.model.config.text.tie_word_embeddings
        and not theirs.model.config.tie_word_embeddings
    )


def test_real_tokenizer_and_padded_vocabulary(random_run, real_file, tmp_path):
    """LLaVA-1.5's own tokenizer: the prompts take free rows of the padded table, which does not
    grow."""
    files = real_file("llava-1.5-7b-hf/tokenizer.json").parent
    run = random_run(tokenizer=files, ids=(32000, 32001), vocabulary=32064)
    ours, theirs = agree(run, tmp_path)
    assert theirs.model.lm_head.weight.shape[0] == 32064
    tokenizer, layout = theirs.processor.tokenizer, ours.layout
    ids = tokenizer(theirs.prompts["text"].replace("{text}", "A dog runs.")).input_ids
    assert (
        ids[: -len(layout.text_prompt)]
        == layout.text_side("A dog runs.")[: -len(layout.text_prompt)]
    )
    assert ids[-1] == 32001 + len(layout.prompt_ids)
    added = json.loads((tmp_path / "out" / "added_tokens.json").read_text())
    assert added["<text_prompt_0>"] == 32002 + len(layout.image_prompt)
    assert tokenizer.convert_ids_to_tokens(32002) == "<image_prompt_0>"


def test_qwens_tokenizer_and_template(random_run, tmp_path):
    """ChatML, byte-level tokens, no beginning-of-text token, three spare rows in the table."""
    tokenizer, folder = tiny_qwen(), tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
    }
    config |= {
        "extra_special_tokens": {"image_token": "<image>"},
        "additional_special_tokens": ["<|im_start|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size, ids = (
        tokenizer.get_vocab_size(),
        [tokenizer.token_to_id(token) for token in ("<image>", "<|endoftext|>")],
    )
    options = {
        "vision": "siglip",
        "text": "qwen2",
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }
    ours, theirs = agree(random_run(folder, ids, size + 3, **options), tmp_path)
    assert theirs.prompts["image"].startswith("<|im_start|>user <image><image_prompt_0>")
    assert theirs.model.lm_head.weight.shape[0] == size + len(ours.layout.prompt_ids)
    exported = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert exported["additional_special_tokens"][:2] == ["<|im_start|>", "<image_prompt_0>"]


def test_a_run_on_an_export_exports_again(small_world, trained, tmp_path):
    """An exported folder is a base model for train.py; the prompts of its run get names of their
    own."""
    export(trained, tmp_path / "first")
    settings = [
        "--model",
        str(tmp_path / "first"),
        "--data",
        str(small_world / "train.jsonl"),
        "--steps",
        "1",
    ]
    train.main([*settings, "--batch_size", "4", "--device", "cpu", "--out", str(tmp_path / "run")])
    export(tmp_path / "run", tmp_path / "second")
    ours, theirs = load_embedder(tmp_path / "run", "cpu"), Transformers(tmp_path / "second")
    assert (theirs.texts(TEXTS) - encode_text(ours, TEXTS)).abs().max() < 1e-4
    assert "<image_prompt_0>" not in theirs.prompts["image"]


def test_what_cannot_be_exported_is_said(trained, tmp_path):
    """A base model has no adapters, and an existing folder is left alone."""
    with pytest.raises(InputError, match="not a run of train.py"):
        export(TOY_MODEL, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is there already"):
        main([str(trained), str(tmp_path / "full")])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
