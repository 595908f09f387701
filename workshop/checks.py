"""The checkers of the exercises: `checks.exercise_1_1(mine)` prints what was right, or raises NotYet with a hint.

In a notebook a NotYet is shown as its one sentence, without a traceback. A checker never needs anything from an
exercise before it.
"""

import functools
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F


class NotYet(Exception):
    """An answer that is blank or wrong; the message is a hint."""

    def _render_traceback_(self):  # what a notebook shows instead of a traceback
        return [f"✗ {self}"]


def exercise(number: str, learned: str):
    """Make a checker: blanks and errors of the answer become hints, success is printed."""

    def decorate(check):
        @functools.wraps(check)
        def checked(*arguments):
            try:
                torch.manual_seed(0)
                with torch.enable_grad():
                    check(*arguments)
            except NotYet as hint:
                raise NotYet(f"exercise {number}: {with_reminder(str(hint), arguments)}") from None
            except Exception as error:
                found = f"your code stops with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise NotYet(f"exercise {number}: {with_reminder(found, arguments)}") from None
            print(f"✓ exercise {number}: {learned}")

        return checked

    return decorate


def with_reminder(hint: str, answers) -> str:
    """The hint; where an answer, a function or a class with methods, still holds a bare `...`, it says so."""
    found = [each for answer in answers for each in (answer, *getattr(answer, "__dict__", {}).values())]
    codes = [function.__code__ for function in found if hasattr(function, "__code__")]
    constants = [constant for code in codes for constant in code.co_consts]
    constants += [inner for constant in constants for inner in getattr(constant, "co_consts", ())]  # of generators
    if not any(constant is ... for constant in constants):
        return hint
    blank = "fill in the blank, `...`"
    return blank if "llipsis" in hint or "blank" in hint else f"{hint} (there is still a blank, `...`)"


def need(condition, hint: str) -> None:
    if not condition:
        raise NotYet(hint)


def tensor(value, shape: tuple, what: str = "the result") -> torch.Tensor:
    """The answer as a tensor of this shape, or a hint."""
    need(value is not ... and value is not None, f"{what} is {value}: fill in the blank, `...`")
    need(isinstance(value, torch.Tensor), f"{what} is a {type(value).__name__}, not a tensor")
    need(tuple(value.shape) == tuple(shape), f"{what} has the shape {tuple(value.shape)}, wanted is {tuple(shape)}")
    return value


def close(value, wanted, tolerance: float = 1e-4) -> bool:
    return torch.allclose(
        torch.as_tensor(value).double(), torch.as_tensor(wanted).double(), rtol=tolerance, atol=tolerance
    )


@contextmanager
def replaced(owner, name: str, value):
    """Inside, `owner.name` is `value`; afterwards it is what it was."""
    had, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# ---- 1. The forward pass


@exercise("1.1", "a convolution whose stride is its kernel is one matrix for all patches.")
def exercise_1_1(patch_embedding):
    pixels, weight = torch.randn(2, 3, 12, 12), torch.randn(5, 3, 4, 4)
    wanted = F.conv2d(pixels, weight, stride=4).flatten(2).transpose(1, 2)  # (2, 9, 5)
    value = tensor(patch_embedding(pixels, weight), wanted.shape)
    if close(value.transpose(1, 2).reshape_as(wanted), wanted) or close(value[:, [0, 3, 6, 1, 4, 7, 2, 5, 8]], wanted):
        raise NotYet("the patches are in the wrong order: row by row, from left to right")
    need(
        close(value, wanted),
        "the shape is right, the numbers are not: flatten channels, rows and columns of both in the same order",
    )


@exercise("1.2", "an image token is a place in the sequence; its id means nothing to the language model.")
def exercise_1_2(splice):
    table = torch.randn(11, 4)
    input_ids = torch.tensor([[1, 7, 7, 3], [7, 7, 2, 5]])
    features = torch.randn(2, 2, 4)
    before = table.clone()
    value = tensor(splice(input_ids, features, table, 7), (2, 4, 4))
    need(torch.equal(table, before), "the table itself was changed; write into the embeddings of this batch")
    need(not close(value, table[input_ids]), "the features are nowhere: assign them to embeddings[is_image]")
    is_image = (input_ids == 7)[..., None]
    wanted = table[input_ids].masked_scatter(is_image, features)
    need(close(value[~is_image[..., 0]], wanted[~is_image[..., 0]]), "words changed, too: is the mask right?")
    need(close(value, wanted), "the features are in the wrong order: picture by picture, patch by patch")


