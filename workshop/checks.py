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
    raw = 10.0 * images @ texts.T
    raw_texts = 10.0 * F.normalize(images, dim=-1) @ texts.T
    cold_rows = F.cross_entropy(similarity / 100, target)
    cold_columns = F.cross_entropy(similarity.T / 100, target)

    one_direction = close(value, rows) or close(value, columns)
    need(not one_direction, "one direction only: images must find texts AND texts images")
    need(not close(value, rows + columns), "the mean of both directions, not their sum")
    for wrong in (raw, raw_texts):
        found = (F.cross_entropy(wrong, target), F.cross_entropy(wrong.T, target))
        is_raw = any(close(value, each) for each in (*found, sum(found) / 2))
        need(not is_raw, "not normalised: images AND texts want unit length, by F.normalize")
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


@exercise("3.4", "what is left to learn is the probability on wrong pairs; at 0 there is no push.")
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
    product = sum(rank * out * inside for out, inside in shapes)
    need(value != product, "A and B are two matrices: add their sizes, rank * in and out * rank")
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
    try:
        value = soft_embedding(ids, table, soft)
    except IndexError as error:
        advice = "subtract V, and clamp what is a word"
        raise NotYet(f"id V + i is row i: {advice} ({error})") from None
    value = tensor(value, (2, 3, 4))
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

    def listen(parameters, max_norm, *arguments, **named):
        has_moved = any(not torch.equal(old, new) for old, new in zip(before, trained))
        need(not has_moved, "clip BEFORE optimizer.step(): afterwards it changes nothing")
        need(max_norm == 1.0, f"the norm is to be clipped to 1.0, not to {max_norm}")
        clipped.append(True)
        return original(parameters, max_norm, *arguments, **named)

    with replaced(torch.nn.utils, "clip_grad_norm_", listen):
        step(optimizer, parameters, losses, 0.5)

    has_moved = any(not torch.equal(old, new) for old, new in zip(before, trained))
    advice = "optimizer.step() is missing, or comes after zero_grad()"
    need(has_moved, f"nothing moved: {advice}")
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
        by = {"lora": "lora_rank", "soft": "soft_prompts", "ar": "autoregressive_weight"}
        for what, on in switches.items():
            state = "on" if found[what] else "off"
            need(found[what] == on, f"{name}: {what} is {state}, it should not be: {by[what]}")
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
    reversed_mean = float(paired_difference([81.0, 83.5, 88.5], [80.0, 82.0, 87.0])[0])
    need(abs(reversed_mean + 4 / 3) < 1e-6, "a second row that is worse has a negative difference")
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
    "5.4", "your test passes what is right and catches all five bugs. It belongs into tests/."
)
def exercise_5_4(is_right, layout, samples):
    from data import collate

    try:
        passed = is_right(collate, layout, samples)
    except AssertionError:
        passed = False
    need(passed is not None and passed is not ..., "return True or False: fill in the blanks")
    need(passed, "it says that the real collate is wrong: at t the label is the id of t + 1")
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


def forgets_the_first_word(chunk, layout):
    chunk.labels[:, layout.image_summary] = -100


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
    "the first word is not learned": (
        forgets_the_first_word,
        "the summary position itself predicts the caption's first word",
    ),
    "the stop token is not learned": (
        forgets_stop,
        "the last supervised label of a caption is layout.stop_id",
    ),
}


# ---- 6. Change it, and find what is broken


