"""The checkers of the exercises: `checks.exercise_1_1(mine)` says what is right, or raises NotYet.

In a notebook a NotYet is shown as its one sentence, a hint, without a traceback. A checker never
needs anything from an exercise before it. It compares with the project's own code where there is
any, and knows the common mistakes, so that a hint can say what went wrong.
"""

import functools
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

# ---- What the checkers share


class NotYet(Exception):
    """An answer that is blank or wrong; the message is a hint."""

    def _render_traceback_(self):  # what a notebook shows instead of a traceback
        return [f"✗ {self}"]


def exercise(number: str, learned: str):
    """A decorator that makes a checker: blanks and errors of the answer become hints, success is
    printed with what was learned."""

    def decorate(check):
        @functools.wraps(check)
        def checked(*answers):
            try:
                torch.manual_seed(0)
                with torch.enable_grad():  # some notebooks switch it off
                    check(*answers)
            except NotYet as error:
                hint = str(error)
            except Exception as error:  # whatever a participant's code may raise
                first_line = str(error).partition("\n")[0]
                hint = f"your code stops with {type(error).__name__}: {first_line}"
            else:
                print(f"✓ exercise {number}: {learned}")
                return
            raise NotYet(f"exercise {number}: {with_reminder(hint, answers)}")

        return checked

    return decorate


def with_reminder(hint: str, answers) -> str:
    """The hint; where an answer still holds a bare `...`, it says so."""
    if not any(holds_blank(answer) for answer in answers):
        return hint
    if "llipsis" in hint or "blank" in hint:
        return "fill in the blank, `...`"
    return f"{hint} (there is still a blank, `...`)"


def holds_blank(answer) -> bool:
    """Is there a bare `...` in a function, or in a method of a class?"""
    functions = [answer, *getattr(answer, "__dict__", {}).values()]
    for function in functions:
        if hasattr(function, "__code__"):
            for constant in function.__code__.co_consts:
                inner = getattr(constant, "co_consts", ())  # of a generator inside
                if constant is ... or any(each is ... for each in inner):
                    return True
    return False


def need(condition, hint: str) -> None:
    if not condition:
        raise NotYet(hint)


def filled(value) -> None:
    need(value is not ... and value is not None, "fill in the blank, `...`")


def tensor(value, shape: tuple, what: str = "the result") -> torch.Tensor:
    """The answer as a tensor of this shape, or a hint."""
    need(value is not ... and value is not None, f"{what} is {value}: fill in the blank, `...`")
    kind = type(value).__name__
    need(isinstance(value, torch.Tensor), f"{what} is a {kind}, not a tensor")
    found = tuple(value.shape)
    need(found == tuple(shape), f"{what} has the shape {found}, wanted is {tuple(shape)}")
    return value


def close(value, wanted, tolerance: float = 1e-4) -> bool:
    value = torch.as_tensor(value).double()
    wanted = torch.as_tensor(wanted).double()
    return torch.allclose(value, wanted, rtol=tolerance, atol=tolerance)


@contextmanager
def replaced(owner, name: str, value):
    """Inside, `owner.name` is `value`; afterwards it is what it was."""
    is_own = name in vars(owner)  # or an attribute of its class
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# ---- 1. The forward pass


@exercise("1.1", "a convolution whose stride is its kernel is one matrix for all patches.")
def exercise_1_1(patch_embedding):
    pixels = torch.randn(2, 3, 12, 12)
    weight = torch.randn(5, 3, 4, 4)
    wanted = F.conv2d(pixels, weight, stride=4).flatten(2).transpose(1, 2)  # (2, 9, 5)
    value = tensor(patch_embedding(pixels, weight), wanted.shape)
    by_columns = value[:, [0, 3, 6, 1, 4, 7, 2, 5, 8]]
    not_transposed = value.transpose(1, 2).reshape_as(wanted)
    is_wrong_order = close(by_columns, wanted) or close(not_transposed, wanted)
    need(not is_wrong_order, "the patches are in the wrong order: row by row, from left to right")
    need(
        close(value, wanted),
        "the shape is right, the numbers are not: "
        "flatten channels, rows and columns of both in the same order",
    )