@exercise("1.3", "each row sums to 1, and no token sees what is behind it.")
def exercise_1_3(attention_weights):
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    identity = torch.eye(5).expand(2, 3, 5, 5)
    wanted = F.scaled_dot_product_attention(q, k, identity, is_causal=True)
    value = tensor(attention_weights(q, k), wanted.shape)
    need(not value.isnan().any(), "there are NaNs: mask the FUTURE (above the diagonal), not everything")
    need(close(value.triu(1), torch.zeros_like(value)), "a token sees its future: mask the scores before the softmax")
    need(close(value.sum(-1), torch.ones(2, 3, 5)), "rows do not sum to 1: mask before the softmax, not after")
    unscaled = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    need(not close(value, unscaled), "divide the scores by the square root of head_dim")
    need(close(value, wanted), "the pattern is right, the numbers are not: scores = q @ k.transpose(-1, -2) / ...")


@exercise("1.4", "a caption is the model's own likeliest words, one after the other.")
def exercise_1_4(answer, run, image):
    pixels = run.pixel_values([image])
    prompt = run.layout.question("Describe the image in detail.")
    before = list(prompt)
    with torch.no_grad():
        value = answer(run.model, prompt, pixels, 12)
        wanted = run.model.generate([before], pixels, 12)[0]
    need(isinstance(value, list), f"return the list of new ids, not {type(value).__name__}")
    need(... not in value, "fill in the blank, `...`")
    need(all(isinstance(token, int) for token in value), "the ids are tensors: .item() makes a number of one")
    need(
        value[:1] == wanted[:1],
        f"the first id is {value[:1]}, wanted {wanted[:1]}: the logits behind the LAST position",
    )
    need(value == wanted, f"got {run.tokenizer.decode(value)!r}, wanted {run.tokenizer.decode(wanted)!r}")


# ---- 2. From next token to embedding


@exercise("2.1", "the summary stands at lengths - 1; what is behind it is padding.")
def exercise_2_1(summary_states):
    hidden, lengths = torch.randn(3, 6, 4), torch.tensor([4, 6, 2])
    value = summary_states(hidden, lengths)
    need(value is not ..., "fill in the blank, `...`")
    if isinstance(value, torch.Tensor) and value.shape == hidden.shape:
        raise NotYet("fill in the blank: hidden[rows, positions] wants a position for each row")
    value, rows = tensor(value, (3, 4)), torch.arange(3)
    need(not close(value, hidden[:, -1]), "this is hidden[:, -1]: rows 0 and 2 end in padding, which means nothing")
    need(not close(value, hidden[rows, lengths.clamp(max=5)]), "one too far: positions are counted from 0")
    need(close(value, hidden[rows, lengths - 1]), "not the last real token of each row: which index is it?")


@exercise("2.2", "the same embeddings as eval.encode_text.")
def exercise_2_2(embed_texts, run):
    from eval import encode_text

    texts = ["a red ring", "a large blue star above a small pink heart on a navy background.", "a dome"]
    with torch.no_grad():
        value, wanted = tensor(embed_texts(run, texts), (3, run.model.config.text.hidden_size)), encode_text(run, texts)
    need(close(value.norm(dim=-1), torch.ones(3)), "the rows do not have unit length: F.normalize(..., dim=-1)")
    need(not close(value[1], value[0]), "all rows are the same: take the summary of each row")
    need(
        close(value[1], wanted[1]),
        "even the longest text is wrong: did the summary come from run.model's hidden states?",
    )
    need(close(value, wanted), "only the longest text is right: the others' summaries are at lengths - 1, not at -1")


