"""train.py on the shipped TinyLLaVA: the step against transformers + peft, and what a run
writes.
"""

import dataclasses
import json
import math
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from data import CaptionDataset, ResumableSampler, Sample, collate
from eval import TOY_MODEL, encode_image, encode_text, load_base, load_embedder, open_image
from formats.files import InputError
from lora import trainable_parameters
from losses import contrastive_loss
from runtime import memory
from train import (
    TrainConfig,
    add_adapters,
    learning_rate_factor,
    main,
    training_step,
)


def prepared(config, folder, batch_size=12):
    """A model with adapters as training sees it, and its first batch."""
    embedder = load_base(TOY_MODEL, "cpu")
    add_adapters(embedder, config)
    dataset = CaptionDataset(folder / "train.jsonl", embedder.layout, embedder.processor)
    keys = next(iter(ResumableSampler(dataset.units, batch_size, 1)))
    samples = [dataset[key] for key in keys]
    batch = collate(samples, embedder.layout, config.micro_batch, config.caption_share)
    return embedder, samples, batch


def gradients(embedder, batch, config, log_scale):
    """The losses and every gradient, at a temperature of exp(-log_scale)."""
    with torch.no_grad():
        embedder.model.log_scale.fill_(log_scale)
    for parameter in embedder.model.parameters():
        parameter.grad = None
    losses = training_step(embedder.model, batch, config)
    named = trainable_parameters(embedder.model)
    return losses, {name: p.grad.clone() for name, p in named.items()}


def shake(embedder, std=0.02):
    """Move LoRA and soft prompts off their start, where half of all gradients are zero."""
    with torch.no_grad():
        for name, parameter in trainable_parameters(embedder.model).items():
            if name != "log_scale":
                parameter.add_(std * torch.randn_like(parameter))