@exercise("6.1", "every pair is a question of its own: right or wrong? No pair competes.")
def exercise_6_1(siglip_loss):
    from workshop.changes import siglip_loss as right

    images = torch.randn(6, 5) * 3
    texts = torch.randn(6, 5)
    value = tensor(siglip_loss(images, texts, 4.0, -2.0), ())
    wanted = right(images, texts, 4.0, -2.0)
    cosine = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    eye = torch.eye(6)

    def loss_of(logits):
        return -F.logsigmoid(logits).sum() / 6

    need(not close(value, -wanted), "the sign: minus the logarithm of what is right")
    need(not close(value, wanted / 6), "this is the mean over all pairs; SigLIP divides by B only")
    need(not close(value, 6 * wanted), "this is the sum over all pairs; divide it by B")
    all_right = loss_of(4 * cosine - 2)
    need(not close(value, all_right), "wrong pairs count as right ones: their sign is -1")
    zero_signs = loss_of(eye * (4 * cosine - 2))
    need(not close(value, zero_signs), "wrong pairs have the sign 0 here; -1 off the diagonal")
    turned = loss_of((1 - 2 * eye) * (4 * cosine - 2))
    need(not close(value, turned), "the signs are turned round: 1 ON the diagonal")
    outside = loss_of((2 * eye - 1) * 4 * cosine - 2)
    need(not close(value, outside), "the bias belongs to the logits, before the sign: sign * (...)")
    need(not close(value, right(images, texts, 4.0, 2.0)), "plus the bias; it is negative already")
    need(not close(value, right(images, texts, 4.0, 0.0)), "the bias is missing")
    need(not close(value, right(images, texts, 0.25, -2.0)), "multiply by the scale, do not divide")
    softmax = F.cross_entropy(4 * cosine - 2, torch.arange(6))
    need(not close(value, softmax), "a softmax makes pairs compete; here each has a sigmoid")
    found = f"the loss is {value.item():.4f}, wanted is {wanted.item():.4f}"
    hint = "minus the sum over all pairs of logsigmoid(sign * (scale * cosine + bias)), over B"
    need(close(value, wanted), f"{found}: {hint}")
    extreme = siglip_loss(images, texts, 100.0, -100.0)
    is_finite = torch.isfinite(torch.as_tensor(extreme))
    need(is_finite, "a cold temperature gives infinity: F.logsigmoid, never log(sigmoid(x))")


@exercise("6.2", "a loss with a parameter of its own: one function, one line, one weight.")
def exercise_6_2(siglip, add_bias, config_class, make):
    """`make()` gives (embedder, batch): adapters added, and a small batch."""
    import train as training
    from lora import loss_parameters
    from workshop.changes import siglip_loss

    config = config_class(contrastive_weight=0.0, autoregressive_weight=0.0)
    has_weight = getattr(config, "siglip_weight", 0)
    filled(has_weight)
    need(has_weight, "the weight: siglip_weight: float = 1.0 (its name is the loss's, and _weight)")
    embedder, batch = make()
    model = embedder.model
    add_bias(model)
    need(hasattr(model, "logit_bias"), "add_bias must set model.logit_bias")
    filled(model.logit_bias)
    is_parameter = isinstance(model.logit_bias, torch.nn.Parameter)
    need(is_parameter, "model.logit_bias would not be trained: wrap it, torch.nn.Parameter(...)")
    need(model.logit_bias.shape == (), "logit_bias is one number: torch.tensor(-10.0)")
    is_low = model.logit_bias.item() < -1
    need(is_low, "start the bias low, at -10: of B x B pairs nearly all are wrong")
    need("logit_bias" in loss_parameters(model), "it must be the model's own: model.logit_bias")

    images = torch.randn(5, 8)
    texts = torch.randn(5, 8)
    value = tensor(siglip(model, images, texts, config), ())
    scale = model.log_scale
    bias = model.logit_bias
    is_log = close(value, siglip_loss(images, texts, scale, bias))
    need(not is_log, "model.log_scale is the logarithm: .exp() makes the scale of it")
    is_inverse = close(value, siglip_loss(images, texts, 1 / scale.exp(), bias))
    need(not is_inverse, "exp(log_scale) is 1 / temperature already")
    wanted = siglip_loss(images, texts, scale.exp(), bias)
    need(close(value, wanted), "not the SigLIP loss at the model's own temperature and bias")

    with replaced(training, "EMBEDDING_LOSSES", {"siglip": siglip}):
        found = training.training_step(model, batch, config)
    need(found["siglip"] > 0, "training_step computed nothing: is the weight above 0?")
    for name, parameter in loss_parameters(model).items():
        has_gradient = parameter.grad is not None and parameter.grad != 0
        advice = "no .item(), no .detach(), no number written in its place"
        need(has_gradient, f"no gradient reaches model.{name}: {advice}")