@exercise("1.2", "an image token is a place; its id means nothing to the language model.")
def exercise_1_2(splice):
    table = torch.randn(11, 4)
    before = table.clone()
    input_ids = torch.tensor([[1, 7, 7, 3], [7, 7, 2, 5]])
    features = torch.randn(2, 2, 4)
    value = tensor(splice(input_ids, features, table, 7), (2, 4, 4))
    need(torch.equal(table, before), "the table was changed; write into this batch's embeddings")
    is_nowhere = close(value, table[input_ids])
    need(not is_nowhere, "the features are nowhere: assign them to embeddings[is_image]")
    is_image = input_ids == 7
    wanted = table[input_ids].masked_scatter(is_image[..., None], features)
    words_are_right = close(value[~is_image], wanted[~is_image])
    need(words_are_right, "words changed, too: is the mask right?")
    need(close(value, wanted), "the features are in the wrong order: by picture, then by patch")


@exercise("1.3", "each row sums to 1, and no token sees what is behind it.")
def exercise_1_3(attention_weights):
    q = torch.randn(2, 3, 5, 8)
    k = torch.randn(2, 3, 5, 8)
    identity = torch.eye(5).expand(2, 3, 5, 5)  # as values: the result is the weights
    wanted = F.scaled_dot_product_attention(q, k, identity, is_causal=True)
    value = tensor(attention_weights(q, k), wanted.shape)
    no_nan = not value.isnan().any()
    need(no_nan, "there are NaNs: mask the FUTURE (above the diagonal), not everything")
    sees_future = not close(value.triu(1), torch.zeros_like(value))
    need(not sees_future, "a token sees its future: mask the scores before the softmax")
    sums_to_1 = close(value.sum(-1), torch.ones(2, 3, 5))
    need(sums_to_1, "rows do not sum to 1: mask before the softmax, not after")
    future = torch.ones(5, 5).triu(1).bool()
    unscaled = (q @ k.transpose(-1, -2)).masked_fill(future, -torch.inf).softmax(-1)
    need(not close(value, unscaled), "divide the scores by the square root of head_dim")
    need(
        close(value, wanted),
        "the pattern is right, the numbers are not: scores = q @ k.transpose(-1, -2) / ...",
    )


@exercise("1.4", "a caption is the model's own likeliest words, one after the other.")
def exercise_1_4(answer, embedder, image):
    model = embedder.model
    pixels = embedder.pixel_values([image])
    prompt = embedder.layout.question("Describe the image in detail.")
    with torch.no_grad():
        wanted = model.generate([prompt], pixels, 12)[0]
        value = answer(model, list(prompt), pixels, 12)
    need(isinstance(value, list), f"return the list of new ids, not {type(value).__name__}")
    need(... not in value, "fill in the blank, `...`")
    all_numbers = all(isinstance(token, int) for token in value)
    need(all_numbers, "the ids are tensors: .item() makes a number of one")
    first = f"the first id is {value[:1]}, wanted {wanted[:1]}"
    need(value[:1] == wanted[:1], f"{first}: the logits behind the LAST position")
    said = embedder.tokenizer.decode(value)
    right = embedder.tokenizer.decode(wanted)
    need(value == wanted, f"got {said!r}, wanted {right!r}")


# ---- 2. From next token to embedding


