"""The figures' numbers are those of transformers and of examples worked by hand; every command
draws.
"""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fast
import lora
from eval import TOY_MODEL, Embedder, encode_image, encode_text, load_base, load_embedder
from figures import attention, captions, common, curves, gallery, prompts, soft, tokens
from figures.__main__ import MODULES, main
from figures.common import BEFORE
from formats.files import InputError
from lora import SoftPrompt, adapters_disabled, merge_lora
from model import Llava
from toy import world
from train import TrainConfig, add_adapters


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight pictures of the toy world, in data.py's format."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, "test") for _ in range(8)]
    records = []
    with open(folder / "pictures.bin", "wb") as pictures:
        for scene in scenes:
            record = world.training_record(scene, None, pictures, rng)
            records.append(record | {"image": "pictures.bin"})
    world.save_lines(folder / "test.jsonl", records)
    return folder / "test.jsonl"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of the toy whose adapters are far from where they start, without the minutes of
    training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "toy"
    config = TrainConfig()
    embedder = load_base(TOY_MODEL, "cpu")
    add_adapters(embedder, config)
    with torch.no_grad():
        for name, parameter in embedder.model.named_parameters():
            if "lora_B" in name or name.endswith(("embed_tokens.image", "embed_tokens.text")):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    lora.save_adapter(embedder.model, folder / "checkpoints" / "step-1", embedder.notes)
    (folder / "checkpoints" / "latest").write_text("step-1\n")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    step = {"chance": 2.08, "autoregressive": 1.0, "temperature": 0.07}
    lines = []
    for number in range(3):
        line = {**step, "step": number, "contrastive": 2.0 / (1 + number)}
        lines.append(json.dumps(line) + "\n")
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def items(data, trained):
    return common.read_items(data, load_embedder(trained))


# ---- Attention and tokens, beside transformers on the same weights