@exercise("6.3", "a loss is any number that the embeddings can make smaller. Now measure it.")
def exercise_6_3(my_loss):
    from types import SimpleNamespace

    from losses import contrastive_loss
    from workshop.changes import siglip_loss

    scale = torch.tensor(14.0)
    model = SimpleNamespace(log_scale=scale.log(), logit_bias=torch.tensor(-10.0))

    def value_of(images, texts):
        return my_loss(model, images, texts, None)

    images = torch.randn(12, 16).requires_grad_()
    texts = torch.randn(12, 16).requires_grad_()
    value = value_of(images, texts)
    filled(value)
    if isinstance(value, torch.Tensor) and value.numel() > 1:
        raise NotYet(f"a loss is one number, this has the shape {tuple(value.shape)}: .mean()?")
    value = tensor(value, ())
    need(torch.isfinite(value), f"the loss of ordinary embeddings is {value.item()}")
    advice = "no .item(), no .detach(); a comparison and argmax have no slope"
    need(value.requires_grad, f"no gradient reaches the embeddings: {advice}")
    found = torch.autograd.grad(value, (images, texts), allow_unused=True)
    slopes = [each for each in found if each is not None and each.any()]
    need(slopes, f"the gradient is zero: {advice}, and max(0, ...) may be 0 everywhere")

    order = torch.randperm(12)
    shuffled = value_of(images[order], texts[order])
    is_same = close(value, shuffled)
    need(is_same, "pairs in another order give another loss; their order in a batch means nothing")
    doubled = value_of(torch.cat([images, images]), torch.cat([texts, texts]))
    is_sum = close(doubled, 2 * value) or close(doubled, 4 * value)
    need(not is_sum, "twice the batch, a multiple of the loss: take a mean, not a sum")

    equal = torch.randn(12, 16).requires_grad_()
    at_home = value_of(equal, equal.detach().clone())
    found = torch.autograd.grad(at_home, equal, allow_unused=True)[0]
    no_nan = found is None or torch.isfinite(found).all()
    need(
        no_nan, "where image and text are equal the gradient is NaN: a square root of 0? square it"
    )
    is_finite = torch.isfinite(value_of(images[:2], texts[:2]))
    need(is_finite, "a batch of two pairs gives no number: a last batch may be so small")

    known = {
        "contrastive": lambda images, texts: contrastive_loss(images, texts, scale),
        "SigLIP": lambda images, texts: siglip_loss(images, texts, scale, -10.0),
    }
    for name, loss in known.items():
        ratios = []
        for _ in range(3):
            images = torch.randn(12, 16)
            texts = torch.randn(12, 16)
            ratios.append(float(value_of(images, texts)) / float(loss(images, texts)))
        is_another = max(ratios) - min(ratios) > 1e-4 * abs(max(ratios))
        need(is_another, f"this is the {name} loss again, whatever its weight: one of your own")