@exercise("2.1", "the summary stands at lengths - 1; what is behind it is padding.")
def exercise_2_1(summary_states):
    hidden = torch.randn(3, 6, 4)
    lengths = torch.tensor([4, 6, 2])
    rows = torch.arange(3)
    value = summary_states(hidden, lengths)
    filled(value)
    if isinstance(value, torch.Tensor) and value.shape == hidden.shape:
        raise NotYet("fill in the blank: hidden[rows, positions] wants a position for each row")
    value = tensor(value, (3, 4))
    is_last = close(value, hidden[:, -1])
    need(not is_last, "this is hidden[:, -1]: rows 0 and 2 end in padding, which means nothing")
    is_behind = close(value, hidden[rows, lengths.clamp(max=5)])
    need(not is_behind, "one too far: positions are counted from 0")
    is_right = close(value, hidden[rows, lengths - 1])
    need(is_right, "not the last real token of each row: which index is it?")


@exercise("2.2", "the same embeddings as eval.encode_text.")
def exercise_2_2(embed_texts, embedder):
    from eval import encode_text

    texts = [
        "a red ring",
        "a large blue star above a small pink heart on a navy background.",
        "a dome",
    ]
    hidden_size = embedder.model.config.text.hidden_size
    with torch.no_grad():
        value = tensor(embed_texts(embedder, texts), (3, hidden_size))
        wanted = encode_text(embedder, texts)
    is_unit = close(value.norm(dim=-1), torch.ones(3))
    need(is_unit, "the rows do not have unit length: F.normalize(..., dim=-1)")
    need(not close(value[1], value[0]), "all rows are the same: take the summary of each row")
    need(
        close(value[1], wanted[1]),
        "even the longest text is wrong: did the summary come from the model's hidden states?",
    )
    need(
        close(value, wanted),
        "only the longest text is right: the others' summaries are at lengths - 1, not at -1",
    )


@exercise("2.3", "ties count against the model, so a broken one cannot score by luck.")
def exercise_2_3(recall_at_1):
    scores = torch.randn(40, 9)
    right = torch.randint(9, (40,))
    value = recall_at_1(scores, right)
    need(isinstance(value, float), f"the result is {value!r}, not a number: fill in the blank")
    wanted = 100 * (scores.argmax(1) == right).double().mean().item()
    truth = f"{wanted:.1f} % of these texts rank their picture first"
    need(abs(value - wanted) < 1e-6, f"{value:.1f} %, but {truth}")
    tied = recall_at_1(torch.ones(40, 9), right)
    advice = "count the pictures with scores >= own"
    need(tied == 0, f"where all scores are equal it says {tied:.0f} %: {advice}")


@exercise("2.4", "0 for a sure model, log V for a clueless one.")
def exercise_2_4(entropy):
    logits = torch.randn(4, 7) * 3
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    value = tensor(entropy(logits), (4,))
    need(not close(value, -wanted), "the sign: entropy is positive")
    need(not close(value, wanted / math.log(2)), "these are bits; use the natural logarithm")
    formula = "minus the sum over the vocabulary of p times log p; p is log_p.exp()"
    need(close(value, wanted), formula)
    sure = entropy(torch.tensor([[200.0, 0.0, 0.0]]))
    is_zero = close(sure, [0.0]) and not sure.isnan().any()
    need(is_zero, "a sure model gives NaN: use log_p, never log(p)")


# ---- 3. The two losses


@exercise("3.1", "cosine similarities as logits, a cross-entropy over rows and one over columns.")
def exercise_3_1(info_nce):
    from losses import contrastive_loss

    images = torch.randn(6, 5) * 3
    texts = torch.randn(6, 5)
    wanted = contrastive_loss(images, texts, 10.0)
    value = tensor(info_nce(images, texts, 10.0), ())

    # What comes out of the common mistakes.
    target = torch.arange(6)
    similarity = 10.0 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    rows = F.cross_entropy(similarity, target)
    columns = F.cross_entropy(similarity.T, target)
    raw = F.cross_entropy(10.0 * images @ texts.T, target)
    cold_rows = F.cross_entropy(similarity / 100, target)
    cold_columns = F.cross_entropy(similarity.T / 100, target)

    one_direction = close(value, rows) or close(value, columns)
    need(not one_direction, "one direction only: images must find texts AND texts images")
    need(not close(value, rows + columns), "the mean of both directions, not their sum")
    need(not close(value, raw), "not normalised: cosine similarity wants rows of unit length")
    is_divided = close(value, (cold_rows + cold_columns) / 2)
    need(not is_divided, "multiply by the scale; it is 1 / temperature already")
    need(close(value, wanted), f"the loss is {value.item():.4f}, wanted is {wanted.item():.4f}")