@exercise("2.3", "ties count against the model, so a broken one cannot score by luck.")
def exercise_2_3(recall_at_1):
    scores, right = torch.randn(40, 9), torch.randint(9, (40,))
    value = recall_at_1(scores, right)
    need(isinstance(value, float), f"the result is {value!r}, not a number: fill in the blank")
    wanted = 100 * (scores.argmax(1) == right).double().mean().item()
    need(abs(value - wanted) < 1e-6, f"{value:.1f} %, but {wanted:.1f} % of these texts rank their picture first")
    tied = recall_at_1(torch.ones(40, 9), right)
    need(tied == 0, f"where all scores are equal it says {tied:.0f} %: count the pictures with scores >= own")


@exercise("2.4", "0 for a sure model, log V for a clueless one.")
def exercise_2_4(entropy):
    logits = torch.randn(4, 7) * 3
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    value = tensor(entropy(logits), (4,))
    need(not close(value, -wanted), "the sign: entropy is positive")
    need(not close(value, wanted / math.log(2)), "these are bits; use the natural logarithm")
    need(close(value, wanted), "minus the sum over the vocabulary of p times log p; p is log_p.exp()")
    sure = entropy(torch.tensor([[200.0, 0.0, 0.0]]))
    need(close(sure, [0.0]) and not sure.isnan().any(), "a sure model gives NaN: use log_p, never log(p)")


# ---- 3. The two losses


@exercise("3.1", "cosine similarities as logits, a cross-entropy over rows and one over columns.")
def exercise_3_1(info_nce):
    from losses import contrastive_loss

    images, texts = torch.randn(6, 5) * 3, torch.randn(6, 5)
    wanted = contrastive_loss(images, texts, 10.0)
    value = tensor(info_nce(images, texts, 10.0), ())
    a, b = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    rows, target = 10.0 * a @ b.T, torch.arange(6)
    one, other = F.cross_entropy(rows, target), F.cross_entropy(rows.T, target)
    need(not close(value, 10 * images @ texts.T), "this is the similarity")
    need(
        not close(value, one) and not close(value, other), "one direction only: images must find texts AND texts images"
    )
    need(not close(value, one + other), "the mean of both directions, not their sum")
    raw = F.cross_entropy(10.0 * images @ texts.T, target)
    need(not close(value, raw), "not normalised: cosine similarity wants rows of unit length")
    cold = (F.cross_entropy(rows / 100, target) + F.cross_entropy(rows.T / 100, target)) / 2
    need(not close(value, cold), "multiply by the scale; it is 1 / temperature already")
    need(close(value, wanted), f"the loss is {value.item():.4f}, wanted is {wanted.item():.4f}")


@exercise("3.2", "position t predicts token t + 1, from the summary on; everything else is ignored.")
def exercise_3_2(caption_labels, run):
    from data import IGNORE

    layout = run.layout
    caption = run.tokenizer.encode("There are two objects on a navy background.")
    ids = torch.tensor(layout.image_side(caption))
    value = tensor(caption_labels(ids, layout.image_summary), ids.shape)
    wanted = torch.full_like(ids, IGNORE)
    wanted[layout.image_summary : -1] = ids[layout.image_summary + 1 :]
    need(value[layout.image_summary] != IGNORE, "the summary position itself predicts the caption's first token")
    need(
        (value[: layout.image_summary] == IGNORE).all(),
        "picture and prompt are not trained on: IGNORE before the summary",
    )
    same = (value[layout.image_summary : -1] == ids[layout.image_summary : -1]).all()
    need(not same, "each position predicts itself, which needs no thinking: shift by one")
    need(value[-1] == IGNORE, "behind the last token comes nothing: its label is IGNORE")
    need(torch.equal(value, wanted), "labels[t] must be ids[t + 1] for every t from the summary on")