@exercise("6.4", "data, LoRA, losses and training take any model that keeps these promises.")
def exercise_6_4(tiny_class, embedder, samples):
    import backbones
    from data import collate
    from eval import Embedder
    from lora import SoftPrompt, trainable_parameters
    from train import TrainConfig, add_adapters, training_step
    from workshop.changes import tiny_config

    config = tiny_config(embedder.model.config)
    D = config.text.hidden_size
    V = config.text.vocab_size
    N = config.num_image_tokens
    model = tiny_class(config)
    language_model = model.language_model
    torch.nn.init.normal_(language_model.norm.weight, 1.0, 0.2)  # else a missing norm hides

    v = torch.randn(2, 5, D)
    mixed = tensor(model.mix(v), (2, 5, D), "mix(v)")
    sees_future = not close(model.mix(v[:, :3]), mixed[:, :3])
    by_length = "divided by T, in place of 1, 2, ..., T, it depends on how many follow"
    need(not close(mixed, v.cumsum(1) / 5), f"mix: {by_length}")
    need(not sees_future, "mix: a token sees those BEHIND it; the caption would reach the summary")
    need(not close(mixed[:, 1], v[:, :2].sum(1)), "mix: divide by how many there are, 1, 2, ..., T")
    need(close(mixed[:, 0], v[:, 0]), "mix: the first token has only itself to collect")
    is_mean = close(mixed[:, 3], v[:, :4].mean(1))
    need(is_mean, "mix: at t the mean over positions 0 to t, its own included")

    pixels = torch.stack([sample.pixel_values for sample in samples[:2]])
    patches = model.vision_tower(pixels)  # (2, D, rows, columns)
    value = model.image_features(pixels)
    filled(value)
    features = tensor(value, (2, N, D), "image_features")
    wanted = patches.flatten(2).transpose(1, 2)
    by_columns = patches.transpose(2, 3).flatten(2).transpose(1, 2)
    need(not close(features, by_columns), "image_features: the patches go by columns, not by rows")
    advice = "flatten rows and columns, then (images, D, N) -> (images, N, D) by a transpose"
    need(close(features, wanted), f"image_features: the numbers are in the wrong places: {advice}")

    layout = embedder.layout
    rows = [torch.tensor(layout.text_side(text)) for text in ("a red ring", "a blue star")]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    value = model(ids)
    filled(value)
    if isinstance(value, torch.Tensor) and value.shape[-1] == V:
        raise NotYet("forward returns scores of words; hidden states are wanted, never logits")
    hidden = tensor(value, (*ids.shape, D), "forward(input_ids)")
    x = language_model.embed_tokens(ids)
    for layer in language_model.layers:
        x = layer(x, model.mix)
    need(not close(hidden, x), "forward: the final norm is missing, language_model.norm")
    need(close(hidden, language_model.norm(x)), "forward: embed_tokens, all layers, norm; in order")

    ids = torch.tensor([layout.image_side()] * 2)
    seen = model(ids, pixels)
    filled(seen)
    given = model(ids, image_features=features)
    need(close(seen, given), "forward: features that are given must count as pixel_values do")
    need(not close(seen[0], seen[1]), "forward: two pictures give the same states; where are they?")
    first = layout.prefix().index(config.image_token_id)
    swapped = model(ids, image_features=features.flip(0))
    need(close(swapped[0, first:], seen[1, first:]), "forward: features go to the wrong picture")
    hint = "ValueError, or features shift into others' places"
    need(refuses(model, ids[:1], features), f"forward: more features than image tokens: {hint}")
    need(refuses(model, ids, features[:1]), f"forward: fewer features than image tokens: {hint}")

    scores = model.logits(hidden)
    filled(scores)
    right = hidden @ model.lm_head.weight.T
    need(close(tensor(scores, right.shape, "logits"), right), "logits: hidden @ lm_head.weight.T")
    is_backbone = isinstance(model, backbones.Backbone)
    need(is_backbone, "a member of backbones.Backbone is missing: is it a changes.TinyParts?")

    # From here on nothing is typed by hand: the project's own training.
    layout = layout.with_prompts(*layout.prompt_texts)
    mine = Embedder(model, layout, embedder.processor)
    settings = TrainConfig(lora_rank=2, fast=False)
    add_adapters(mine, settings)
    is_soft = isinstance(language_model.embed_tokens, SoftPrompt)
    need(is_soft, "soft prompts found no language_model.embed_tokens")
    batch = collate(samples, mine.layout, micro_batch=4)
    try:
        found = training_step(model, batch, settings)
    except IndexError:
        advice = "look up by the MODULE language_model.embed_tokens, not by its weight"
        raise NotYet(f"forward: soft prompts' ids, V and above, have no row: {advice}") from None
    need(math.isfinite(found["loss"]), f"one step of training: the loss is {found['loss']}")
    for name, parameter in trainable_parameters(model).items():
        reached = parameter.grad is not None and parameter.grad.any()
        advice = "do all ids go through the module language_model.embed_tokens?"
        if "embed_tokens" in name:
            need(reached, f"no gradient reaches the soft prompts ({name}): {advice}")
        elif ".lora_B." in name:
            need(reached, f"no gradient reaches LoRA ({name}): are all layers run?")


def refuses(model, ids, features) -> bool:
    """Does forward raise a ValueError? (Where there are too few, torch raises a RuntimeError.)"""
    try:
        model(ids, image_features=features)
    except ValueError:
        return True
    except RuntimeError:
        return False
    return False