@pytest.fixture(scope="module", params=["base", "adapters off", "adapters merged"])
def pair(request, trained, tmp_path_factory):
    """Our embedder, transformers' model of the same weights, and a function from our ids to its
    input embeddings."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder, soft, vocabulary = TOY_MODEL, None, None
    embedder = (
        load_base(TOY_MODEL, "cpu") if request.param == "base" else load_embedder(trained, "cpu")
    )
    if request.param == "adapters off":
        for module in lora.adapters(embedder.model).values():
            module.enabled = False
    if request.param == "adapters merged":
        merged, folder = load_embedder(trained, "cpu").model, tmp_path_factory.mktemp("merged")
        merge_lora(merged)
        embedding = merged.language_model.embed_tokens
        soft, vocabulary = torch.cat([embedding.image, embedding.text]), len(embedding.weight)
        merged.language_model.embed_tokens = torch.nn.Embedding.from_pretrained(embedding.weight)
        merged.save_pretrained(folder)
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()

    def embed(ids):
        if soft is None:  # adapters off: the hand-written tokens that the soft ids began as
            began = embedder.layout.prompt_ids
            size = embedder.model.config.text.vocab_size
            return reference.get_input_embeddings()(
                torch.tensor([[i if i < size else began[i - size] for i in ids]])
            )
        plain = reference.get_input_embeddings()(
            torch.tensor([[min(i, vocabulary - 1) for i in ids]])
        )
        rows = [soft[i - vocabulary] if i >= vocabulary else row for i, row in zip(ids, plain[0])]
        return torch.stack(rows)[None]

    return embedder, reference, embed


@torch.no_grad()
def test_attention_is_that_of_transformers(pair, items):
    embedder, reference, embed = pair
    ours = attention.summary_attention(
        embedder, common.image_features(embedder, items), batch_size=3
    )  # (B, L, H, T)
    ids = embedder.layout.image_side()
    is_image = torch.tensor(ids) == embedder.layout.image_id
    for row, item in zip(ours, items):
        theirs = reference(
            inputs_embeds=embed(ids),
            pixel_values=embedder.pixel_values([item.open()]),
            output_attentions=True,
        ).attentions
        theirs = torch.stack([layer[0, :, -1] for layer in theirs])  # (L, H, T)
        assert row.shape == theirs.shape == (4, 4, len(ids))
        torch.testing.assert_close(row, theirs, atol=1e-4, rtol=0)
    numbers = attention.measure(embedder, items[-1:], [[1, 2]])
    on_image = theirs[..., is_image]
    torch.testing.assert_close(torch.tensor(numbers["mass"]), on_image.sum(-1), atol=1e-4, rtol=0)
    spread = on_image / on_image.sum(-1, keepdim=True)
    torch.testing.assert_close(
        torch.tensor(numbers["density"]), -(spread * spread.log()).sum(-1), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        torch.tensor(numbers["maps"][0]["weights"][0]), on_image[1, 2], atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_next_tokens_are_those_of_transformers(pair, items):
    embedder, reference, embed = pair
    texts = [embedder.layout.text_side(item.short[0]) for item in items]
    assert len({len(text) for text in texts}) > 1  # so that padding matters
    features = common.image_features(embedder, items)
    image_rows = [embedder.layout.image_side()] * len(items)
    ours = common.next_token(
        embedder, common.summaries(embedder, image_rows, features, batch_size=3)
    )
    for row, item in zip(ours, items):
        pixel_values = embedder.pixel_values([item.open()])
        theirs = reference(inputs_embeds=embed(image_rows[0]), pixel_values=pixel_values).logits[
            0, -1
        ]
        torch.testing.assert_close(row, theirs.log_softmax(-1), atol=1e-4, rtol=0)
    ours = common.next_token(embedder, common.summaries(embedder, texts, batch_size=3))
    for row, text in zip(ours, texts):
        theirs = reference(inputs_embeds=embed(text)).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(row, theirs, atol=1e-4, rtol=0)
    last = tokens.measure(embedder, items[-1:], k=5)
    chosen, top = last["examples"][0]["captions_top"], theirs.exp().topk(5)
    assert [token for token, _ in chosen] == [
        common.word(embedder, index) for index in top.indices.tolist()
    ]
    assert [p for _, p in chosen] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert last["captions"]["entropy"] == pytest.approx(
        -(theirs.exp() * theirs).sum().item(), abs=1e-3
    )


@pytest.mark.parametrize("text", ["llama", "qwen2"])  # biases in qwen2
def test_attention_with_grouped_heads(make_checkpoint, text):
    folder, reference = make_checkpoint("siglip", text)
    reference.set_attn_implementation("eager")
    model = Llava.from_pretrained(folder)
    image_id = model.config.image_token_id
    row = [5] + [image_id] * model.config.num_image_tokens + [7, 11, 13]
    layout = SimpleNamespace(image_side=lambda: row, image_id=image_id)
    embedder = Embedder(model, layout, None)
    pixel_values = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        ours = attention.summary_attention(embedder, model.image_features(pixel_values))
        ids = torch.tensor([row] * 2)
        theirs = reference(
            input_ids=ids, pixel_values=pixel_values, output_attentions=True
        ).attentions
    assert ours.shape == (2, 2, 4, len(row))
    torch.testing.assert_close(
        ours, torch.stack([layer[:, :, -1] for layer in theirs], 1), atol=1e-4, rtol=0
    )
    assert not any(layer._forward_pre_hooks for layer in model.language_model.layers)


def test_attention_of_lean_layers(trained, items):
    """A model that was just trained has them: the same weights as of the plain ones."""
    embedder = load_embedder(trained, "cpu")
    features = common.image_features(embedder, items)
    plain = attention.summary_attention(embedder, features)
    fast.install(embedder.model)
    kinds = {type(layer).__name__ for layer in embedder.model.language_model.layers}
    assert kinds == {"LeanDecoderLayer"}
    lean = attention.summary_attention(embedder, features)
    torch.testing.assert_close(lean, plain, atol=1e-5, rtol=0)


# ---- Small calculations, by hand


def test_entropy_and_spectrum():
    assert common.entropy(torch.full((2, 8), 1 / 8).log()).tolist() == pytest.approx(
        [math.log(8)] * 2
    )
    assert common.entropy(torch.tensor([0.0, -torch.inf])).item() == 0
    cross = (
        torch.cat([torch.eye(5), -torch.eye(5)]) + 3.0
    )  # five directions alike, and a mean to take away
    rank, variance = prompts.spectrum(cross)
    assert rank == pytest.approx(5, abs=1e-3) and variance == pytest.approx(
        [20, 40, 60, 80, 100], abs=1e-2
    )
    line = torch.arange(6.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    rank, variance = prompts.spectrum(line)
    assert rank == pytest.approx(1, abs=1e-3) and variance[0] == pytest.approx(100)


def test_spearman():
    assert prompts.ranks(np.array([1, 2, 2, 4])).tolist() == [1, 2.5, 2.5, 4]
    # ranks of y 1, 3, 2, 5, 4: 1 - 6 * (0 + 1 + 1 + 1 + 1) / (5 * 24)
    assert prompts.spearman([1, 2, 3, 4, 5], [10, 30, 20, 50, 40])["rho"] == pytest.approx(0.8)
    x = list(range(12))
    up, flat = (
        prompts.spearman(x, [math.exp(value) for value in x]),
        prompts.spearman(x, [1.0] * 12),
    )
    assert up["rho"] == pytest.approx(1) and up["p"] < 0.001 and up["low"] > 0.9
    assert flat["rho"] == 0 and flat["p"] == 1
    assert prompts.spearman(x, x[::-1])["rho"] == pytest.approx(-1)
    random_order = prompts.spearman(x, [5, 2, 11, 0, 8, 3, 10, 1, 9, 6, 4, 7])
    assert random_order["p"] > 0.3 and random_order["low"] < 0 < random_order["high"]


def test_false_sentences():
    reference = (
        "There are two objects on a navy background. In the top left there is a large cyan heart. "
    )
    reference += (
        "In the bottom left there is a small pink square. The cyan heart is above the pink square."
    )
    said = (
        "there are two objects on a gray background. in the top left there is a large cyan heart. "
        "moon moon. the pink square is above the cyan heart. the cyan heart is above"
    )
    found = captions.false_sentences(said, reference)
    assert [is_true for _, is_true in found] == [False, True, None, False, None]
    assert " ".join(sentence for sentence, _ in found) == said
    with pytest.raises(InputError, match="not a long caption"):
        captions.false_sentences(said, "A dog on a sofa.")


def test_the_prompts_begin_with_the_papers():
    pairs = json.loads(prompts.PROMPTS.read_text())
    assert pairs[0] == [TrainConfig.image_prompt, TrainConfig.text_prompt]
    assert len({tuple(pair) for pair in pairs}) == len(pairs) >= 30


# ---- What the analyses tell


def test_prompts_prefer_the_papers_to_a_plain_question(items):
    embedder = load_base(TOY_MODEL, "cpu")
    pairs = [
        [TrainConfig.image_prompt, TrainConfig.text_prompt],
        ["How many objects are there?"] * 2,
        ["One word:"] * 2,
    ]
    numbers = prompts.measure(embedder, items, pairs)
    best, worst, _ = numbers["prompts"]
    assert (
        best["r1"] > worst["r1"]
        and best["entropy"] > worst["entropy"] + 1
        and best["rank"] > worst["rank"]
    )
    assert best["r1"] == (best["t2i_r1"] + best["i2t_r1"]) / 2 and best["unknown_words"] == 0
    assert all(0 <= share <= 100.001 for share in best["image_variance"])


def test_prompts_are_of_the_base_model(trained, items):
    pairs = [["In one word:", "In one word:"]] * 3
    ours, base = (
        prompts.measure(load_embedder(folder), items, pairs) for folder in (trained, TOY_MODEL)
    )
    assert ours == base


def test_before_is_the_base_model_and_after_is_not(trained, items):
    found = common.compare({"both": [trained, trained]}, lambda each: tokens.measure(each, items))
    assert (
        list(found) == [BEFORE, "both"]
        and len(found["both"]) == 2
        and found["both"][0] == found["both"][1]
    )
    assert found[BEFORE] == [tokens.measure(load_base(TOY_MODEL, "cpu"), items)]
    assert found["both"][0]["images"]["entropy"] != found[BEFORE][0]["images"]["entropy"]
    assert common.compare({"trained": [TOY_MODEL]}, lambda each: 1) == {BEFORE: [1]}
    with pytest.raises(InputError, match="another base model"):
        settings = json.loads((trained / "config.json").read_text())
        other = trained.with_name("other")
        other.mkdir()
        (other / "checkpoints").symlink_to(trained / "checkpoints")
        (other / "config.json").write_text(json.dumps(settings | {"model": str(TOY_MODEL)}))
        common.compare({"both": [trained, other]}, lambda each: 1)


def test_summaries_come_back_in_order_with_their_own_pictures(items):
    embedder = load_base(TOY_MODEL, "cpu")
    questions = ["How many objects are there?", "One word:", "What is in the top left?", ""]
    rows, features = (
        [embedder.layout.question(text) for text in questions],
        common.image_features(embedder, items[:4]),
    )
    together = common.summaries(embedder, rows, features, batch_size=2)
    for row, feature, state in zip(rows, features, together):
        torch.testing.assert_close(
            common.summaries(embedder, [row], feature[None])[0], state, atol=1e-4, rtol=0
        )


def test_tokens_counts(items):
    numbers = tokens.measure(load_base(TOY_MODEL, "cpu"), items, k=4, shown=2)
    for kind in ("images", "captions"):
        assert 4 <= numbers[kind]["different"] <= 4 * len(items)
        assert 0 <= numbers[kind]["rarity"] <= math.log(len(items))
        assert numbers[kind]["sorted"] == sorted(numbers[kind]["sorted"], reverse=True)
        assert numbers[kind]["top1"] == numbers[kind]["sorted"][0]
    assert len(numbers["examples"]) == 2 and len(numbers["examples"][0]["images_top"]) == 4
    alone = tokens.measure(load_base(TOY_MODEL, "cpu"), items[:1], k=4)["images"]
    assert alone["rarity"] == 0 and alone["different"] == 4


def test_soft_prompts_that_moved_to_a_token(trained):
    embedder = load_embedder(trained)
    embedding: SoftPrompt = embedder.model.language_model.embed_tokens
    with torch.no_grad():
        starts = embedding.weight[embedding.prompt_ids].split(
            [len(embedding.image), len(embedding.text)]
        )
        embedding.image.copy_(starts[0])
        embedding.text.copy_(starts[1])
        heart = embedder.tokenizer.tokenizer.token_to_id("heart")
        embedding.image[0] = embedding.weight[heart]
        embedding.text[-1] = 1.5 * starts[1][-1]
    image, text = soft.measure(embedder).values()
    assert (image[0]["start"], image[0]["nearest_cosine"], image[0]["nearest_l2"]) == (
        "summarize",
        "heart",
        "heart",
    )
    assert (
        image[0]["gaps"] >= 1
        and not image[0]["stayed"]
        and image[0]["l2"] == pytest.approx(0, abs=1e-6)
    )
    assert text[-1]["moved"] == pytest.approx(0.5, rel=1e-4) and text[-1][
        "cosine_to_start"
    ] == pytest.approx(1)
    for row in image[1:] + text[:-1]:
        assert (
            row["moved"] == pytest.approx(0, abs=1e-6)
            and row["stayed"]
            and row["nearest_l2"] == row["start"]
        )
    assert "appears:" in soft.say({BEFORE: [{}], "both": [{"image": image, "text": text}]})
    image[0]["moved"] = text[-1]["moved"] = 0.0
    for row in image[1:] + text[1:-1]:
        row["moved"] = 1.0
    assert "does not appear" in soft.say({BEFORE: [{}], "both": [{"image": image, "text": text}]})
    with pytest.raises(InputError, match="no soft prompts"):
        soft.measure(load_base(TOY_MODEL, "cpu"))


def test_gallery_finds_by_cosine(items):
    embedder = load_base(TOY_MODEL, "cpu")
    numbers = gallery.measure(embedder, items, k=3)
    scores = (
        encode_text(embedder, [item.short[0] for item in items])
        @ encode_image(embedder, [item.open() for item in items]).T
    )
    assert numbers["found"] == scores.topk(3).indices.tolist()
    hits = (scores.argmax(1) == torch.arange(len(items))).float().mean().item()
    assert numbers["t2i_r1"] == pytest.approx(100 * hits)


def test_gallery_shows_queries_that_one_model_answers_wrongly():
    before = {"items": 5, "t2i_r1": 60.0, "found": [[0], [1], [0], [3], [1]]}
    after = {"items": 5, "t2i_r1": 80.0, "found": [[0], [2], [2], [3], [4]]}
    assert gallery.interesting(before, after, 2) == [1, 2] and gallery.interesting(
        before, after, 4
    ) == [0, 1, 2, 4]
    told = gallery.say({BEFORE: [before], "both": [after]})
    assert "60.0 -> 80.0" in told and "2 mended, 1 broken" in told and "retrieval appears" in told


def compared(*values):
    kinds = [{"entropy": value, "different": value} for value in values]
    rows = [{"images": kind, "captions": kind, "mean_density": kind["entropy"]} for kind in kinds]
    rows = [
        row | {"density": [[row["mean_density"]]], "mean_mass": 0.5, "image_tokens": 16}
        for row in rows
    ]
    return {BEFORE: rows[:1], "both": rows[1:]}


def test_sentences_follow_the_numbers():
    for say in (tokens.say, attention.say):
        assert " appears:" in say(compared(1.0, 1.5, 1.2))
        assert "does not appear:" in say(compared(1.0, 0.5, 0.9))
        assert "does not appear:" in say(compared(1.0, 1.5, 0.9))  # seeds disagree
    assert "1.00 -> 1.35 (1.20 to 1.50, 2 seeds)" in tokens.say(compared(1.0, 1.5, 1.2))
    prompted = [
        {
            "prompted": {"words": 50.0, "attributes": a},
            "described": {"words": 50.0, "attributes": a},
        }
        for a in (99, 98, 1)
    ]
    told = captions.say({BEFORE: prompted[:1], "both": prompted[1:2], "contrastive": prompted[2:]})
    assert (
        "both: captioning survives" in told and "contrastive: captioning does not survive" in told
    )


def test_curves_of_a_run_that_goes_on(trained, tmp_path):
    (only,) = curves.measure({"a": [trained]})["a"]
    assert only["log"]["contrastive"] == [2.0, 1.0, pytest.approx(2 / 3)] and "after" not in only
    lines = (trained / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(
        lines + '{"step": 1, "contrastive": 7.0}\n{"step": 3, "contr'
    )  # a resume, a kill
    (resumed,) = curves.measure({"a": [tmp_path]})["a"]
    assert resumed["log"]["step"] == [0, 1, 2] and resumed["log"]["contrastive"][1] == 7.0
    (tmp_path / "log.jsonl").write_text('{"step": 0, "contr\n' + lines)
    with pytest.raises(InputError, match="line 1 is not a step"):
        curves.measure({"a": [tmp_path]})
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="no step yet"):
        curves.measure({"a": [tmp_path]})


# ---- The commands


def test_commands_write_numbers_pictures_and_a_sentence(trained, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    some = tmp_path / "prompts.json"
    some.write_text(json.dumps(json.loads(prompts.PROMPTS.read_text())[::10]))
    both = ["--runs", f"both={trained}", f"both={trained}", f"other={trained}", "--data", str(data)]
    commands = {
        "prompts": ["--model", str(TOY_MODEL), "--data", str(data), "--prompts", str(some)],
        "tokens": both,
        "attention": [*both, "--heads", "0.1", "3.2"],
        "captions": [*both, "--limit", "2"],
        "soft": both[:-2],
        "gallery": both,
        "curves": [f"a={trained}", f"a={trained}", str(trained)],
    }
    assert commands.keys() == MODULES.keys()
    for command, arguments in commands.items():
        main([command, *arguments, "--out", str(tmp_path / "out")])
        printed = capsys.readouterr().out
        assert f"{command}.png" in printed and len(printed) > 80
        numbers = json.loads((tmp_path / "out" / f"{command}.json").read_text())
        assert numbers
        assert (tmp_path / "out" / f"{command}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    numbers = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert numbers["both"][0]["chosen"] == [[0, 1], [3, 2]]


def test_toy_captions_are_drawn_sentence_by_sentence(trained, items):
    pytest.importorskip("matplotlib")
    found = common.compare(
        {"both": [trained]},
        lambda each: captions.measure(each, items[:2], world.score_captions, 80),
    )
    assert (
        found[BEFORE][0]["prompted"]["attributes"] > 80 > found["both"][0]["prompted"]["attributes"]
    )
    assert found[BEFORE][0]["described"] == found[BEFORE][0]["prompted"]
    texts = [
        text.get_text()
        for part in captions.draw(found).subfigs
        for ax in part.axes
        for text in ax.texts
    ]
    assert "background." in texts and "before training" in texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens", "--model", "nowhere"], "nowhere: no such folder"),
        (["soft", "--model", str(TOY_MODEL)], "no soft prompts"),
        (["curves", str(TOY_MODEL)], "log.jsonl: cannot be read"),
        (["tokens", "--runs", f"before={TOY_MODEL}"], "name of the base model"),
        (
            ["prompts", "--model", str(TOY_MODEL), "--data", "DATA", "--prompts", "PAIRS"],
            "not a list of pairs",
        ),
        (
            ["gallery", "--model", str(TOY_MODEL), "--data", "LONG"],
            "none of 1 records has a caption of fewer than 30",
        ),
    ],
)
def test_faults_are_one_line(arguments, message, tmp_path, data):
    record = json.loads(data.read_text().splitlines()[0]) | {"short": []}
    files = {"DATA": data, "PAIRS": tmp_path / "pairs.json", "LONG": data.with_name("long.jsonl")}
    files["PAIRS"].write_text('[["one", "two"], ["three"]]')
    world.save_lines(files["LONG"], [record])
    arguments = [str(files.get(argument, argument)) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments",
    [["attention", "--heads", "one"], ["tokens", "--limit", "0"], ["tokens", "-k", "-1"]],
)
def test_numbers_that_are_none(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"argument {arguments[1]}" in capsys.readouterr().err


def test_a_head_that_is_not_there(items):
    with pytest.raises(InputError, match="no head 4.0: there are layers 0 to 3 with heads 0 to 3"):
        attention.measure(load_base(TOY_MODEL, "cpu"), items[:1], [[4, 0]])


def test_pictures_are_drawn_as_the_model_sees_them(items):
    embedder = load_base(TOY_MODEL, "cpu")
    seen = common.decode_picture(common.as_seen(embedder, items[0]))
    assert (
        seen.shape == (48, 48, 3)
        and np.abs(seen.astype(int) - np.asarray(items[0].open())).max() <= 1
    )


def test_adapters_stay_as_they_were(trained, items):
    embedder = load_embedder(trained)
    prompts.measure(embedder, items[:4], [["One word:", "One word:"]] * 3)
    assert embedder.is_adapted
    with adapters_disabled(embedder.model):
        assert not embedder.is_adapted


@pytest.mark.parametrize(
    ("new", "direction"),
    [
        ([1.2, 1.3], "up"),
        ([0.9], "down"),
        ([1.2, 0.9], "mixed"),
        ([1.005], "mixed"),
        ([0.995, 0.9], "mixed"),
    ],
)
def test_a_trend_needs_a_percent_and_all_seeds(new, direction):
    """Up or down where every seed moves by more than a hundredth, else mixed."""
    assert common.trend(1.0, new)[0] == direction