@exercise("3.3", "one forward pass, two losses.")
def exercise_3_3(one_pass, run, chunk, num_tokens):
    from losses import cross_entropy_of_logits

    model, calls = run.model, []
    hook = model.language_model.register_forward_hook(lambda module, inputs, output: calls.append(output))
    try:
        with torch.no_grad():
            value = one_pass(model, chunk, num_tokens)
    finally:
        hook.remove()
    need(isinstance(value, tuple) and len(value) == 2, "return two things: embeddings, loss")
    need(len(calls) == 1, f"the language model ran {len(calls)} times; once is the trick")
    hidden = calls[0]
    embeddings = tensor(value[0], (len(hidden), hidden.shape[-1]), "the first result")
    loss = tensor(value[1], (), "the second result")
    need(not close(embeddings, hidden[:, -1]), "hidden[:, -1] is behind the caption: the summary is at chunk.summary")
    need(close(embeddings, hidden[torch.arange(len(hidden)), chunk.summary]), "the embeddings are not at chunk.summary")
    with torch.no_grad():
        wanted = cross_entropy_of_logits(hidden, model.lm_head.weight, chunk.labels, num_tokens)
    need(close(loss, wanted), f"the loss is {loss.item():.4f}, wanted is {wanted.item():.4f}")


@exercise("3.4", "what is left to learn is the probability on wrong pairs; when it is gone, so is the gradient.")
def exercise_3_4(remaining_signal):
    similarity = (3 * torch.randn(7, 7)).requires_grad_()
    target = torch.arange(7)
    loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    wanted = -torch.autograd.grad(loss, similarity)[0].diagonal().sum().item()
    value = remaining_signal(similarity.detach())
    need(value is not ... and value is not None, "fill in the blank, `...`")
    value = float(value)
    p, q = similarity.detach().softmax(1).diagonal(), similarity.detach().softmax(0).diagonal()
    need(abs(value - (1 - p).mean()) > 1e-5, "rows only: take the mean of both softmaxes")
    need(abs(value - (p + q).mean() / 2) > 1e-5, "this is the probability on the RIGHT pairs: 1 minus it is left")
    need(abs(value - wanted) < 1e-5, f"{value:.4f}, wanted {wanted:.4f}: the mean over i of 1 - (p_ii + q_ii) / 2")


# ---- 4. LoRA and soft prompts


@exercise("4.1", "the same numbers as lora.LoRALinear.")
def exercise_4_1(lora_class):
    from lora import LoRAConfig, LoRALinear

    base = torch.nn.Linear(6, 4)
    real = LoRALinear(base, LoRAConfig(rank=2, alpha=6.0))
    mine, x = lora_class(base, 2, 6.0), torch.randn(3, 5, 6)
    try:
        value = mine(x)
    except NotImplementedError:
        raise NotYet("fill in forward") from None
    value = tensor(value, (3, 5, 4), "the result of forward")
    need(close(value, base(x)), "before training it must be the base layer exactly: B starts at zero, nothing is lost")
    with torch.no_grad():
        for parameter in mine.A, mine.B, real.lora_A.weight, real.lora_B.weight:
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    value, wanted = mine(x), real(x)
    need(not close(value, base(x)), "A and B have no effect")
    need(not close(value, base(x) + (wanted - base(x)) / 3), "scale the new part by alpha / rank")
    need(close(value, wanted), "W x + (alpha / rank) B A x: F.linear(x, A) first, then B")
    trained = {name for name, p in mine.named_parameters() if p.requires_grad}
    need(trained == {"A", "B"}, f"only A and B may be trained, not {sorted(trained)}")


@exercise("4.2", "rank times the sum of both sides, for each layer.")
def exercise_4_2(lora_parameters):
    from lora import LoRAConfig, add_lora
    from model import Llava, LlavaConfig, TextConfig

    for rank, targets in ((4, ("q_proj", "v_proj")), (16, LoRAConfig().targets)):
        text = TextConfig(
            vocab_size=9, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
        )
        with torch.device("meta"):
            model = Llava(LlavaConfig(text=text, image_token_id=3))
            shapes = [
                tuple(layer.weight.shape)
                for name, layer in model.language_model.named_modules()
                if name.rpartition(".")[2] in targets
            ]
            add_lora(model, LoRAConfig(rank=rank, targets=targets))
        wanted = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        value = lora_parameters(shapes, rank)
        need(value is not ... and value is not None, "fill in the blank, `...`")
        full = sum(rows * columns for rows, columns in shapes)
        need(value != full, "this counts W; A is (rank, in), B is (out, rank)")
        need(value == wanted, f"{value:,} of {len(shapes)} layers with rank {rank}; wanted are {wanted:,}")