@exercise("3.2", "position t predicts token t + 1, from the summary on; all else is ignored.")
def exercise_3_2(caption_labels, embedder):
    from losses import IGNORE

    summary = embedder.layout.image_summary
    caption = embedder.tokenizer.encode("There are two objects on a navy background.")
    ids = torch.tensor(embedder.layout.image_side(caption))
    value = tensor(caption_labels(ids, summary), ids.shape)
    wanted = torch.full_like(ids, IGNORE)
    wanted[summary:-1] = ids[summary + 1 :]
    learns_first = value[summary] != IGNORE
    need(learns_first, "the summary position itself predicts the caption's first token")
    ignores_prompt = (value[:summary] == IGNORE).all()
    need(ignores_prompt, "picture and prompt are not trained on: IGNORE before the summary")
    is_shifted = (value[summary:-1] != ids[summary:-1]).any()
    need(is_shifted, "each position predicts itself, which needs no thinking: shift by one")
    need(value[-1] == IGNORE, "behind the last token comes nothing: its label is IGNORE")
    is_right = torch.equal(value, wanted)
    need(is_right, "labels[t] must be ids[t + 1] for every t from the summary on")


@exercise("3.3", "one forward pass, two losses.")
def exercise_3_3(one_pass, embedder, chunk, num_tokens):
    from losses import cross_entropy

    model = embedder.model
    calls = []  # what the language model gave

    def listen(module, inputs, output):
        calls.append(output)

    hook = model.language_model.register_forward_hook(listen)
    try:
        with torch.no_grad():
            value = one_pass(model, chunk, num_tokens)
    finally:
        hook.remove()
    is_pair = isinstance(value, tuple) and len(value) == 2
    need(is_pair, "return two things: embeddings, loss")
    need(len(calls) == 1, f"the language model ran {len(calls)} times; once is the trick")
    hidden = calls[0]  # (b, T, D)
    embeddings = tensor(value[0], (len(hidden), hidden.shape[-1]), "the first result")
    loss = tensor(value[1], (), "the second result")
    is_last = close(embeddings, hidden[:, -1])
    need(not is_last, "hidden[:, -1] is behind the caption: the summary is at chunk.summary")
    summaries = hidden[torch.arange(len(hidden)), chunk.summary]
    need(close(embeddings, summaries), "the embeddings are not at chunk.summary")
    with torch.no_grad():
        wanted = cross_entropy(hidden, model.lm_head.weight, chunk.labels, num_tokens)
    need(close(loss, wanted), f"the loss is {loss.item():.4f}, wanted is {wanted.item():.4f}")


@exercise("3.4", "what is left to learn is the probability on wrong pairs; then there is no push.")
def exercise_3_4(remaining_signal):
    similarity = (3 * torch.randn(7, 7)).requires_grad_()
    target = torch.arange(7)
    rows = F.cross_entropy(similarity, target)
    columns = F.cross_entropy(similarity.T, target)
    gradient = torch.autograd.grad((rows + columns) / 2, similarity)[0]
    wanted = -gradient.diagonal().sum().item()
    similarity = similarity.detach()
    value = remaining_signal(similarity)
    filled(value)
    value = float(value)
    p = similarity.softmax(1).diagonal()
    q = similarity.softmax(0).diagonal()
    rows_only = abs(value - (1 - p).mean()) < 1e-5
    need(not rows_only, "rows only: take the mean of both softmaxes")
    right_pairs = abs(value - (p + q).mean() / 2) < 1e-5
    need(not right_pairs, "this is the probability on the RIGHT pairs: 1 minus it is left")
    formula = "the mean over i of 1 - (p_ii + q_ii) / 2"
    need(abs(value - wanted) < 1e-5, f"{value:.4f}, wanted {wanted:.4f}: {formula}")