@exercise("6.5", "chosen on validation scenes. The test set is for the one that you have chosen.")
def exercise_6_5(image_prompt, text_prompt, retrieval_of, embedder, pictures):
    """`retrieval_of(image prompt, text prompt)` gives R@1 on validation scenes."""
    from data import IMAGE_PROMPT, TEXT_PROMPT

    for name, prompt in (("image", image_prompt), ("text", text_prompt)):
        filled(prompt)
        need(isinstance(prompt, str), f"the {name} prompt is a {type(prompt).__name__}, not a text")
    is_own = image_prompt.strip() != IMAGE_PROMPT and text_prompt.strip() != TEXT_PROMPT
    need(is_own, "these are the paper's prompts; find others")
    tokenizer = embedder.tokenizer
    unknown = tokenizer.tokenizer.token_to_id("<unk>")
    for word in f"{image_prompt} {text_prompt}".split():
        is_known = unknown is None or unknown not in tokenizer.encode(word)
        need(is_known, f"the model never saw the word {word!r}, it reads <unk>: take another")

    # Half of what the paper's prompts find, by the same model in the same scenes. A state that
    # holds the picture loses a little by other words; one that is about to begin a sentence loses
    # nearly all.
    mine = retrieval_of(image_prompt, text_prompt)
    papers = retrieval_of(IMAGE_PROMPT, TEXT_PROMPT)
    if mine >= papers / 2:
        return
    layout = embedder.layout.with_prompts(image_prompt, text_prompt)
    ids = torch.tensor([layout.image_side()] * len(pictures))
    with torch.no_grad():
        hidden = embedder.model(ids, embedder.pixel_values(pictures))
        words = embedder.model.logits(hidden[:, -1]).argmax(-1)
    commonest = words.mode().values
    share = 100 * (words == commonest).double().mean().item()
    word = tokenizer.tokenizer.id_to_token(commonest.item())
    found = f"R@1 is {mine:.0f} %, the paper's prompts find {papers:.0f} %, half of it is asked for"
    if share > 50:
        problem = f"behind {share:.0f} % of the pictures your model is about to say {word!r}"
        raise NotYet(f"{found}: {problem}; ask for ONE word that differs from picture to picture")
    raise NotYet(f"{found}: do both prompts ask for the same thing, a summary in one word?")


@exercise("6.6", "four tests that know a broken system by what it does, not by how it looks.")
def exercise_6_6(
    ignores_neighbours, predicts_the_next, temperature_learns, caption_stays_out, folder, samples
):
    from workshop import broken

    mine = {
        broken.POSITION: ignores_neighbours,
        broken.LABELS: predicts_the_next,
        broken.TEMPERATURE: temperature_learns,
        broken.LEAK: caption_stays_out,
    }
    hints = {
        broken.POSITION: "embed the short text once more, FIRST in a batch with a longer one",
        broken.LABELS: "labels at `places` against ids one place further on: ids.roll(-1)[places]",
        broken.TEMPERATURE: "there must be a gradient (not None), and it must not be zero",
        broken.LEAK: "the same pictures with others' captions: system.embed_pictures(samples, ...)",
    }
    for fault, test in mine.items():
        name = broken.MEASUREMENTS[fault].__name__
        for ill, system in broken.systems(folder).items():
            said = verdict(test, system, samples)
            if said is None:
                raise NotYet(f"{name}: return True or False: fill in the blank, `...`")
            if not ill:
                need(said, f"{name} calls the healthy system ill: {hints[fault]}")
            elif ill == fault:
                need(not said, f"{name} lets it through that {fault}: {hints[fault]}")
            else:
                need(said, f"{name} also fails where {ill}: look at one thing only; {hints[fault]}")


def verdict(test, system, samples) -> bool | None:
    """What a test says of a system: True, False (an error counts as that), None for a blank."""
    try:
        said = test(system, samples)
    except (AssertionError, IndexError, RuntimeError):  # a crash finds a fault, too
        return False
    except TypeError:
        if holds_blank(test):
            return None
        raise
    if isinstance(said, torch.Tensor) and said.numel() == 1:
        said = bool(said)
    return said if isinstance(said, bool) else None