@exercise("4.3", "the adapter costs nothing once it is folded into the weight.")
def exercise_4_3(merged_weight):
    W, A, B, x = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2), torch.randn(3, 6)
    before = W.clone()
    value = tensor(merged_weight(W, A, B, 0.5), (4, 6))
    need(torch.equal(W, before), "W itself was changed: return a new matrix")
    wanted = x @ W.T + 0.5 * (x @ A.T) @ B.T
    need(not close(x @ value.T, x @ W.T + (x @ A.T) @ B.T), "the scale is missing")
    need(close(x @ value.T, wanted), "x @ merged.T must equal x @ W.T + scale * (x @ A.T) @ B.T")


@exercise("4.4", "the gradients of autograd, by three products.")
def exercise_4_4(lora_backward):
    x, W, A, B, dy = (torch.randn(*shape, dtype=torch.double) for shape in ((7, 6), (4, 6), (2, 6), (4, 2), (7, 4)))
    leaves = [each.requires_grad_() for each in (x, A, B)]
    y = x @ W.T + 0.5 * (x @ A.T) @ B.T
    wanted = torch.autograd.grad(y, leaves, dy)
    value = lora_backward(*(each.detach() for each in (x, W, A, B)), 0.5, dy)
    need(isinstance(value, tuple) and len(value) == 3, "return three gradients: dx, dA, dB")
    for name, mine, right in zip(("dx", "dA", "dB"), value, wanted):
        mine = tensor(mine, right.shape, name)
        need(not close(mine, 2 * right), f"{name}: the scale 0.5 is missing")
        if name == "dx":
            need(not close(mine, dy @ W.detach()), "dx: x goes two ways, through W and through A: dy W + d_down A")
        need(close(mine, right), f"{name} is not autograd's; follow the formula above, and check what is transposed")


@exercise("4.5", "an id behind the vocabulary is a row of the soft prompt.")
def exercise_4_5(soft_embedding):
    table, soft = torch.randn(10, 4), torch.randn(3, 4)
    ids = torch.tensor([[1, 10, 9], [12, 11, 0]])
    value = tensor(soft_embedding(ids, table, soft), (2, 3, 4))
    need(close(value[0, 0], table[1]), "a normal word changed")
    need(close(value, torch.cat([table, soft])[ids]), "id V + i must be row i of the soft prompt")


# ---- 5. Train, ablate, evaluate, break it


@exercise("5.1", "that is the whole of a training step; the rest of train.py is files and messages.")
def exercise_5_1(step, make):
    """`make()` gives (run, optimizer, parameters, losses): a small batch on the real model."""
    from lora import trainable_parameters

    run, optimizer, parameters, losses = make()
    trained = list(trainable_parameters(run.model).values())
    before = [p.detach().clone() for p in trained]
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    clipped, original = [], torch.nn.utils.clip_grad_norm_

    def watch(*arguments, **named):
        clipped.append(True)
        return original(*arguments, **named)

    with replaced(torch.nn.utils, "clip_grad_norm_", watch):
        step(optimizer, parameters, losses, 0.5)
    rates = [group["lr"] for group in optimizer.param_groups]
    need(any(not torch.equal(a, b) for a, b in zip(before, trained)), "nothing moved: optimizer.step() is missing")
    need(rates == [0.5 * peak for peak in peaks], f"the learning rates are {rates}: factor times each group's peak_lr")
    need(clipped, "the gradient was not clipped: torch.nn.utils.clip_grad_norm_(parameters, 1.0)")
    need(all(p.grad is None or not p.grad.any() for p in parameters), "gradients are left over: optimizer.zero_grad()")