def close(ours, theirs, tolerance):
    return (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("is_fast", [True, False])
def test_step_equals_transformers_and_peft(small_world, is_fast):
    """The same losses and gradients as three plain forwards of transformers + peft: fp32, 1e-4."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = TrainConfig(micro_batch=5, caption_share=0.5, fast=is_fast)
    embedder, samples, batch = prepared(config, small_world)
    shake(embedder)
    losses, ours = gradients(embedder, batch, config, math.log(10.0))

    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        TOY_MODEL, dtype=torch.float32
    )
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = peft.get_peft_model(
        reference, peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets)
    )
    named = {
        n.replace("base_model.model.model.", "").replace(".default", ""): p
        for n, p in model.named_parameters()
    }
    values = trainable_parameters(embedder.model)
    with torch.no_grad():
        for name, parameter in values.items():
            if ".lora_" in name:
                named[name].copy_(parameter)
    prompts = [
        values[f"language_model.embed_tokens.{side}"].detach().clone().requires_grad_()
        for side in ("image", "text")
    ]
    embedding, vocabulary = reference.get_input_embeddings(), embedder.model.config.text.vocab_size

    def forward(ids, pixel_values=None):
        """One sequence, without padding, the soft prompts put in by hand."""
        ids = torch.tensor([ids])
        hard = torch.where(ids < vocabulary, ids, 0)
        embeddings = torch.where((ids < vocabulary)[..., None], embedding(hard), 0)
        soft = F.one_hot(
            (ids - vocabulary).clamp(min=0), len(embedder.layout.prompt_ids)
        ).float() @ torch.cat(prompts)
        embeddings = torch.where((ids >= vocabulary)[..., None], soft, embeddings)
        if pixel_values is not None:
            features = reference.get_image_features(pixel_values[None])
            features = getattr(features, "pooler_output", features)
            features = (
                torch.cat(list(features))
                if isinstance(features, list | tuple)
                else features.flatten(0, 1)
            )
            embeddings = embeddings.masked_scatter(
                (ids == embedder.layout.image_id)[..., None], features
            )
        output = model.base_model.model.model.language_model(inputs_embeds=embeddings)
        return output.last_hidden_state[0]

    images = torch.stack(
        [forward(embedder.layout.image_side(), s.pixel_values)[-1] for s in samples]
    )
    texts = torch.stack([forward(embedder.layout.text_side(s.short))[-1] for s in samples])
    log_scale = torch.tensor(math.log(10.0), requires_grad=True)
    similarity = log_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(len(samples))
    contrastive = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    supervised, total, count = samples[: len(samples) // 2], 0.0, 0
    for sample in supervised:
        ids = embedder.layout.image_side(sample.long)
        hidden, first = forward(ids, sample.pixel_values), len(embedder.layout.image_side())
        logits, labels = reference.lm_head(hidden[first - 1 : -1]), torch.tensor(ids[first:])
        total, count = total + F.cross_entropy(logits, labels, reduction="sum"), count + len(labels)
    (contrastive + total / count).backward()

    assert losses["contrastive"] == pytest.approx(contrastive.item(), rel=1e-4)
    assert losses["autoregressive"] == pytest.approx((total / count).item(), rel=1e-4)
    theirs = {name: named[name].grad for name in ours if ".lora_" in name}
    theirs |= {
        f"language_model.embed_tokens.{side}": p.grad for side, p in zip(("image", "text"), prompts)
    }
    theirs["log_scale"] = log_scale.grad
    assert theirs.keys() == ours.keys()
    assert all(close(ours[name], theirs[name], 1e-4) for name in ours)


def test_micro_batches_change_nothing(small_world):
    """Chunks of 1, 5 and all sequences, sorted by length: the same losses and gradients."""
    results = []
    for micro_batch in (1, 5, 64):
        config = TrainConfig(micro_batch=micro_batch, caption_share=0.5)
        torch.manual_seed(1)
        embedder, _, batch = prepared(config, small_world)
        torch.manual_seed(2)
        shake(embedder)
        results.append(gradients(embedder, batch, config, 2.0))
    for losses, grads in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        assert all(close(grads[name], results[0][1][name], 1e-4) for name in grads)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_cache": True},
        {"gradient_cache": True, "micro_batch": 1},
        {"checkpoint_layers": 1},
        {"checkpoint_layers": 100, "gradient_cache": True},
        {"multiple": 32},
        {"multiple": 32, "gradient_cache": True, "lora_dropout": 0.3},
        {"lora_dropout": 0.3, "gradient_cache": True},
        {"lora_dropout": 0.3, "checkpoint_layers": 2},
    ],
    ids=str,
)
def test_ways_to_save_memory_change_nothing(small_world, change):
    """Gradient cache, checkpointed layers, rounded lengths, also with dropout: losses and gradients
    stay.
    """
    results, change = [], dict(change)
    dropout, multiple = change.get("lora_dropout", 0.0), change.pop("multiple", 1)
    for settings in ({"lora_dropout": dropout}, change):
        config = TrainConfig(**{"micro_batch": 5, "caption_share": 0.5} | settings)
        torch.manual_seed(1)
        embedder, samples, _ = prepared(config, small_world)
        padding = (
            1 if settings is not change and not dropout else multiple
        )  # dropout masks cover the padding too
        batch = collate(samples, embedder.layout, config.micro_batch, config.caption_share, padding)
        embedder.model.train()
        embedder.model.language_model.checkpoint_layers = config.checkpoint_layers
        torch.manual_seed(2)
        shake(embedder)
        results.append(gradients(embedder, batch, config, 2.0))
    (losses, grads), (expected_losses, expected) = results
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert all(close(grads[name], expected[name], 1e-5) for name in expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_gradient_cache_is_one_batch(small_world, weights):
    """The same losses and gradients, with dropout, and with either loss weighed or switched off."""
    results = []
    for cached in (False, True):
        config = TrainConfig(
            micro_batch=5,
            lora_dropout=0.3,
            caption_share=0.5,
            gradient_cache=cached,
            contrastive_weight=weights[0],
            autoregressive_weight=weights[1],
        )
        torch.manual_seed(1)
        embedder, _, batch = prepared(config, small_world)
        embedder.model.train()
        torch.manual_seed(2)
        shake(embedder)
        with torch.no_grad():
            embedder.model.log_scale.fill_(2.0)
        losses = training_step(embedder.model, batch, config)
        named = trainable_parameters(embedder.model)
        results.append((losses, {n: p.grad for n, p in named.items() if p.grad is not None}))
    (whole_losses, whole), (cached_losses, cached) = results
    assert cached_losses == pytest.approx(whole_losses, rel=1e-5)
    assert whole_losses["loss"] == pytest.approx(
        weights[0] * whole_losses["contrastive"] + weights[1] * whole_losses["autoregressive"]
    )
    assert cached.keys() == whole.keys()
    assert all(close(cached[name], whole[name], 1e-5) for name in whole)


def test_gradient_cache_holds_one_chunk_at_a_time(small_world, monkeypatch):
    """While one chunk's graph is alive, no other is."""
    alive = []
    most = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(1)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            most.append(len(alive))
            alive.pop()
            return gradient

    whole_encode = train.encode

    def encode(model, part):
        hidden, embeddings = whole_encode(model, part)
        return hidden, Watched.apply(embeddings) if torch.is_grad_enabled() else embeddings

    monkeypatch.setattr(train, "encode", encode)
    for cached, expected in ((True, 1), (False, 6)):
        most.clear()
        config = TrainConfig(micro_batch=4, gradient_cache=cached)
        embedder, _, batch = prepared(config, small_world)
        training_step(embedder.model, batch, config)
        assert len(most) == 6 and max(most) == expected  # three chunks of images, three of texts


def test_what_a_reader_edits_is_what_trains(small_world, monkeypatch):
    """A changed contrastive_loss is trained with, whether the fast forms are on or off."""
    for is_fast in (True, False):
        config = TrainConfig(fast=is_fast)
        embedder, _, batch = prepared(config, small_world)
        expected = training_step(embedder.model, batch, config)["contrastive"]

        def doubled(images, texts, scale):
            return 2 * contrastive_loss(images, texts, scale)

        with monkeypatch.context() as patch:
            patch.setattr(train, "contrastive_loss", doubled)
            found = training_step(embedder.model, batch, config)["contrastive"]
        assert found == pytest.approx(2 * expected, rel=1e-5)


def test_a_third_loss_is_one_entry(small_world, monkeypatch):
    """An entry in a table and a weight in the settings: it is computed, added and logged by
    name.
    """

    @dataclasses.dataclass
    class Config(TrainConfig):
        image_image_weight: float = 0.5

    def image_image(model, images, texts, config):
        similarity = F.normalize(images, dim=-1) @ F.normalize(images, dim=-1).T
        return similarity.fill_diagonal_(0).square().mean()

    monkeypatch.setitem(train.EMBEDDING_LOSSES, "image_image", image_image)
    for cached in (False, True):
        config = Config(micro_batch=5, gradient_cache=cached)
        embedder, _, batch = prepared(config, small_world)
        found = training_step(embedder.model, batch, config)
        assert found["image_image"] > 0
        assert found["loss"] == pytest.approx(
            found["contrastive"] + found["autoregressive"] + 0.5 * found["image_image"]
        )


def siglip(images, texts, scale, bias):
    """arXiv 2303.15343, equation 1."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T + bias
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def test_another_loss_with_a_parameter_of_its_own(small_world, tmp_path, monkeypatch):
    """As README says: the loss, the parameter beside the temperature, the call. The bias is
    trained, logged, saved and resumed, and is in no exported model.
    """
    add_temperature = train.lora.add_temperature

    def add_temperature_and_bias(model, temperature):
        add_temperature(model, temperature)
        model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))

    def contrastive(model, images, texts, config):
        return siglip(images, texts, model.log_scale.exp(), model.logit_bias)

    monkeypatch.setattr(train.lora, "add_temperature", add_temperature_and_bias)
    monkeypatch.setitem(train.EMBEDDING_LOSSES, "contrastive", contrastive)
    run_once(small_world, tmp_path / "whole", "--steps", "4")
    run_once(small_world, tmp_path / "run", "--steps", "4", "--save_every", "2")
    (tmp_path / "run/checkpoints/latest").write_text("step-2\n")
    main(["--resume", "--out", str(tmp_path / "run"), "--gradient_cache"])
    biases = []
    for name in ("whole", "run"):
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        biases.append([json.loads(line)["logit_bias"] for line in log])
        path = tmp_path / name / "checkpoints/step-4/training_state.safetensors"
        assert load_file(path)["logit_bias"].item() == biases[-1][-1]
    assert -10 < biases[0][0] < biases[0][-1]
    assert biases[1] == pytest.approx(biases[0], abs=1e-5)


def test_a_parameter_that_no_file_would_hold_is_refused(small_world):
    embedder = load_base(TOY_MODEL, "cpu")
    add_adapters(embedder, TrainConfig())
    embedder.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="extra.weight trains, but is of no LoRA"):
        train.make_optimizer(embedder.model, TrainConfig())


def test_plain_and_fast_train_the_same(small_world):
    """--no-fast: the plain layers and losses that one reads give the same step, 1e-5."""
    results = []
    for is_fast in (True, False):
        config = TrainConfig(micro_batch=5, caption_share=0.5, fast=is_fast)
        torch.manual_seed(1)
        embedder, _, batch = prepared(config, small_world)
        torch.manual_seed(2)
        shake(embedder)
        layer = type(embedder.model.language_model.layers[0]).__name__
        assert layer == ("LeanDecoderLayer" if is_fast else "DecoderLayer")
        results.append(gradients(embedder, batch, config, 2.0))
    (fast_losses, fast_grads), (losses, grads) = results
    assert fast_losses == pytest.approx(losses, rel=1e-5)
    assert all(close(fast_grads[name], grads[name], 1e-5) for name in grads)


def saved_bytes(function, model):
    """Bytes that `function`'s graph keeps for its backward pass, each storage counted once,
    parameters left out.
    """
    parameters, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result
    return sum(size for address, size in seen.items() if address not in parameters)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"caption_share": 1.0},
        {"caption_share": 1.0, "lora_dropout": 0.1},
        {"micro_batch": 6, "gradient_cache": True, "caption_share": 1.0},
        {"fast": False, "caption_share": 1.0},
        {"fast": False, "caption_share": 1.0, "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_memory_estimate_is_what_is_kept(small_world, change):
    """The estimate of the activations against the tensors that autograd keeps, of the same batch,
    within 3 %.
    """
    config = TrainConfig(**{"micro_batch": 12, "batch_size": 12, "caption_share": 0.5} | change)
    embedder, _, batch = prepared(config, small_world)
    estimate = memory.estimate(config, embedder.model, batch)["activations"]
    embedder.model.train()
    held = (
        [[chunk] for chunk in batch.images]
        if config.gradient_cache
        else [batch.images + batch.texts]
    )
    forward = lambda part: [embedder.model(chunk.input_ids, chunk.pixel_values) for chunk in part]  # noqa: E731
    kept = [saved_bytes(partial(forward, part), embedder.model) for part in held]
    assert estimate == pytest.approx(max(kept) / 1e9, rel=0.03)


def test_a_step_in_bf16(small_world):
    """The precision of GPUs, on the CPU: adapters and their gradients stay in fp32; the gradient
    cache changes nothing beyond rounding; the losses are those of fp32 to two digits."""
    results = {}
    for name, dtype, cache in (
        ("fp32", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("cached", torch.bfloat16, True),
    ):
        config = TrainConfig(micro_batch=5, caption_share=0.5, gradient_cache=cache)
        torch.manual_seed(1)
        embedder, _, batch = prepared(config, small_world)
        torch.manual_seed(2)
        shake(embedder)
        for parameter in embedder.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        results[name] = gradients(embedder, batch, config, 2.0)
        assert all(gradient.dtype == torch.float32 for gradient in results[name][1].values())
    assert results["bf16"][0] == pytest.approx(results["fp32"][0], rel=0.03)
    assert results["cached"][0] == pytest.approx(results["bf16"][0], rel=0.01)
    for name, gradient in results["fp32"][1].items():
        assert close(results["bf16"][1][name], gradient, 0.15), name
        assert close(results["cached"][1][name], results["bf16"][1][name], 0.1), name


def test_memory_is_printed_with_what_fits(capsys):
    """12 GB wanted, 6 there: 4 of them are not activations, so 2 GB hold 4 sequences."""
    memory.report({"weights": 4.0, "activations": 8.0, "a sequence": 0.5}, free=6.0)
    shown = capsys.readouterr().out
    assert "training: about 12 GB of 6 GB free (weights 4, activations 8)" in shown
    assert "--micro_batch of up to 4 sequences" in shown and "RUN OUT OF MEMORY" in shown
    memory.report({"weights": 4.0, "activations": 1.0, "a sequence": 0.5}, free=math.inf)
    assert "OUT OF MEMORY" not in capsys.readouterr().out
    memory.report({"weights": 4.0, "activations": 1.0, "a sequence": 1e-4}, free=6.0)
    assert "sequences" not in capsys.readouterr().out  # 20,000: nobody takes as many


def test_a_loss_without_a_weight_is_named(small_world, monkeypatch):
    """Half of the way to a loss of one's own: the function is in the table, the setting is not."""
    monkeypatch.setitem(train.EMBEDDING_LOSSES, "spread", train.contrastive)
    with pytest.raises(InputError, match="spread has no weight: add spread_weight to TrainConfig"):
        train.active_weights(train.EMBEDDING_LOSSES, TrainConfig())


def test_data_without_long_captions_says_what_it_costs(small_world, tmp_path, capsys):
    """Nothing keeps the captioning then; the bar shows a dash and no perfect zero."""
    lines = (small_world / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"long": []} for line in lines]
    data = small_world / "short.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--steps", "1", "--batch_size", "8", "--tests", "none", "--device", "cpu"]
    main(["--data", str(data), "--out", str(tmp_path / "run"), "--resume", *flags])
    out = capsys.readouterr()
    assert "captioning is not trained on such data" in out.out + out.err
    assert "so this is a new run" in out.out  # --resume, where there is nothing
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert "autoregressive -" in train.in_short(line)