# ---- 4. LoRA and soft prompts


@exercise("4.1", "the same numbers as lora.LoRALinear.")
def exercise_4_1(lora_class):
    from lora import LoRAConfig, LoRALinear

    base = torch.nn.Linear(6, 4)
    real = LoRALinear(base, LoRAConfig(rank=2, alpha=6.0))
    mine = lora_class(base, 2, 6.0)
    x = torch.randn(3, 5, 6)
    try:
        value = mine(x)
    except NotImplementedError:  # there is no forward at all
        raise NotYet("fill in forward") from None
    value = tensor(value, (3, 5, 4), "the result of forward")
    advice = "B starts at zero, nothing is lost"
    need(close(value, base(x)), f"before training it must be the base layer exactly: {advice}")
    with torch.no_grad():
        for parameter in (mine.A, mine.B, real.lora_A.weight, real.lora_B.weight):
            values = torch.linspace(-1, 1, parameter.numel())
            parameter.copy_(values.view_as(parameter))
    value = mine(x)
    wanted = real(x)
    need(not close(value, base(x)), "A and B have no effect")
    unscaled = base(x) + (wanted - base(x)) / 3  # the scale is 3
    need(not close(value, unscaled), "scale the new part by alpha / rank")
    need(close(value, wanted), "W x + (alpha / rank) B A x: F.linear(x, A) first, then B")
    trained = {name for name, parameter in mine.named_parameters() if parameter.requires_grad}
    need(trained == {"A", "B"}, f"only A and B may be trained, not {sorted(trained)}")


@exercise("4.2", "rank times the sum of both sides, for each layer.")
def exercise_4_2(lora_parameters):
    from lora import TARGETS

    check_count(lora_parameters, rank=4, targets=("q_proj", "v_proj"))
    check_count(lora_parameters, rank=16, targets=TARGETS)


