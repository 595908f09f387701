"""train.py on the shipped TinyLLaVA: the step against transformers + peft, and what a run writes."""

import dataclasses
import json
import math
import shutil
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data import CaptionDataset, DataError, ResumableSampler, collate
from eval import TOY_MODEL, encode_image, encode_text, load_base, load_run, open_image
from lora import AdapterError, trainable_parameters
from train import (
    TrainConfig,
    add_adapters,
    compile_layers,
    learning_rate_factor,
    main,
    memory_estimate,
    print_memory,
    training_step,
)


def prepared(config, folder, batch_size=12):
    """A run with adapters, and its first batch."""
    run = load_base(TOY_MODEL, "cpu")
    add_adapters(run, config)
    dataset = CaptionDataset(folder / "train.jsonl", run.layout, run.processor)
    keys = next(iter(ResumableSampler(dataset.units, batch_size, 1)))
    samples = [dataset[key] for key in keys]
    batch = collate(samples, run.layout, config.micro_batch, config.caption_share)
    return run, samples, batch


def gradients(run, batch, config, log_scale):
    for parameter in run.model.parameters():
        parameter.grad = None
    losses = training_step(run.model, batch, log_scale, config)
    return losses, {name: p.grad.clone() for name, p in trainable_parameters(run.model).items()}


def shake(run, std=0.02):
    with torch.no_grad():
        for parameter in trainable_parameters(run.model).values():
            parameter.add_(std * torch.randn_like(parameter))


def close(ours, theirs, tolerance):
    return (ours - theirs).norm() <= tolerance * theirs.norm()


