"""Every backbone beside LLaVA, on tiny random models that transformers saves: the same logits,
gradients, answers, training steps and adapters; and a run of train.py from beginning to export.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import CASES, difficult_pictures, pictures, write_captions
from conftest import PROJECT
from PIL import Image, ImageOps

import backbones
import eval
import train
from data import CaptionDataset, collate, empty_image_chunk, open_image, stack_images
from formats.files import InputError
from lora import (
    LoRAConfig,
    LoRALinear,
    SoftPrompt,
    adapters,
    adapters_disabled,
    add_lora,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from train import TrainConfig, add_adapters, training_step

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-4


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def made(case, tmp_path):
    """(case, folder, transformers' model, our Embedder)"""
    reference = case.make(tmp_path / "model")
    embedder = eval.load_base(tmp_path / "model", "cpu")
    return case, tmp_path / "model", reference, embedder


def rows_of(embedder, count, seed=0):
    """Prepared pictures, and a row of ids for each that ends with some random words."""
    generator = torch.Generator().manual_seed(seed)
    pixels = embedder.prepare(pictures(count))
    rows = []
    for number, image in enumerate(pixels):
        words = torch.randint(10, 250, (3 + number,), generator=generator).tolist()
        rows.append(embedder.layout.image_side(words, image))
    return rows, pixels


def reference_logits(case, reference, row, images=()):
    """transformers' logits of one row, (T, V)."""
    input_ids = torch.tensor([row])
    inputs = {"input_ids": input_ids, **case.token_types(input_ids)}
    if images:
        inputs |= case.inputs(images)
    return reference(**inputs).logits[0]


def close(ours, theirs, tolerance=TOLERANCE):
    # Biases of a tower's keys have no gradient, only its rounding: attention is blind to them.
    return (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-7


# ---- Pictures
def test_pictures_are_prepared_bit_for_bit(made, tmp_path):
    """15 shapes and modes, as transformers' PIL processor prepares them."""
    case, folder, _, embedder = made
    check_pictures(case, folder, embedder.processor, tmp_path)


def test_pictures_are_prepared_bit_for_bit_with_released_settings(case, tmp_path):
    case = case.released()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(case.preprocessor))
    (tmp_path / "config.json").write_text(json.dumps(case.released_config))
    processor = backbones.family_of(tmp_path).processor.from_pretrained(tmp_path)
    check_pictures(case, tmp_path, processor, tmp_path)


def check_pictures(case, folder, processor, tmp_path):
    oracle = case.processor(folder)
    checked = 0
    for name, path in difficult_pictures(tmp_path).items():
        upright = ImageOps.exif_transpose(Image.open(path))
        ours = processor(open_image(path))
        try:
            theirs = oracle([upright], return_tensors="pt")
        except ValueError:
            assert name in ("wide", "tall", "a line")  # too long for the oracle
            continue
        inputs = case.inputs([ours])
        for key, found in theirs.items():
            if key in inputs:
                assert torch.equal(inputs[key], found), (name, key)
        checked += 1
    assert checked >= 12


# ---- Forward and backward
def test_the_contract_is_fulfilled(made):
    """Sizes, parts and methods are there; what is read of the small files is what is loaded."""
    case, folder, _, embedder = made
    model = embedder.model
    assert isinstance(model, backbones.Backbone)
    assert isinstance(model.config, backbones.BackboneConfig)
    assert isinstance(model.config.text, backbones.TextSizes)
    assert isinstance(model.config.vision, backbones.VisionSizes)
    assert isinstance(model.language_model, backbones.LanguagePart)
    assert isinstance(model.new_cache(2), backbones.Cache)
    assert not model.training
    config = backbones.read_config(folder)
    config.eos_token_ids = model.config.eos_token_ids
    assert config == model.config


def test_logits_equal_transformers(made):
    """Pictures of different sizes in one batch, padded: each row is transformers' row alone."""
    case, _, reference, embedder = made
    model = embedder.model
    rows, pixels = rows_of(embedder, 4)
    ids = [torch.tensor(row) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    logits = model.logits(model(input_ids, stack_images(pixels)))
    for row, image, found in zip(rows, pixels, logits):
        expected = reference_logits(case, reference, row, [image])
        assert (found[: len(row)] - expected).abs().max() < TOLERANCE
    text = embedder.layout.text_side("a text without a picture")
    expected = reference_logits(case, reference, text)
    assert (model.logits(model(torch.tensor([text])))[0] - expected).abs().max() < TOLERANCE


def test_features_once_computed_serve_as_pixels_do(made):
    _, _, _, embedder = made
    model = embedder.model
    rows, pixels = rows_of(embedder, 3)
    ids = [torch.tensor(row) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    features = model.image_features(stack_images(pixels))
    with_features = model(input_ids, image_features=features)
    assert torch.equal(with_features, model(input_ids, stack_images(pixels)))


def test_gradients_equal_transformers(made):
    """Every parameter of the model: the gradient of some function of the logits."""
    case, folder, reference, embedder = made
    model = embedder.model
    rows, pixels = rows_of(embedder, 2)
    for row, image in zip(rows, pixels):
        model.logits(model(torch.tensor([row]), image[None])).logsumexp(-1).mean().backward()
        reference_logits(case, reference, row, [image]).logsumexp(-1).mean().backward()
    # Matched by the names in the file: those that the reference saved.
    stored = {name: p.grad for name, p in reference.named_parameters()}
    compared = 0
    for name, parameter in model.named_parameters():
        expected = stored[case.reference_name(name)]
        assert close(parameter.grad, expected), name
        compared += 1
    assert compared >= len([gradient for gradient in stored.values() if gradient is not None])


def test_image_tokens_and_features_must_agree(made):
    _, _, _, embedder = made
    rows, pixels = rows_of(embedder, 1)
    short = torch.tensor([rows[0]])
    short[0, embedder.layout.image_side(image=pixels[0]).index(embedder.layout.image_id)] = 5
    with pytest.raises(ValueError, match="image tokens for"):
        embedder.model(short, pixels[0][None])


# ---- Generation
def greedy(case, reference, row, images, new_tokens):
    """The ids that transformers.generate adds, without the stop token."""
    input_ids = torch.tensor([row])
    found = reference.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **case.inputs(images),
        **case.token_types(input_ids),
    )
    ids = found[0, len(row) :].tolist()
    return ids[: ids.index(case.stop_id)] if case.stop_id in ids else ids


def test_greedy_answers_equal_transformers(made):
    """64 tokens, pictures of different sizes in one batch and one by one."""
    case, _, reference, embedder = made
    model = embedder.model
    pixels = embedder.prepare(pictures(4))
    prompts = []
    for number, image in enumerate(pixels):
        prompts.append(embedder.layout.question("What is it?" * (number + 1), image))
    # None stops early, here and there: all 64 tokens are compared.
    model.config.eos_token_ids = (case.stop_id,)
    batched = model.generate(prompts, stack_images(pixels), 64)
    for prompt, image, answer in zip(prompts, pixels, batched):
        assert answer == greedy(case, reference, prompt, [image], 64)
        assert answer == model.generate([prompt], image[None], 64)[0]
    assert max(len(answer) for answer in batched) == 64


def test_a_second_turn_from_the_cache(made):
    """What was said is not computed again, and the answer is that to the whole conversation."""
    case, _, reference, embedder = made
    model = embedder.model
    layout = embedder.layout
    (image,) = embedder.prepare(pictures(4)[3:])
    cache = model.new_cache(1)
    ids = layout.question("What is it?", image)
    answer = model.generate([ids], image[None], 8, cache=cache)[0]
    ids = ids + answer + layout.next_question("And why?")
    again = model.generate([ids], None, 8, cache=cache)[0]
    assert again == model.generate([ids], image[None], 8)[0]
    assert again == greedy(case, reference, ids, [image], 8)
    # A second picture in a later turn.
    ids = ids + again + layout.question("And this?", image)
    third = model.generate([ids], image[None], 8, cache=cache)[0]
    assert third == greedy(case, reference, ids, [image, image], 8)


# ---- Training
def prepared(embedder, config, tmp_path):
    data_file = write_captions(tmp_path / "data")
    add_adapters(embedder, config)
    dataset = CaptionDataset(data_file, embedder.layout, embedder.processor)
    samples = [dataset[index, 0] for index in range(len(dataset))]
    batch = collate(samples, embedder.layout, config.micro_batch, config.caption_share)
    with torch.no_grad():  # off their start, where half of all gradients are zero
        for name, parameter in trainable_parameters(embedder.model).items():
            if name != "log_scale":
                parameter.add_(0.05 * torch.randn_like(parameter))
        embedder.model.log_scale.fill_(math.log(10.0))
    return samples, batch


@pytest.mark.parametrize("is_fast", [True, False])
def test_step_equals_transformers_and_peft(made, tmp_path, is_fast):
    """The losses and all gradients of one step, against plain forwards of transformers + peft."""
    peft = pytest.importorskip("peft")
    case, _, reference, embedder = made
    model = embedder.model
    V = model.config.text.vocab_size
    config = TrainConfig(micro_batch=3, caption_share=0.5, lora_rank=4, fast=is_fast)
    samples, batch = prepared(embedder, config, tmp_path)
    layer = type(model.language_model.layers[0]).__name__
    assert layer == ("LeanDecoderLayer" if is_fast else "DecoderLayer")
    losses = training_step(model, batch, config)
    ours = {name: p.grad for name, p in trainable_parameters(model).items()}

    # The soft prompts are rows behind the reference's vocabulary.
    soft = trainable_parameters(model)
    image_rows = soft["language_model.embed_tokens.image"]
    text_rows = soft["language_model.embed_tokens.text"]
    number = len(image_rows) + len(text_rows)
    reference.resize_token_embeddings(V + number, mean_resizing=False)
    target = rf".*{model.language_model_name}.*\.(q|k|v|o|gate|up|down)_proj"
    wrapped = peft.get_peft_model(
        reference, peft.LoraConfig(r=4, lora_alpha=16, target_modules=target)
    )
    named = {
        name.replace("base_model.model.", "").replace(".default", ""): parameter
        for name, parameter in wrapped.named_parameters()
    }
    table = reference.get_input_embeddings().weight.requires_grad_()
    with torch.no_grad():
        table[V:] = torch.cat([image_rows, text_rows])
        for name, parameter in trainable_parameters(model).items():
            if ".lora_" in name:
                named[case.reference_name(name)].copy_(parameter)

    def forward(row, images=()):
        input_ids = torch.tensor([row])
        inputs = {"input_ids": input_ids, **case.token_types(input_ids)}
        if images:
            inputs |= case.inputs(images)
        output = reference.model(**inputs)
        return output.last_hidden_state[0]

    layout = embedder.layout
    images = []
    texts = []
    total = 0.0
    count = 0
    for place, sample in enumerate(samples):
        start = len(layout.image_side(image=sample.pixel_values))
        caption = sample.long if place < len(samples) // 2 else None
        row = layout.image_side(caption, sample.pixel_values)
        hidden = forward(row, [sample.pixel_values])
        images.append(hidden[start - 1])
        texts.append(forward(layout.text_side(sample.short))[-1])
        if caption:
            logits = reference.lm_head(hidden[start - 1 : -1])[:, :V]
            labels = torch.tensor(row[start:])
            total = total + F.cross_entropy(logits, labels, reduction="sum")
            count += len(labels)
    log_scale = torch.tensor(math.log(10.0), requires_grad=True)
    images = F.normalize(torch.stack(images), dim=-1)
    texts = F.normalize(torch.stack(texts), dim=-1)
    similarity = log_scale.exp() * images @ texts.T
    own = torch.arange(len(samples))
    contrastive = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    (contrastive + total / count).backward()

    assert losses["contrastive"] == pytest.approx(contrastive.item(), rel=1e-4)
    assert losses["autoregressive"] == pytest.approx((total / count).item(), rel=1e-4)
    rows = table.grad[V:].split([len(image_rows), len(text_rows)])
    theirs = {
        "language_model.embed_tokens.image": rows[0],
        "language_model.embed_tokens.text": rows[1],
        "log_scale": log_scale.grad,
    }
    for name in ours:
        if ".lora_" in name:
            theirs[name] = named[case.reference_name(name)].grad
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 2 + 3
    for name in ours:
        assert close(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_cache": True},
        {"gradient_cache": True, "micro_batch": 1},
        {"checkpoint_layers": 1},
        {"micro_batch": 1},
    ],
    ids=str,
)
def test_ways_to_save_memory_change_nothing(made, tmp_path, change):
    results = []
    case, folder, _, _ = made
    for settings in ({}, change):
        embedder = eval.load_base(folder, "cpu")
        config = TrainConfig(**{"micro_batch": 3, "caption_share": 0.5, "lora_rank": 4} | settings)
        torch.manual_seed(1)
        _, batch = prepared(embedder, config, tmp_path)
        embedder.model.language_model.checkpoint_layers = config.checkpoint_layers
        losses = training_step(embedder.model, batch, config)
        gradients = {name: p.grad for name, p in trainable_parameters(embedder.model).items()}
        results.append((losses, gradients))
    (losses, gradients), (expected_losses, expected) = results
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name in expected:
        assert close(gradients[name], expected[name], 1e-5), name


def test_a_chunk_that_teaches_nothing(made):
    """What evens out several processes is a picture the model takes."""
    _, _, _, embedder = made
    chunk = empty_image_chunk(embedder.model.config)
    hidden = embedder.model(chunk.input_ids, chunk.pixel_values)
    assert hidden.isfinite().all() and (chunk.labels < 0).all()


def test_two_processes_with_sharded_layers(made, tmp_path):
    """torchrun with --shard: the losses of one process, with odd shares of each batch."""
    case, folder, _, _ = made
    data_file = write_captions(tmp_path / "data")
    common = ["--model", str(folder), "--data", str(data_file), "--lora_rank", "4", "--lr", "1e-3"]
    common += ["--batch_size", "7", "--micro_batch", "2", "--device", "cpu", "--steps", "2"]
    losses = []
    for name, start, more in (
        ("one", [sys.executable], []),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"], ["--shard"]),
    ):
        if more:
            start += ["--standalone"]  # it finds a free port itself
        out = tmp_path / name
        command = [*start, "train.py", *common, "--out", str(out), *more]
        subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
        lines = (out / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_other_precisions(made, kind):
    """In bf16 and in int8 it embeds, nearly as in fp32, and answers."""
    case, folder, _, embedder = made
    if kind == "int8":
        other = eval.load_base(folder, "cpu", int8=True)
    else:
        other = eval.load_base(folder, "cpu", dtype=torch.bfloat16)
    for encode, items in ((eval.encode_image, pictures(3)), (eval.encode_text, ["a", "a text"])):
        similarity = (encode(embedder, items) * encode(other, items)).sum(-1)
        assert (similarity > 0.98).all()
    assert len(eval.caption(other, pictures(2), max_new_tokens=3)) == 2


def test_a_conversation(made):
    """examples.chat: the answers are those to the whole conversation, without the cache."""
    from examples.chat import Conversation

    _, _, _, embedder = made
    picture = pictures(4)[3]
    chat = Conversation(embedder, picture, max_new_tokens=6)
    chat.ask("What is it?")
    layout = embedder.layout
    ids = chat.ids + layout.next_question("And why?")
    (image,) = embedder.prepare([picture])
    answer = embedder.model.generate([ids], image[None], 6)[0]
    assert chat.ask("And why?") == embedder.tokenizer.decode(answer)


# ---- Adapters
def test_peft_reads_ours_and_we_read_peft(made, tmp_path):
    """An adapter goes to PEFT and comes back, with the same logits on both sides."""
    peft = pytest.importorskip("peft")
    case, folder, reference, embedder = made
    rows, pixels = rows_of(embedder, 1)
    input_ids = torch.tensor([rows[0]])
    model = embedder.model
    before = model(input_ids, pixels[0][None])
    add_lora(model, LoRAConfig(rank=4))
    with torch.no_grad():
        for module in adapters(model).values():
            module.lora_B.weight.normal_(std=0.2)
    save_adapter(model, tmp_path / "ours")
    ours = model.logits(model(input_ids, pixels[0][None]))[0]
    with adapters_disabled(model):
        assert torch.equal(model(input_ids, pixels[0][None]), before)

    wrapped = peft.PeftModel.from_pretrained(reference, tmp_path / "ours")
    status = wrapped.get_model_status()
    assert status.num_adapter_layers == 2 * 7
    theirs = reference_logits(case, wrapped, rows[0], [pixels[0]])
    assert (ours - theirs).abs().max() < TOLERANCE
    assert (ours - model.logits(before)[0]).abs().max() > 10 * TOLERANCE

    wrapped.save_pretrained(tmp_path / "theirs")
    again = backbones.load(folder)
    load_adapter(again, tmp_path / "theirs", [], [])
    found = again.logits(again(input_ids, pixels[0][None]))[0]
    assert torch.equal(found, ours)
    assert sum(isinstance(m, LoRALinear) for m in again.modules()) == 2 * 7


# ---- Files
def test_saved_models_are_read_by_transformers(made, tmp_path):
    """What save_pretrained writes, in shards too, is the same model here and there."""
    case, _, reference, embedder = made
    rows, pixels = rows_of(embedder, 1)
    expected = reference_logits(case, reference, rows[0], [pixels[0]])
    embedder.model.save_pretrained(tmp_path / "saved", max_shard_bytes=100_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = backbones.load(tmp_path / "saved")
    assert again.config == embedder.model.config
    assert torch.equal(
        again(torch.tensor([rows[0]]), pixels[0][None]),
        embedder.model(torch.tensor([rows[0]]), pixels[0][None]),
    )
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(reference_logits(case, loaded, rows[0], [pixels[0]]), expected)


def test_all_faults_of_the_weights_are_listed(made):
    """Missing, unexpected and mis-shaped tensors are told in one message."""
    from conftest import edit_weights

    _, folder, _, _ = made

    def spoil(tensors):
        names = sorted(name for name in tensors if "layers.1" in name or "blocks.1" in name)
        del tensors[names[0]]
        tensors[names[1]] = torch.zeros(3)
        tensors["model.surplus.weight"] = torch.zeros(2, 2)
        spoil.names = names

    edit_weights(folder, spoil)
    with pytest.raises(InputError) as caught:
        backbones.load(folder)
    message = str(caught.value)
    assert "3 tensors do not fit" in message
    for part in ("missing:", "unexpected: model.surplus.weight", "not of shape", spoil.names[1]):
        assert part in message


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_of_its_own_or_none(case, tmp_path, is_tied):
    reference = case.make(tmp_path / "model", tie_word_embeddings=is_tied)
    embedder = eval.load_base(tmp_path / "model", "cpu")
    model = embedder.model
    assert (model.lm_head.weight is model.language_model.embed_tokens.weight) == is_tied
    rows, pixels = rows_of(embedder, 1)
    expected = reference_logits(case, reference, rows[0], [pixels[0]])
    logits = model.logits(model(torch.tensor([rows[0]]), pixels[0][None]))[0]
    assert (logits - expected).abs().max() < TOLERANCE


def test_the_table_of_what_they_need_is_what_the_estimate_says():
    from benchmarks.backbones import lines

    text = (PROJECT / "docs" / "models.md").read_text()
    assert "\n".join(lines()) in text


# ---- A run, from the beginning to what others open
def test_train_resume_table_caption_export(made, tmp_path, capsys):
    """train.py from random weights: trained, stopped and gone on with, tested, asked, exported;
    transformers opens the export and has the same embeddings."""
    from examples.export import export

    case, folder, _, _ = made
    data_file = write_captions(tmp_path / "data")
    out = tmp_path / "run"
    common = ["--model", str(folder), "--data", str(data_file), "--lora_rank", "4"]
    common += ["--batch_size", "4", "--micro_batch", "2", "--device", "cpu", "--lr", "1e-3"]
    train.main([*common, "--out", str(out), "--steps", "4", "--save_every", "2"])
    embedder = eval.load_embedder(out, "cpu")
    assert sum(isinstance(m, SoftPrompt) for m in embedder.model.modules()) == 1
    whole = eval.encode_image(embedder, pictures(3))

    # Gone on with from step 2: the same weights, bit for bit.
    (out / "checkpoints" / "latest").write_text("step-2")
    assert (out / "checkpoints" / "step-2").is_dir()
    train.main([*common, "--out", str(out), "--steps", "4", "--save_every", "2", "--resume"])
    embedder = eval.load_embedder(out, "cpu")
    assert torch.equal(eval.encode_image(embedder, pictures(3)), whole)

    # A table, a caption.
    items = []
    for number in range(3):
        items.append({"filename": f"{number}.png", "sentences": [{"raw": f"picture {number}"}]})
        items[-1] |= {"split": "test", "imgid": number, "sentids": [number]}
    (tmp_path / "data" / "test.json").write_text(json.dumps({"images": items}))
    table = tmp_path / "table.json"
    eval.main(
        [
            "retrieval",
            str(tmp_path / "data" / "test.json"),
            "--model",
            str(out),
            "--device",
            "cpu",
            "--json",
            str(table),
        ]
    )
    assert table.exists()
    answers = eval.caption(embedder, pictures(2), max_new_tokens=5)
    assert len(answers) == 2

    # Alone or in a batch of other sizes: the same embedding.
    alone = torch.cat([eval.encode_image(embedder, [picture]) for picture in pictures(3)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)

    if not case.is_exported:
        with pytest.raises(InputError, match="cannot be exported"):
            export(out, tmp_path / "exported")
        assert not (tmp_path / "exported").exists()
        return
    export(out, tmp_path / "exported")
    prompts = json.loads((tmp_path / "exported" / "prompts.json").read_text())
    assert_export_is_the_same(case, tmp_path / "exported", prompts, embedder)


def assert_export_is_the_same(case, exported, prompts, embedder):
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(exported).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(exported)
    image_processor = case.processor(exported)
    for picture in pictures(3):
        prepared = image_processor([picture], return_tensors="pt")
        text = case.expand(prompts["image"], prepared)
        input_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        inputs = {**prepared, "input_ids": input_ids, **case.token_types(input_ids)}
        with torch.no_grad():
            hidden = loaded.model(**inputs).last_hidden_state[0, -1]
        expected = eval.encode_image(embedder, [picture])[0]
        torch.testing.assert_close(F.normalize(hidden, dim=0), expected, rtol=0, atol=1e-5)
    text = prompts["text"].replace("{text}", "picture 1")
    input_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        hidden = loaded.model(input_ids=input_ids).last_hidden_state[0, -1]
    expected = eval.encode_text(embedder, ["picture 1"])[0]
    torch.testing.assert_close(F.normalize(hidden, dim=0), expected, rtol=0, atol=1e-5)