def check_count(lora_parameters, rank: int, targets: tuple[str, ...]) -> None:
    from lora import LoRAConfig, add_lora
    from model import Llava, LlavaConfig, TextConfig

    text = TextConfig(
        vocab_size=9,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    with torch.device("meta"):  # shapes without memory
        model = Llava(LlavaConfig(text=text, image_token_id=3))
        shapes = []
        for name, layer in model.language_model.named_modules():
            if name.rpartition(".")[2] in targets:
                shapes.append(tuple(layer.weight.shape))
        add_lora(model, LoRAConfig(rank=rank, targets=targets))
    wanted = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            wanted += parameter.numel()
    value = lora_parameters(shapes, rank)
    filled(value)
    full = sum(out * inside for out, inside in shapes)
    need(value != full, "this counts W; A is (rank, in), B is (out, rank)")
    layers = f"{len(shapes)} layers with rank {rank}"
    need(value == wanted, f"{value:,} of {layers}; wanted are {wanted:,}")


@exercise("4.3", "the adapter costs nothing once it is folded into the weight.")
def exercise_4_3(merged_weight):
    W = torch.randn(4, 6)
    A = torch.randn(2, 6)
    B = torch.randn(4, 2)
    x = torch.randn(3, 6)
    before = W.clone()
    value = tensor(merged_weight(W, A, B, 0.5), (4, 6))
    need(torch.equal(W, before), "W itself was changed: return a new matrix")
    learned = (x @ A.T) @ B.T
    need(not close(x @ value.T, x @ W.T + learned), "the scale is missing")
    is_right = close(x @ value.T, x @ W.T + 0.5 * learned)
    need(is_right, "x @ merged.T must equal x @ W.T + scale * (x @ A.T) @ B.T")


@exercise("4.4", "the gradients of autograd, by three products.")
def exercise_4_4(lora_backward):
    x = torch.randn(7, 6, dtype=torch.double)
    W = torch.randn(4, 6, dtype=torch.double)
    A = torch.randn(2, 6, dtype=torch.double)
    B = torch.randn(4, 2, dtype=torch.double)
    dy = torch.randn(7, 4, dtype=torch.double)
    value = lora_backward(x, W, A, B, 0.5, dy)
    is_triple = isinstance(value, tuple) and len(value) == 3
    need(is_triple, "return three gradients: dx, dA, dB")

    for each in (x, A, B):
        each.requires_grad_()
    y = x @ W.T + 0.5 * (x @ A.T) @ B.T
    wanted = torch.autograd.grad(y, (x, A, B), dy)
    for name, mine, right in zip(("dx", "dA", "dB"), value, wanted):
        mine = tensor(mine, right.shape, name)
        need(not close(mine, 2 * right), f"{name}: the scale 0.5 is missing")
        if name == "dx":
            one_way = close(mine, dy @ W)
            need(not one_way, "dx: x goes two ways, through W and through A: dy W + dp A")
        advice = "follow the formula above, and check what is transposed"
        need(close(mine, right), f"{name} is not autograd's; {advice}")


@exercise("4.5", "an id behind the vocabulary is a row of the soft prompt.")
def exercise_4_5(soft_embedding):
    table = torch.randn(10, 4)
    soft = torch.randn(3, 4)
    ids = torch.tensor([[1, 10, 9], [12, 11, 0]])
    value = tensor(soft_embedding(ids, table, soft), (2, 3, 4))
    need(close(value[0, 0], table[1]), "a normal word changed")
    wanted = torch.cat([table, soft])[ids]
    need(close(value, wanted), "id V + i must be row i of the soft prompt")


# ---- 5. Train, ablate, evaluate, break it


@exercise(
    "5.1", "that is the whole of a training step; the rest of train.py is files and messages."
)
def exercise_5_1(step, make):
    """`make()` gives (embedder, optimizer, parameters, losses): a small batch, the real model."""
    from lora import trainable_parameters

    embedder, optimizer, parameters, losses = make()
    trained = list(trainable_parameters(embedder.model).values())
    before = [parameter.detach().clone() for parameter in trained]
    wanted = [0.5 * group["peak_lr"] for group in optimizer.param_groups]
    clipped = []
    original = torch.nn.utils.clip_grad_norm_

    def listen(*arguments, **named):
        clipped.append(True)
        return original(*arguments, **named)

    with replaced(torch.nn.utils, "clip_grad_norm_", listen):
        step(optimizer, parameters, losses, 0.5)

    has_moved = any(not torch.equal(old, new) for old, new in zip(before, trained))
    need(has_moved, "nothing moved: optimizer.step() is missing")
    rates = [group["lr"] for group in optimizer.param_groups]
    formula = "factor times each group's peak_lr"
    need(rates == wanted, f"the learning rates are {rates}: {formula}")
    advice = "torch.nn.utils.clip_grad_norm_(parameters, 1.0)"
    need(clipped, f"the gradient was not clipped: {advice}")
    for parameter in parameters:
        is_clean = parameter.grad is None or not parameter.grad.any()
        need(is_clean, "gradients are left over: optimizer.zero_grad()")


@exercise("5.2", "one row, one change: that is what makes it an ablation.")
def exercise_5_2(rows):
    from train import TrainConfig

    wanted = {
        "soft prompts": dict(lora=False, soft=True, ar=False),
        "LoRA": dict(lora=True, soft=False, ar=False),
        "both": dict(lora=True, soft=True, ar=False),
        "both + AR": dict(lora=True, soft=True, ar=True),
    }
    has_rows = isinstance(rows, dict) and set(rows) == set(wanted)
    need(has_rows, f"the rows must be {', '.join(wanted)}")
    for name, switches in wanted.items():
        is_row = isinstance(rows[name], dict)
        need(is_row, f"{name}: fill in the blank with a dictionary of settings")
        config = TrainConfig(**rows[name])
        found = {
            "lora": config.lora_rank > 0,
            "soft": config.soft_prompts,
            "ar": config.autoregressive_weight > 0,
        }
        for what, on in switches.items():
            state = "on" if found[what] else "off"
            need(found[what] == on, f"{name}: {what} is {state}, it should be the other way")
        others = set(rows[name]) - {"lora_rank", "soft_prompts", "autoregressive_weight"}
        problem = "then nobody knows what made the difference"
        need(not others, f"{name} also changes {sorted(others)}: {problem}")


@exercise("5.3", "a difference counts when its interval does not hold zero.")
def exercise_5_3(paired_difference):
    value = paired_difference([80.0, 82.0, 87.0], [81.0, 83.5, 88.5])
    need(isinstance(value, tuple) and len(value) == 2, "return (mean, half-width)")
    need(... not in value, "fill in the blanks, `...`")
    mean = float(value[0])
    half = float(value[1])
    found = f"the mean difference is {mean:.3f}, wanted 1.333"
    need(abs(mean - 4 / 3) < 1e-6, f"{found}: second minus first, seed by seed")
    # The differences are 1, 1.5, 1.5.
    squares = (1 - 4 / 3) ** 2 + 2 * (1.5 - 4 / 3) ** 2
    wanted = 4.30 * (squares / 2) ** 0.5 / 3**0.5
    biased = 4.30 * (squares / 3) ** 0.5 / 3**0.5
    need(
        abs(half - biased) > 1e-6,
        "divide the sum of squares by n - 1, not by n (torch's std does, numpy's does not)",
    )
    found = f"the half-width is {half:.3f}, wanted {wanted:.3f}"
    need(abs(half - wanted) < 1e-6, f"{found}: t * deviation / sqrt(n)")


@exercise(
    "5.4", "your test passes what is right and catches all four bugs. It belongs into tests/."
)
def exercise_5_4(is_right, layout, samples):
    from data import collate

    try:
        passed = is_right(collate, layout, samples)
    except AssertionError:
        passed = False
    need(passed is not None and passed is not ..., "return True or False: fill in the blanks")
    need(passed, "it says that the real collate is wrong")
    for name, (change, hint) in BUGS.items():
        try:
            caught = not is_right(collate_with(change), layout, samples)
        except (AssertionError, IndexError, RuntimeError):  # a crash finds the bug, too
            caught = True
        need(caught, f"the bug {name!r} gets through: {hint}")


def collate_with(change):
    """The real collate, and then `change(chunk, layout)` spoils its chunks of images."""
    from data import collate

    def collate_with_bug(samples, layout, micro_batch):
        batch = collate(samples, layout, micro_batch)
        for chunk in batch.images:
            change(chunk, layout)
        return batch

    return collate_with_bug


def not_shifted(chunk, layout):
    chunk.labels = chunk.input_ids.masked_fill(chunk.labels == -100, -100)


def trains_on_prompt(chunk, layout):
    end = layout.image_summary
    start = end - 3
    chunk.labels[:, start:end] = chunk.input_ids[:, start + 1 : end + 1]


def summary_at_the_end(chunk, layout):
    last = chunk.input_ids.shape[1] - 1
    chunk.summary = torch.full_like(chunk.summary, last)


def forgets_stop(chunk, layout):
    chunk.labels[chunk.labels == layout.stop_id] = -100


BUGS = {
    "each position predicts itself": (
        not_shifted,
        "compare labels[t] with input_ids[t + 1]",
    ),
    "the prompt is trained on": (
        trains_on_prompt,
        "labels before layout.image_summary must all be IGNORE",
    ),
    "the summary is behind the caption": (
        summary_at_the_end,
        "chunk.summary must be layout.image_summary",
    ),
    "the stop token is not learned": (
        forgets_stop,
        "the last supervised label of a caption is layout.stop_id",
    ),
}