def test_step_equals_transformers_and_peft(small_world):
    """The same losses and gradients as three plain forwards of transformers + peft: fp32, 1e-4 relative."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = TrainConfig(micro_batch=5, caption_share=0.5)
    run, samples, batch = prepared(config, small_world)
    shake(run)
    log_scale = torch.tensor(math.log(10.0), requires_grad=True)
    losses, ours = gradients(run, batch, config, log_scale)

    reference = transformers.LlavaForConditionalGeneration.from_pretrained(TOY_MODEL, dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = peft.get_peft_model(reference, peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    named = {n.replace("base_model.model.model.", "").replace(".default", ""): p for n, p in model.named_parameters()}
    values = trainable_parameters(run.model)
    with torch.no_grad():
        for name, parameter in values.items():
            if ".lora_" in name:
                named[name].copy_(parameter)
    prompts = [
        values[f"language_model.embed_tokens.{side}"].detach().clone().requires_grad_() for side in ("image", "text")
    ]
    embedding, vocabulary = reference.get_input_embeddings(), run.model.config.text.vocab_size

    def forward(ids, pixel_values=None):
        """One sequence, without padding, the soft prompts put in by hand."""
        ids = torch.tensor([ids])
        hard = torch.where(ids < vocabulary, ids, 0)
        embeddings = torch.where((ids < vocabulary)[..., None], embedding(hard), 0)
        soft = F.one_hot((ids - vocabulary).clamp(min=0), len(run.layout.prompt_ids)).float() @ torch.cat(prompts)
        embeddings = torch.where((ids >= vocabulary)[..., None], soft, embeddings)
        if pixel_values is not None:
            features = reference.get_image_features(pixel_values[None])
            features = getattr(features, "pooler_output", features)
            features = torch.cat(list(features)) if isinstance(features, list | tuple) else features.flatten(0, 1)
            embeddings = embeddings.masked_scatter((ids == run.layout.image_id)[..., None], features)
        output = model.base_model.model.model.language_model(inputs_embeds=embeddings)
        return output.last_hidden_state[0]

    images = torch.stack([forward(run.layout.image_side(), s.pixel_values)[-1] for s in samples])
    texts = torch.stack([forward(run.layout.text_side(s.short))[-1] for s in samples])
    similarity = 10.0 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(len(samples))
    contrastive = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    supervised, total, count = samples[: len(samples) // 2], 0.0, 0
    for sample in supervised:
        ids = run.layout.image_side(sample.long)
        hidden, first = forward(ids, sample.pixel_values), len(run.layout.image_side())
        logits, labels = reference.lm_head(hidden[first - 1 : -1]), torch.tensor(ids[first:])
        total, count = total + F.cross_entropy(logits, labels, reduction="sum"), count + len(labels)
    (contrastive + total / count).backward()

    assert losses["contrastive"] == pytest.approx(contrastive.item(), rel=1e-4)
    assert losses["autoregressive"] == pytest.approx((total / count).item(), rel=1e-4)
    theirs = {name: named[name].grad for name in ours if ".lora_" in name}
    theirs |= {f"language_model.embed_tokens.{side}": p.grad for side, p in zip(("image", "text"), prompts)}
    assert theirs.keys() == ours.keys()
    assert all(close(ours[name], theirs[name], 1e-4) for name in ours)


def test_micro_batches_change_nothing(small_world):
    """Chunks of 1, 5 and all sequences, sorted by length: the same losses and gradients."""
    results = []
    for micro_batch in (1, 5, 64):
        config = TrainConfig(micro_batch=micro_batch, caption_share=0.5)
        torch.manual_seed(1)
        run, _, batch = prepared(config, small_world)
        torch.manual_seed(2)
        shake(run)
        results.append(gradients(run, batch, config, torch.tensor(2.0, requires_grad=True)))
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
    """Gradient cache, checkpointed layers, rounded lengths, also with dropout: losses and gradients stay."""
    results, change = [], dict(change)
    dropout, multiple = change.get("lora_dropout", 0.0), change.pop("multiple", 1)
    for settings in ({"lora_dropout": dropout}, change):
        config = TrainConfig(**{"micro_batch": 5, "caption_share": 0.5} | settings)
        torch.manual_seed(1)
        run, samples, _ = prepared(config, small_world)
        padding = 1 if settings is not change and not dropout else multiple  # dropout masks cover the padding too
        batch = collate(samples, run.layout, config.micro_batch, config.caption_share, padding)
        run.model.train()
        run.model.language_model.checkpoint_layers = config.checkpoint_layers
        torch.manual_seed(2)
        shake(run)
        log_scale = torch.tensor(2.0, requires_grad=True)
        losses, grads = gradients(run, batch, config, log_scale)
        results.append((losses, grads | {"log_scale": log_scale.grad}))
    (losses, grads), (expected_losses, expected) = results
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert all(close(grads[name], expected[name], 1e-5) for name in expected)


def saved_bytes(function, model):
    """Bytes that `function`'s graph keeps for its backward pass, each storage counted once, parameters left out."""
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
    ],
    ids=str,
)
def test_memory_estimate_is_what_is_kept(small_world, change):
    """The estimate of the activations against the tensors that autograd keeps, of the same batch, within 3 %."""
    config = TrainConfig(**{"micro_batch": 12, "batch_size": 12, "caption_share": 0.5} | change)
    run, _, batch = prepared(config, small_world)
    estimate = memory_estimate(config, run.model, batch)["activations"]
    run.model.train()
    held = [[chunk] for chunk in batch.images] if config.gradient_cache else [batch.images + batch.texts]
    forward = lambda part: [run.model(chunk.input_ids, chunk.pixel_values) for chunk in part]  # noqa: E731
    kept = [saved_bytes(partial(forward, part), run.model) for part in held]
    assert estimate == pytest.approx(max(kept) / 1e9, rel=0.03)


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="torch.compile needs a compiler")
def test_compiled_layers_change_nothing(small_world):
    """--compile: the losses and gradients of the plain layers, up to rounding, for chunks of several lengths."""
    results = []
    for compiled in (False, True):
        config = TrainConfig(micro_batch=5, caption_share=0.5)
        torch.manual_seed(1)
        run, samples, _ = prepared(config, small_world)
        torch.manual_seed(2)
        shake(run)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compile_layers(run.model)
        batch = collate(samples, run.layout, config.micro_batch, config.caption_share, multiple=32)
        results.append(gradients(run, batch, config, torch.tensor(2.0, requires_grad=True)))
    counters = torch._dynamo.utils.counters
    assert 0 < counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"], counters
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert all(close(results[1][1][name], results[0][1][name], 1e-4) for name in results[0][1])