def examine(patients: dict, tests: list, samples) -> None:
    """Print what each test says of each patient; `?` where the test has a blank."""
    width = max(len(test.__name__) for test in tests)
    print(" " * width, *patients)
    for test in tests:
        marks = []
        for system in patients.values():
            try:
                said = verdict(test, system, samples)
            except Exception:  # a half-written test; its checker says what is wrong with it
                said = None
            marks.append({True: "✓", False: "✗", None: "?"}[said])
        print(f"{test.__name__:{width}}", *marks)


@exercise("6.7", "four diagnoses, none of them from a loss curve.")
def exercise_6_7(diagnosis, patients, samples):
    from workshop import broken

    has_all = isinstance(diagnosis, dict) and set(diagnosis) == set(patients)
    need(has_all, f"a dictionary with the keys {', '.join(patients)}")
    for name, said in diagnosis.items():
        filled(said)
        known = ", ".join(repr(fault) for fault in broken.FAULTS)
        need(said in broken.FAULTS, f"{name}: {said!r} is none of {known}")
    for name, said in diagnosis.items():
        # Measured, not looked up: a patient may have been trained or mended since.
        measure = broken.MEASUREMENTS[said]
        is_ill = not measure(patients[name], samples)
        hint = f"it passes {measure.__name__}; which of the four does it fail?"
        need(is_ill, f"patient {name} has another fault than that {said}: {hint}")


@exercise("6.8", "four lines. Finding them took longer, as in real life.")
def exercise_6_8(pool, labels, scale, sequence, embedder):
    from types import SimpleNamespace

    from workshop import broken

    hidden = torch.randn(3, 6, 4)
    lengths = torch.tensor([4, 6, 2])
    value = tensor(pool(hidden, lengths), (3, 4), "pool: the result")
    need(not close(value, hidden[:, -1]), "pool: -1 is padding in all rows but the longest")
    is_right = close(value, broken.pool(hidden, lengths))
    need(is_right, "pool: not the last real token of each row; positions are counted from 0")

    ids = torch.arange(10, 18)
    places = torch.tensor([3, 4, 5, 6])
    value = tensor(labels(ids, places), (8,), "labels: the result")
    right = broken.labels(ids, places)
    ill = broken.labels_of_themselves(ids, places)
    is_late = torch.equal(value, ill)
    need(not is_late, "labels: still one too late; write AT places what stands BEHIND them")
    itself = torch.equal(value[places], ids[places])
    need(not itself, "labels: each place predicts itself, which needs no thinking")
    need((value[:3] == broken.IGNORE).all(), "labels: what is not in places is IGNORE")
    need(torch.equal(value, right), "labels: at each place the id of the next position")

    model = SimpleNamespace(log_scale=torch.nn.Parameter(torch.tensor(1.7)))
    value = scale(model)
    filled(value)
    has_slope = isinstance(value, torch.Tensor) and value.requires_grad
    need(has_slope, "scale: a number has no gradient; compute it from model.log_scale itself")
    value = tensor(value, (), "scale: the result")
    need(not close(value, model.log_scale), "scale: log_scale is a logarithm: .exp()")
    need(not close(value, (-model.log_scale).exp()), "scale: this is the temperature; 1 / it")
    need(close(value, model.log_scale.exp()), "scale: exp(log_scale)")

    layout = embedder.layout
    caption = embedder.tokenizer.encode("there are two objects on a navy background.")
    row = sequence(layout, list(caption))
    filled(row)
    is_row = isinstance(row, broken.Row)
    need(is_row, "sequence: return Row(ids, summary, places)")
    need(all(part is not ... for part in row), "fill in the blank, `...`")
    right = broken.sequence(layout, list(caption))
    is_behind = row.ids[: len(layout.image_side())] == layout.image_side()
    need(is_behind, "sequence: picture and prompt first, the caption BEHIND them")
    has_end = row.ids[-1] == layout.stop_id
    need(has_end, "sequence: the caption must end with layout.stop_id, or it is never learned")
    need(list(row.ids) == right.ids, "sequence: layout.image_side(caption) is all of it")
    need(row.summary == right.summary, "sequence: the summary is the prompt's last position")
    is_same = list(row.places) == list(right.places)
    need(is_same, "sequence: trained are the summary and all behind it but the last position")