def test_gradients_reach_what_trains_and_nothing_else(small_world):
    """After two steps every LoRA matrix and both prompts have moved; every frozen tensor is bitwise
    what it was.
    """
    config = TrainConfig(caption_share=0.5)
    embedder, _, batch = prepared(config, small_world)
    before = {name: p.detach().clone() for name, p in embedder.model.named_parameters()}
    optimizer = torch.optim.SGD(trainable_parameters(embedder.model).values(), lr=0.1)
    for _ in range(2):
        training_step(embedder.model, batch, config)
        optimizer.step()
        optimizer.zero_grad()
    moved = {
        name for name, p in embedder.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == trainable_parameters(embedder.model).keys() and len(moved) > 2
    assert "log_scale" in moved


def test_loss_starts_around_chance_and_falls(small_world):
    """A high temperature makes the loss log B; at temperature 1 the untrained model is better than
    that on true pairs and worse on wrong ones; a few steps bring it down."""
    config = TrainConfig(autoregressive_weight=0.0, caption_share=0.0)
    embedder, samples, batch = prepared(config, small_world)
    chance = math.log(batch.num_pairs)
    hot, one = -5.0, 0.0
    assert gradients(embedder, batch, config, hot)[0]["loss"] == pytest.approx(chance, abs=0.01)
    shifted = [  # far from twins, which are neighbours
        dataclasses.replace(s, short=samples[i - 6].short) for i, s in enumerate(samples)
    ]
    wrong = collate(shifted, embedder.layout, config.micro_batch, config.caption_share)
    assert gradients(embedder, batch, config, one)[0]["loss"] < chance
    assert gradients(embedder, wrong, config, one)[0]["loss"] > chance
    optimizer = torch.optim.Adam(trainable_parameters(embedder.model).values(), lr=4e-3)
    with torch.no_grad():
        embedder.model.log_scale.fill_(math.log(1 / 0.07))
    curve = []
    for _ in range(8):
        optimizer.zero_grad()
        curve.append(training_step(embedder.model, batch, config)["loss"])
        optimizer.step()
    assert curve[-1] < 0.7 * curve[0]


def test_embedding_depends_on_nothing_around_it(small_world):
    """An embedding is the same alone, in a batch with longer texts, and with a long caption behind
    the image.
    """
    embedder, samples, _ = prepared(TrainConfig(), small_world)
    texts = [sample.short for sample in samples]
    together = encode_text(embedder, [*texts, "a red circle " * 20])[: len(texts)]
    alone = torch.cat([encode_text(embedder, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    chunk = collate(samples, embedder.layout, 64, caption_share=1.0).images[0]
    with torch.no_grad():
        hidden = embedder.model(chunk.input_ids, chunk.pixel_values)
    with_caption = F.normalize(hidden[torch.arange(len(hidden)), chunk.summary], dim=-1)[
        chunk.pair.argsort()
    ]
    paths = [small_world / "images/test" / f"{index:06d}.png" for index in range(2)]
    images = [open_image(path) for path in paths]
    torch.testing.assert_close(
        encode_image(embedder, images)[:1], encode_image(embedder, images[:1]), rtol=0, atol=1e-5
    )
    plain = embedder.model(
        torch.tensor([embedder.layout.image_side()] * 12),
        torch.stack([s.pixel_values for s in samples]),
    )
    torch.testing.assert_close(
        with_caption, F.normalize(plain[:, -1], dim=-1).detach(), rtol=0, atol=1e-5
    )


def test_records_with_one_kind_of_caption_train_that_loss(small_world, tmp_path):
    """Without a short caption an image has no pair, without a long one no label; nothing is
    dropped.
    """
    lines = (small_world / "train.jsonl").read_text().splitlines()[:4]
    records = [json.loads(line) for line in lines]
    records[0]["short"], records[1]["long"] = [], []
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)))
    embedder = load_base(TOY_MODEL, "cpu")
    dataset = CaptionDataset(
        tmp_path / "mixed.jsonl", embedder.layout, embedder.processor, small_world
    )
    batch = collate([dataset[index, 0] for index in range(4)], embedder.layout, 64)
    assert batch.num_pairs == 3 and len(batch.texts[0].pair) == 3 and not batch.skipped
    assert sorted(batch.images[0].pair.tolist()) == [-1, 0, 1, 2]
    supervised = (batch.images[0].labels != -100).sum(1)
    assert (supervised > 0).sum() == 3 and supervised.sum() == batch.num_tokens
    few = collate([dataset[index, 0] for index in range(4)], embedder.layout, 64, caption_share=0.0)
    assert (few.images[0].labels != -100).any(1).sum() == 1 and len(
        few.images[0].pair
    ) == 4  # the one without a pair


def run_once(small_world, out, *flags):
    tests = {
        "retrieval": {"file": "test/karpathy.json", "images": "images", "split": "test"},
        "winoground": {
            "file": "test/winoground/examples.jsonl",
            "images": "test/winoground/images",
        },
        "captioning": {"file": "test.jsonl"},
    }
    (small_world / "tests.json").write_text(json.dumps(tests))
    data = [
        "--data",
        str(small_world / "train.jsonl"),
        "--tests",
        str(small_world / "tests.json"),
        "--out",
        str(out),
    ]
    main([*data, "--steps", "3", "--batch_size", "12", "--device", "cpu", *flags])


def test_a_run_writes_its_files_and_repeats(small_world, tmp_path, capsys):
    """Two runs with one seed give the same log, tables and adapter; the run folder can be loaded
    and used.
    """
    for name in ("one", "two"):
        run_once(small_world, tmp_path / name)
    logs = [
        [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(
        logs[0]
    ) == 3
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    ]
    assert (
        results[0]["after"] == results[1]["after"] and results[0]["before"] != results[0]["after"]
    )
    adapters = [
        (tmp_path / n / "checkpoints/step-3/adapter_model.safetensors").read_bytes()
        for n in ("one", "two")
    ]
    assert adapters[0] == adapters[1]
    assert (tmp_path / "one/retrieval.png").exists()
    assert "untrained" in capsys.readouterr().out
    embedder = load_embedder(tmp_path / "one", "cpu")
    assert embedder.is_adapted and encode_text(embedder, ["a red circle"]).shape == (
        1,
        embedder.model.config.text.hidden_size,
    )


def test_settings_that_switch_off(small_world, tmp_path):
    """Soft prompts alone, LoRA alone, AR alone and contrast alone all run, and train what they
    say.
    """
    for flags, tensors in (
        (["--lora_rank", "0"], 2),
        (["--no-soft_prompts"], 2 * 7 * 4),
        (["--contrastive_weight", "0"], 2 * 7 * 4 + 2),
        (["--autoregressive_weight", "0", "--contrast", "long"], 2 * 7 * 4 + 2),
    ):
        run_once(small_world, tmp_path / "run", *flags)
        embedder = load_embedder(tmp_path / "run", "cpu")
        layers = len(embedder.model.language_model.layers)
        names = [
            n
            for n, _ in embedder.model.named_parameters()
            if ".lora_" in n or "embed_tokens.image" in n or "embed_tokens.text" in n
        ]
        assert len(names) == tensors // 4 * layers + tensors % 4 if tensors > 2 else len(names) == 2
        assert encode_text(embedder, ["a red circle"]).isfinite().all()
        if (
            flags[0] != "--no-soft_prompts"
        ):  # AR alone never sees the text prompt, contrast sees both
            soft = embedder.model.language_model.embed_tokens
            moved = not torch.equal(soft.text, soft.weight[soft.prompt_ids[-len(soft.text) :]])
            assert moved == (flags[0] != "--contrastive_weight")
            assert not torch.equal(soft.image, soft.weight[soft.prompt_ids[: len(soft.image)]])


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--steps", "0"], "steps"),
        (["--caption_share", "2"], "caption_share"),
        (["--contrast", "both"], "contrast"),
        (["--temperature", "0"], "temperature"),
        (["--lora_dropout", "2"], "lora_dropout"),
        (["--seed", "-1"], "seed"),
        (["--clip", "0"], "clip"),
        (["--weight_decay", "nan"], "weight_decay"),
        (["--lr", "-1"], "lr must lie in"),
        (["--lora_rank", "0", "--no-soft_prompts"], "nothing to train"),
        (["--contrastive_weight", "0", "--autoregressive_weight", "0"], "losses"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--batch_size", "100"], "batch of 100"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_flags_get_one_clear_line(small_world, tmp_path, flags, message):
    """Every unusable value ends in one line that names it."""
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "--data",
                str(small_world / "train.jsonl"),
                "--out",
                str(tmp_path / "run"),
                "--device",
                "cpu",
                *flags,
            ]
        )
    assert message in str(stop.value.code) and str(stop.value.code).startswith("error: ")
    assert "\n" not in str(stop.value.code)


@pytest.mark.parametrize(
    "names", [["thesis.tex"], ["config.json", "model.safetensors"], ["checkpoints/../notes"]]
)
def test_a_folder_that_is_no_run_is_left_alone(small_world, tmp_path, names):
    """--out on somebody's files, a checkpoint's too, stops before anything is touched."""
    for name in names:
        (tmp_path / name).resolve().write_text("years of work")
    with pytest.raises(SystemExit, match="not a run"):
        run_once(small_world, tmp_path)
    assert all((tmp_path / name).resolve().read_text() == "years of work" for name in names)


def test_a_refused_command_leaves_the_former_run_alone(small_world, tmp_path):
    """Fewer records than a batch are found before anything in --out is touched."""
    run_once(small_world, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="do not fill a batch of 500"):
        run_once(small_world, tmp_path / "run", "--batch_size", "500")
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before


def test_learning_rate_reaches_its_peak():
    """It rises to 1 over the warm-up and falls to 0.05 at the end."""
    config = TrainConfig(steps=100, warmup=10)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[9] == 1 and factors[0] == 0.1 and factors[-1] == pytest.approx(0.05, abs=2e-3)
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_batch_without_any_caption_to_train_is_named(small_world):
    """Nothing to learn from is an error with its reason, not a crash in backward."""
    embedder = load_base(TOY_MODEL, "cpu")
    config = TrainConfig()
    add_adapters(embedder, config)
    unreadable = Sample(None, None, None, error="data.jsonl, record 3: no such image")
    batch = collate([unreadable], embedder.layout, 8)
    with pytest.raises(InputError, match="record 3"):
        training_step(embedder.model, batch, config)


@pytest.mark.parametrize(
    "line,reason",
    [
        ("{", "not JSON"),
        ("[1]", '"image"'),
        ('{"image": 3}', '"image"'),
        ('{"image": "a.png"}', "no caption"),
        ('{"image": "a.png", "short": "text"}', '"short"'),
        ('{"image": "a.png", "short": [1]}', '"short"'),
        ('{"image": "a.png", "short": ["a"], "group": []}', '"group"'),
    ],
)
def test_faulty_lines_are_counted_or_stop(small_world, tmp_path, line, reason):
    """A rare faulty line is counted by its reason; more than the tolerance stops with the line and
    the reason.
    """
    embedder = load_base(TOY_MODEL, "cpu")
    good = (small_world / "train.jsonl").read_text().splitlines()
    (tmp_path / "rare.jsonl").write_text("\n".join(good * 4 + [line]))
    dataset = CaptionDataset(
        tmp_path / "rare.jsonl", embedder.layout, embedder.processor, small_world
    )
    assert (
        len(dataset) == 4 * len(good)
        and sum(dataset.faults.values()) == 1
        and reason in str(dataset.faults)
    )
    (tmp_path / "often.jsonl").write_text(
        "\n".join(["", line, *good[:5]])
    )  # empty lines count, as in an editor
    with pytest.raises(InputError, match="line 2") as error:
        CaptionDataset(tmp_path / "often.jsonl", embedder.layout, embedder.processor, small_world)
    assert reason in str(error.value)


def test_unreadable_images_are_counted(small_world, tmp_path):
    """A missing or foreign picture is reported with its record, and never silently dropped."""
    embedder = load_base(TOY_MODEL, "cpu")
    records = [
        json.loads(line) for line in (small_world / "train.jsonl").read_text().splitlines()[:3]
    ]
    records[0]["image"], records[1]["image"] = "missing.png", "../../outside.png"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    dataset = CaptionDataset(
        tmp_path / "data.jsonl", embedder.layout, embedder.processor, small_world
    )
    batch = collate([dataset[index, 0] for index in range(3)], embedder.layout, 8)
    assert len(batch.skipped) == 2 and batch.num_pairs == 1
    assert "no such image" in batch.skipped[0] and "outside" in batch.skipped[1]


def test_sampler_resumes_and_keeps_groups():
    """Every epoch visits records once, in an order of its own; a later start continues it; groups
    stay together.
    """
    units = [0, 1, 1, 2, 3, 3, 4, 5, 6, 6]
    whole = list(ResumableSampler(units, 2, 12, seed=3))
    assert list(ResumableSampler(units, 2, 12, seed=3, first_step=7)) == whole[7:]
    first, second = ([index for batch in whole[i : i + 5] for index, _ in batch] for i in (0, 5))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    for pair in ((1, 2), (4, 5), (8, 9)):
        assert abs(first.index(pair[0]) - first.index(pair[1])) == 1
    assert list(ResumableSampler(units, 2, 12, seed=4)) != whole


def test_captions_are_routed_by_length(small_world, tmp_path):
    """Under 30 tokens a caption is short, from 30 on long, over 500 cut behind a sentence, wherever
    it was written.
    """
    embedder = load_base(TOY_MODEL, "cpu")
    word, sentence = "red ", "a red circle is left of a blue square. "
    record = {
        "image": "x.png",
        "short": [word * 29, word * 30, sentence * 80],
        "long": ["a red circle"],
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    dataset = CaptionDataset(tmp_path / "data.jsonl", embedder.layout, embedder.processor)
    short, long = dataset.captions(dataset.record(0))
    assert short == [word * 29, "a red circle"]
    assert len(long[0]) == 30 and 490 <= len(long[1]) <= 500
    assert embedder.tokenizer.decode(long[1]).endswith("blue square.")


def test_every_flag_stands_in_a_part_of_the_help():
    """Also a part's first setting: a name that is no field's would leave its part out."""
    groups = train.make_parser()._action_groups
    titles = [group.title for group in groups if group._group_actions]
    assert titles == ["options", *train.PARTS.values()]
    of_parts = [action for group in groups[2:] for action in group._group_actions]
    assert len(of_parts) == len(dataclasses.fields(TrainConfig))


def test_flags_are_the_fields(capsys):
    """--help shows every field with its default; an unknown flag is refused."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(TrainConfig))
    with pytest.raises(SystemExit):
        main(["--no_such_flag"])


def test_collate_pads_right_and_marks_labels(small_world):
    """Labels are the next token, exactly over the long caption and its end; rows are padded on the
    right.
    """
    embedder, samples, _ = prepared(TrainConfig(), small_world)
    lay_out = partial(collate, layout=embedder.layout, caption_share=1.0)
    chunk = lay_out(samples, micro_batch=64).images[0]
    for row in range(len(samples)):
        ids, labels = chunk.input_ids[row].tolist(), chunk.labels[row].tolist()
        sample = next(
            s
            for s in samples
            if embedder.layout.image_side(s.long) == ids[: len(embedder.layout.image_side(s.long))]
        )
        expected = [*sample.long, embedder.layout.stop_id]
        start = embedder.layout.image_summary
        assert labels[start : start + len(expected)] == expected
        assert set(labels[:start] + labels[start + len(expected) :]) <= {-100}


# ---- Int8, precision, and what adapters belong to


def test_int8_holds_less_and_says_so(small_world):
    """A byte for each weight of the language model's layers; a step's losses hardly move."""
    losses = {}
    for int8 in (False, True):
        config = TrainConfig(int8=int8, batch_size=12)
        embedder = load_base(TOY_MODEL, "cpu", int8=int8)
        add_adapters(embedder, config)
        dataset = CaptionDataset(small_world / "train.jsonl", embedder.layout, embedder.processor)
        batch = collate(
            [dataset[index, 0] for index in range(12)], embedder.layout, config.micro_batch
        )
        held = sum(p.nbytes for p in embedder.model.parameters() if not p.requires_grad)
        losses[int8], _ = gradients(embedder, batch, config, 0.0)
    linears = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    assert held == pytest.approx(4 * (2_265_728 - linears) + linears, rel=0.01)
    assert (
        losses[True]["loss"] == pytest.approx(losses[False]["loss"], rel=0.02)
        and losses[True] != losses[False]
    )


@pytest.mark.parametrize("fastest", [torch.float16, torch.float32])
def test_the_first_line_says_device_and_precision(
    small_world, tmp_path, monkeypatch, capsys, fastest
):
    """Where only fp16 would be fast, training is in fp32; the first line of output says what is
    used.
    """
    monkeypatch.setattr("eval.pick_device", lambda name: (torch.device("cpu"), fastest))
    settings = [
        "--data",
        str(small_world / "train.jsonl"),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
    ]
    main([*settings, "--batch_size", "4"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "training on cpu (the best device here) in float32, 1 process"


def test_a_run_knows_its_base_model(small_world, tmp_path):
    """Adapters are refused on another base, also one of the same shapes; the same base in other
    files is fine.
    """
    settings = [
        "--data",
        str(small_world / "train.jsonl"),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
    ]
    main([*settings, "--batch_size", "4", "--device", "cpu"])
    base = tmp_path / "base"
    shutil.copytree(TOY_MODEL, base)
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": str(base)}))
    expected = encode_text(load_embedder(tmp_path / "run", "cpu"), ["a star"])

    tensors = load_file(base / "model.safetensors")
    renamed = {
        n.replace("language_model.model.", "model.language_model."): t.double()
        for n, t in tensors.items()
    }
    save_file(
        {n.replace("language_model.lm_head", "lm_head"): t for n, t in renamed.items()},
        base / "model.safetensors",
    )
    assert torch.equal(encode_text(load_embedder(tmp_path / "run", "cpu"), ["a star"]), expected)

    tensors["language_model.model.layers.2.mlp.up_proj.weight"] += 0.01
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(
        InputError, match="base was '[0-9a-f]{64}' and is '[0-9a-f]{64}'; use the base model"
    ):
        load_embedder(tmp_path / "run", "cpu")