def test_a_step_in_bf16(small_world):
    """The precision of GPUs, on the CPU: adapters and their gradients stay in fp32; the gradient cache changes
    nothing beyond rounding; the losses are those of fp32 to two digits."""
    results = {}
    for name, dtype, cache in (
        ("fp32", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("cached", torch.bfloat16, True),
    ):
        config = TrainConfig(micro_batch=5, caption_share=0.5, gradient_cache=cache)
        torch.manual_seed(1)
        run, _, batch = prepared(config, small_world)
        torch.manual_seed(2)
        shake(run)
        for parameter in run.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        results[name] = gradients(run, batch, config, torch.tensor(2.0, requires_grad=True))
        assert all(gradient.dtype == torch.float32 for gradient in results[name][1].values())
    assert results["bf16"][0] == pytest.approx(results["fp32"][0], rel=0.03)
    assert results["cached"][0] == pytest.approx(results["bf16"][0], rel=0.01)
    for name, gradient in results["fp32"][1].items():
        assert close(results["bf16"][1][name], gradient, 0.15), name
        assert close(results["cached"][1][name], results["bf16"][1][name], 0.1), name


def test_memory_is_printed_with_what_fits(capsys):
    """12 GB wanted, 6 there: 4 of them are not activations, so 2 GB hold 4 sequences."""
    print_memory({"weights": 4.0, "activations": 8.0, "a sequence": 0.5}, free=6.0)
    shown = capsys.readouterr().out
    assert "training: about 12 GB of 6 GB free (weights 4, activations 8)" in shown
    assert "--micro_batch of up to 4 sequences" in shown and "RUN OUT OF MEMORY" in shown
    print_memory({"weights": 4.0, "activations": 1.0, "a sequence": 0.5}, free=math.inf)
    assert "OUT OF MEMORY" not in capsys.readouterr().out


def test_gradients_reach_what_trains_and_nothing_else(small_world):
    """After two steps every LoRA matrix and both prompts have moved; every frozen tensor is bitwise what it was."""
    config = TrainConfig(caption_share=0.5)
    run, _, batch = prepared(config, small_world)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    log_scale = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.SGD([*trainable_parameters(run.model).values(), log_scale], lr=0.1)
    for _ in range(2):
        training_step(run.model, batch, log_scale, config)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable_parameters(run.model).keys() and len(moved) > 2
    assert log_scale.item() != 2.0


def test_loss_starts_around_chance_and_falls(small_world):
    """A high temperature makes the loss log B; at temperature 1 the untrained model is better than that on true pairs
    and worse on wrong ones; a few steps bring it down."""
    config = TrainConfig(ar_weight=0.0, caption_share=0.0)
    run, samples, batch = prepared(config, small_world)
    chance = math.log(batch.num_pairs)
    hot, one = (torch.tensor(value, requires_grad=True) for value in (-5.0, 0.0))
    assert training_step(run.model, batch, hot, config)["loss"] == pytest.approx(chance, abs=0.01)
    shifted = [  # far from twins, which are neighbours
        dataclasses.replace(s, short=samples[i - 6].short) for i, s in enumerate(samples)
    ]
    wrong = collate(shifted, run.layout, config.micro_batch, config.caption_share)
    assert training_step(run.model, batch, one, config)["loss"] < chance
    assert training_step(run.model, wrong, one, config)["loss"] > chance
    optimizer = torch.optim.Adam(trainable_parameters(run.model).values(), lr=4e-3)
    log_scale = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    curve = []
    for _ in range(8):
        optimizer.zero_grad()
        curve.append(training_step(run.model, batch, log_scale, config)["loss"])
        optimizer.step()
    assert curve[-1] < 0.7 * curve[0]


def test_embedding_depends_on_nothing_around_it(small_world):
    """An embedding is the same alone, in a batch with longer texts, and with a long caption behind the image."""
    run, samples, _ = prepared(TrainConfig(), small_world)
    texts = [sample.short for sample in samples]
    together = encode_text(run, [*texts, "a red circle " * 20])[: len(texts)]
    alone = torch.cat([encode_text(run, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    chunk = collate(samples, run.layout, 64, caption_share=1.0).images[0]
    with torch.no_grad():
        hidden = run.model(chunk.input_ids, chunk.pixel_values)
    with_caption = F.normalize(hidden[torch.arange(len(hidden)), chunk.summary], dim=-1)[chunk.pair.argsort()]
    paths = [small_world / "images/train" / f"{index:06d}.png" for index in range(2)]
    images = [open_image(path) for path in paths]
    torch.testing.assert_close(encode_image(run, images)[:1], encode_image(run, images[:1]), rtol=0, atol=1e-5)
    plain = run.model(torch.tensor([run.layout.image_side()] * 12), torch.stack([s.pixel_values for s in samples]))
    torch.testing.assert_close(with_caption, F.normalize(plain[:, -1], dim=-1).detach(), rtol=0, atol=1e-5)


def test_records_with_one_kind_of_caption_train_that_loss(small_world, tmp_path):
    """Without a short caption an image has no pair, without a long one no label; nothing is dropped."""
    lines = (small_world / "train.jsonl").read_text().splitlines()[:4]
    records = [json.loads(line) for line in lines]
    records[0]["short"], records[1]["long"] = [], []
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)))
    run = load_base(TOY_MODEL, "cpu")
    dataset = CaptionDataset(tmp_path / "mixed.jsonl", run.layout, run.processor, small_world)
    batch = collate([dataset[index, 0] for index in range(4)], run.layout, 64)
    assert batch.num_pairs == 3 and len(batch.texts[0].pair) == 3 and not batch.skipped
    assert sorted(batch.images[0].pair.tolist()) == [-1, 0, 1, 2]
    supervised = (batch.images[0].labels != -100).sum(1)
    assert (supervised > 0).sum() == 3 and supervised.sum() == batch.num_tokens
    few = collate([dataset[index, 0] for index in range(4)], run.layout, 64, caption_share=0.0)
    assert (few.images[0].labels != -100).any(1).sum() == 1 and len(few.images[0].pair) == 4  # the one without a pair


def run_once(small_world, out, *flags):
    tests = {
        "retrieval": {"file": "test/karpathy.json", "images": "images", "split": "test"},
        "winoground": {"file": "test/winoground/examples.jsonl", "images": "test/winoground/images"},
        "captioning": {"file": "test.jsonl"},
    }
    (small_world / "tests.json").write_text(json.dumps(tests))
    data = ["--data", str(small_world / "train.jsonl"), "--tests", str(small_world / "tests.json"), "--out", str(out)]
    main([*data, "--steps", "3", "--batch_size", "12", "--device", "cpu", *flags])


def test_a_run_writes_its_files_and_repeats(small_world, tmp_path, capsys):
    """Two runs with one seed give the same log, tables and adapter; the run folder can be loaded and used."""
    for name in ("one", "two"):
        run_once(small_world, tmp_path / name)
    logs = [
        [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")
    ]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(logs[0]) == 3
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["after"] == results[1]["after"] and results[0]["before"] != results[0]["after"]
    adapters = [(tmp_path / n / "checkpoints/step-3/adapter_model.safetensors").read_bytes() for n in ("one", "two")]
    assert adapters[0] == adapters[1]
    assert (tmp_path / "one/retrieval.png").exists()
    assert "untrained" in capsys.readouterr().out
    run = load_run(tmp_path / "one", "cpu")
    assert run.is_adapted and encode_text(run, ["a red circle"]).shape == (1, run.model.config.text.hidden_size)


def test_settings_that_switch_off(small_world, tmp_path):
    """Soft prompts alone, LoRA alone, AR alone and contrast alone all run, and train what they say."""
    for flags, tensors in (
        (["--lora_rank", "0"], 2),
        (["--no-soft_prompts"], 2 * 7 * 4),
        (["--contrastive_weight", "0"], 2 * 7 * 4 + 2),
        (["--ar_weight", "0", "--contrast", "long"], 2 * 7 * 4 + 2),
    ):
        run_once(small_world, tmp_path / "run", *flags)
        run = load_run(tmp_path / "run", "cpu")
        layers = len(run.model.language_model.layers)
        names = [
            n
            for n, _ in run.model.named_parameters()
            if ".lora_" in n or "embed_tokens.image" in n or "embed_tokens.text" in n
        ]
        assert len(names) == tensors // 4 * layers + tensors % 4 if tensors > 2 else len(names) == 2
        assert encode_text(run, ["a red circle"]).isfinite().all()
        if flags[0] != "--no-soft_prompts":  # AR alone never sees the text prompt, contrast sees both
            soft = run.model.language_model.embed_tokens
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
        (["--lr", "-1"], "learning rates"),
        (["--lora_rank", "0", "--no-soft_prompts"], "nothing to train"),
        (["--contrastive_weight", "0", "--ar_weight", "0"], "losses"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--batch_size", "100"], "batch of 100"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_flags_get_one_clear_line(small_world, tmp_path, flags, message):
    """Every unusable value ends in one line that names it."""
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(small_world / "train.jsonl"), "--out", str(tmp_path / "run"), "--device", "cpu", *flags])
    assert message in str(stop.value.code) and str(stop.value.code).startswith("error: ")
    assert "\n" not in str(stop.value.code)


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.json", "model.safetensors"], ["checkpoints/../notes"]])
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
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_learning_rate_reaches_its_peak():
    """It rises to 1 over the warm-up and falls to 0.05 at the end."""
    config = TrainConfig(steps=100, warmup=10)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[9] == 1 and factors[0] == 0.1 and factors[-1] == pytest.approx(0.05, abs=2e-3)
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_batch_without_any_caption_to_train_is_named(small_world):
    """Nothing to learn from is an error with its reason, not a crash in backward."""
    run = load_base(TOY_MODEL, "cpu")
    config = TrainConfig()
    add_adapters(run, config)
    batch = collate(["data.jsonl, record 3: no such image"], run.layout, 8)
    with pytest.raises(DataError, match="record 3"):
        training_step(run.model, batch, torch.tensor(0.0, requires_grad=True), config)


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
    """A rare faulty line is counted by its reason; more than the tolerance stops with the line and the reason."""
    run = load_base(TOY_MODEL, "cpu")
    good = (small_world / "train.jsonl").read_text().splitlines()
    (tmp_path / "rare.jsonl").write_text("\n".join(good * 4 + [line]))
    dataset = CaptionDataset(tmp_path / "rare.jsonl", run.layout, run.processor, small_world)
    assert len(dataset) == 4 * len(good) and sum(dataset.faults.values()) == 1 and reason in str(dataset.faults)
    (tmp_path / "often.jsonl").write_text("\n".join(["", line, *good[:5]]))  # empty lines count, as in an editor
    with pytest.raises(DataError, match="line 2") as error:
        CaptionDataset(tmp_path / "often.jsonl", run.layout, run.processor, small_world)
    assert reason in str(error.value)


def test_unreadable_images_are_counted(small_world, tmp_path):
    """A missing or foreign picture is reported with its record, and never silently dropped."""
    run = load_base(TOY_MODEL, "cpu")
    records = [json.loads(line) for line in (small_world / "train.jsonl").read_text().splitlines()[:3]]
    records[0]["image"], records[1]["image"] = "missing.png", "../../outside.png"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    dataset = CaptionDataset(tmp_path / "data.jsonl", run.layout, run.processor, small_world)
    batch = collate([dataset[index, 0] for index in range(3)], run.layout, 8)
    assert len(batch.skipped) == 2 and batch.num_pairs == 1
    assert "no such image" in batch.skipped[0] and "outside" in batch.skipped[1]


def test_sampler_resumes_and_keeps_groups():
    """Every epoch visits records once, in an order of its own; a later start continues it; groups stay together."""
    units = [0, 1, 1, 2, 3, 3, 4, 5, 6, 6]
    whole = list(ResumableSampler(units, 2, 12, seed=3))
    assert list(ResumableSampler(units, 2, 12, seed=3, first_step=7)) == whole[7:]
    first, second = ([index for batch in whole[i : i + 5] for index, _ in batch] for i in (0, 5))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    for pair in ((1, 2), (4, 5), (8, 9)):
        assert abs(first.index(pair[0]) - first.index(pair[1])) == 1
    assert list(ResumableSampler(units, 2, 12, seed=4)) != whole


def test_captions_are_routed_by_length(small_world, tmp_path):
    """Under 30 tokens a caption is short, from 30 on long, over 500 cut behind a sentence, wherever it was written."""
    run = load_base(TOY_MODEL, "cpu")
    word, sentence = "red ", "a red circle is left of a blue square. "
    record = {"image": "x.png", "short": [word * 29, word * 30, sentence * 80], "long": ["a red circle"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    dataset = CaptionDataset(tmp_path / "data.jsonl", run.layout, run.processor)
    short, long = dataset.captions(dataset.record(0))
    assert short == [word * 29, "a red circle"]
    assert len(long[0]) == 30 and 490 <= len(long[1]) <= 500
    assert run.tokenizer.decode(long[1]).endswith("blue square.")


def test_flags_are_the_fields(capsys):
    """--help shows every field with its default; an unknown flag is refused."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(TrainConfig))
    with pytest.raises(SystemExit):
        main(["--no_such_flag"])


def test_collate_pads_right_and_marks_labels(small_world):
    """Labels are the next token, exactly over the long caption and its end; rows are padded on the right."""
    run, samples, _ = prepared(TrainConfig(), small_world)
    lay_out = partial(collate, layout=run.layout, caption_share=1.0)
    chunk = lay_out(samples, micro_batch=64).images[0]
    for row in range(len(samples)):
        ids, labels = chunk.input_ids[row].tolist(), chunk.labels[row].tolist()
        sample = next(s for s in samples if run.layout.image_side(s.long) == ids[: len(run.layout.image_side(s.long))])
        expected = [*sample.long, run.layout.stop_id]
        start = run.layout.image_summary
        assert labels[start : start + len(expected)] == expected
        assert set(labels[:start] + labels[start + len(expected) :]) <= {-100}


# ---- Int8, precision, and what adapters belong to


def test_int8_holds_less_and_says_so(small_world):
    """A byte for each weight of the language model's layers; a step's losses hardly move."""
    losses = {}
    for int8 in (False, True):
        config = TrainConfig(int8=int8, batch_size=12)
        run = load_base(TOY_MODEL, "cpu", int8=int8)
        add_adapters(run, config)
        dataset = CaptionDataset(small_world / "train.jsonl", run.layout, run.processor)
        batch = collate([dataset[index, 0] for index in range(12)], run.layout, config.micro_batch)
        held = sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)
        losses[int8] = training_step(run.model, batch, torch.zeros((), requires_grad=True), config)
    linears = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    assert held == pytest.approx(4 * (2_265_728 - linears) + linears, rel=0.01)
    assert losses[True]["loss"] == pytest.approx(losses[False]["loss"], rel=0.02) and losses[True] != losses[False]


@pytest.mark.parametrize("fastest", [torch.float16, torch.float32])
def test_the_first_line_says_device_and_precision(small_world, tmp_path, monkeypatch, capsys, fastest):
    """Where only fp16 would be fast, training is in fp32; the first line of output says what is used."""
    monkeypatch.setattr("eval.pick_device", lambda name: (torch.device("cpu"), fastest))
    settings = ["--data", str(small_world / "train.jsonl"), "--out", str(tmp_path / "run"), "--steps", "1"]
    main([*settings, "--batch_size", "4"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "training on cpu (the best device here) in float32, 1 process(es)"


def test_a_run_knows_its_base_model(small_world, tmp_path):
    """Adapters are refused on another base, also one of the same shapes; the same base in other files is fine."""
    settings = ["--data", str(small_world / "train.jsonl"), "--out", str(tmp_path / "run"), "--steps", "1"]
    main([*settings, "--batch_size", "4", "--device", "cpu"])
    base = tmp_path / "base"
    shutil.copytree(TOY_MODEL, base)
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": str(base)}))
    expected = encode_text(load_run(tmp_path / "run", "cpu"), ["a star"])

    tensors = load_file(base / "model.safetensors")
    renamed = {n.replace("language_model.model.", "model.language_model."): t.double() for n, t in tensors.items()}
    save_file(
        {n.replace("language_model.lm_head", "lm_head"): t for n, t in renamed.items()}, base / "model.safetensors"
    )
    assert torch.equal(encode_text(load_run(tmp_path / "run", "cpu"), ["a star"]), expected)

    tensors["language_model.model.layers.2.mlp.up_proj.weight"] += 0.01
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(AdapterError, match="base was '[0-9a-f]{64}' and is '[0-9a-f]{64}'; use the base model"):
        load_run(tmp_path / "run", "cpu")