@exercise("5.2", "one row, one change: that is what makes it an ablation.")
def exercise_5_2(rows):
    from train import TrainConfig

    wanted = {
        "soft prompts": dict(lora=False, soft=True, ar=False),
        "LoRA": dict(lora=True, soft=False, ar=False),
        "both": dict(lora=True, soft=True, ar=False),
        "both + AR": dict(lora=True, soft=True, ar=True),
    }
    need(isinstance(rows, dict) and set(rows) == set(wanted), f"the rows must be {', '.join(wanted)}")
    for name, switches in wanted.items():
        need(isinstance(rows[name], dict), f"{name}: fill in the blank with a dictionary of settings")
        config = TrainConfig(**rows[name])
        found = dict(lora=config.lora_rank > 0, soft=config.soft_prompts, ar=config.ar_weight > 0)
        for what, on in switches.items():
            need(found[what] == on, f"{name}: {what} is {'on' if found[what] else 'off'}, it should be the other way")
        others = set(rows[name]) - {"lora_rank", "soft_prompts", "ar_weight"}
        need(not others, f"{name} also changes {sorted(others)}: then nobody knows what made the difference")


@exercise("5.3", "a difference counts when its interval does not hold zero.")
def exercise_5_3(paired_difference):
    first, second = [80.0, 82.0, 87.0], [81.0, 83.5, 88.5]
    value = paired_difference(first, second)
    need(isinstance(value, tuple) and len(value) == 2, "return (mean, half-width)")
    need(... not in value, "fill in the blanks, `...`")
    mean, half = map(float, value)
    need(abs(mean - 4 / 3) < 1e-6, f"the mean difference is {mean:.3f}, wanted 1.333: second minus first, seed by seed")
    squares = (1 - 4 / 3) ** 2 + 2 * (1.5 - 4 / 3) ** 2
    wanted, biased = (4.30 * (squares / n) ** 0.5 / 3**0.5 for n in (2, 3))
    need(abs(half - biased) > 1e-6, "divide the sum of squares by n - 1, not by n (torch's std does, numpy's does not)")
    need(abs(half - wanted) < 1e-6, f"the half-width is {half:.3f}, wanted {wanted:.3f}: t * deviation / sqrt(n)")


@exercise("5.4", "your test passes what is right and catches all four bugs. It belongs into tests/.")
def exercise_5_4(is_right, layout, samples):
    from data import collate

    try:
        passed = is_right(collate, layout, samples)
    except AssertionError:
        passed = False
    need(passed is not None and passed is not ..., "return True or False: fill in the blanks")
    need(passed, "it says that the real collate is wrong")
    for name, (broken, hint) in BUGS.items():
        try:
            caught = not is_right(broken, layout, samples)
        except (AssertionError, IndexError, RuntimeError):
            caught = True
        need(caught, f"the bug {name!r} gets through: {hint}")


def broken(change):
    """The real collate, and then something is spoiled in its chunks of images."""

    def collate_with_bug(samples, layout, micro_batch):
        from data import collate

        batch = collate(samples, layout, micro_batch)
        for chunk in batch.images:
            change(chunk, layout)
        return batch

    return collate_with_bug


def not_shifted(chunk, layout):
    chunk.labels = chunk.input_ids.masked_fill(chunk.labels == -100, -100)


def trains_on_prompt(chunk, layout):
    start = layout.image_summary - 3
    chunk.labels[:, start : layout.image_summary] = chunk.input_ids[:, start + 1 : layout.image_summary + 1]


def summary_at_the_end(chunk, layout):
    chunk.summary = torch.full_like(chunk.summary, chunk.input_ids.shape[1] - 1)


def forgets_stop(chunk, layout):
    chunk.labels[chunk.labels == layout.stop_id] = -100


BUGS = {
    "each position predicts itself": (broken(not_shifted), "compare labels[t] with input_ids[t + 1]"),
    "the prompt is trained on": (broken(trains_on_prompt), "labels before layout.image_summary must all be IGNORE"),
    "the summary is behind the caption": (broken(summary_at_the_end), "chunk.summary must be layout.image_summary"),
    "the stop token is not learned": (broken(forgets_stop), "the last supervised label of a caption is layout.stop_id"),
}
