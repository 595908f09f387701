# %% [markdown]
# # 4. LoRA and soft prompts
#
# Seven billion parameters are too many to train on a small budget, and training them would break
# what they know. VladVA freezes them all and adds two small things: **LoRA** on the linear layers
# of the language model, and **soft prompts** in place of the two hand-written questions. You write
# both, first in ten lines, then as the code computes them.
#
# You need: matrix products, `nn.Linear`, what a gradient is. About 30 minutes in a room, 45 with
# what is marked *at home*; five exercises.
# Nothing later depends on your answers; solutions are in `workshop/solutions/`.
#
# Axes: **N** rows (all tokens of a batch), **D** hidden size, **R** rank, **V** vocabulary, **T**
# tokens.

# %% [markdown]
# **The only setting.** How much of a processor core is yours: 1.0 on a laptop of your own, 0.2 on a
# busy shared server (`python -m examples.check` tells). At 1.0 no cell takes a minute. At 0.2 a
# cell waits about twice as long as on a quiet laptop, and
# the run is shorter, and its gain is hard to tell from noise.

# %% setup
SHARE = 1.0

# %% setup
import inspect
import json
import shutil
import sys
from pathlib import Path

here = Path.cwd()  # the project's folder, or workshop/ in it
found = [folder for folder in [here, *here.parents] if (folder / "lora.py").exists()]
assert found, f"{here} is not in the project's folder: start jupyter there, in a terminal"
ROOT = found[0]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import nn

import fast
import lora
from data import CaptionDataset, open_image
from eval import encode_image, encode_text, load_embedder, recall_at_k
from fast.lean import LeanLoRA
from formats.testsets import read_retrieval
from lora import LoRAConfig, adapters_disabled, add_lora, freeze, merge_lora, trainable_parameters
from toy import world
from train import TrainConfig, add_adapters, train
from workshop import checks, draw
from workshop.pace import fewer

WORLD = world.build(ROOT / "runs" / "workshop" / "world", train_scenes=1024, test_scenes=240)
MODEL = ROOT / "toy" / "tiny-llava"
embedder = load_embedder(MODEL, device="cpu")
model = embedder.model
layout = embedder.layout
tokenizer = embedder.tokenizer
items = read_retrieval(WORLD / "test" / "karpathy.json", WORLD / "images", most=2)
items = items[: fewer(240, SHARE)]
pictures = [open_image(path) for path, _ in items]
_ = torch.manual_seed(0)


def with_lora():
    """A fresh model with LoRA, so that a cell can be run again."""
    model = load_embedder(MODEL, device="cpu").model
    freeze(model)
    add_lora(model, LoRAConfig(rank=16, alpha=16))
    return model


# %% [markdown]
# ## The idea
#
# A trained layer computes $y = Wx$. Fine-tuning would change W. LoRA says: the change does not need
# all of W's freedom. Write it as a product of two thin matrices, and train only those:
#
# $$ y = W x + \frac{\alpha}{R} \, B A x $$

# %%
rows, columns = model.language_model.layers[0].mlp.gate_proj.weight.shape
new = 16 * (rows + columns)
draw.blocks(
    ("W, frozen", rows, columns, draw.GRAY),
    ("B, starts at 0", rows, 16, draw.ORANGE),
    ("A, random", 16, columns, draw.BLUE),
    title=f"gate_proj of the toy model, to scale: W {rows * columns:,} numbers, A and B {new:,}",
)

# %% [markdown]
# In a layer of LLaVA-1.5-7B (11,008 x 4,096) the same rank is 0.5 % of W, thinner than a line in
# this figure.
#
# The constant $\alpha$ is 16 here, as the rank is, so the scale in front is 1. B starts at zero. So
# the first forward pass gives exactly the base model: training begins where pre-training ended.
#
# ### Exercise 4.1: ten-line LoRA (5 minutes)


# %% exercise 4.1
class TenLineLoRA(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)  # W (out, in), frozen
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / rank**0.5)  # (R, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))  # (out, R)

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)  # W x
        return ...  # y + scale * B A x: two F.linear, A first


# %% solution 4.1
class TenLineLoRA(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)  # W (out, in), frozen
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / rank**0.5)  # (R, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))  # (out, R)

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)  # W x
        return y + self.scale * F.linear(F.linear(x, self.A), self.B)


# %% check 4.1
checks.exercise_4_1(TenLineLoRA)

# %% [markdown]
# Here is the real one, the whole of it. Beside your ten lines it has a switch, `enabled`, and
# dropout in front of A; and it holds A and B in fp32, whatever the precision of the base layer is.

# %%
print(inspect.getsource(lora.LoRALinear))

# %% [markdown]
# ### Exercise 4.2: how many parameters? (4 minutes, at home)
#
# A is (R, in) and B is (out, R). Count them for a list of layers.


# %% exercise 4.2
def lora_parameters(shapes, rank):
    """shapes: a list of (out, in), one for each layer with LoRA -> the number of new parameters."""
    return sum(... for out, inside in shapes)


# %% solution 4.2
def lora_parameters(shapes, rank):
    """shapes: a list of (out, in), one for each layer with LoRA -> the number of new parameters."""
    return sum(rank * (out + inside) for out, inside in shapes)


# %% check 4.2
checks.exercise_4_2(lora_parameters)

# %% [markdown]
# For LLaVA-1.5-7B: 32 blocks, each with four layers of 4,096 x 4,096 (q, k, v, o) and three between
# 4,096 and 11,008 (gate, up, down).

# %% home
per_block = 4 * 16 * (4096 + 4096) + 3 * 16 * (4096 + 11008)
new = 32 * per_block
print(f"rank 16: {new:,} new parameters, {100 * new / 7.05e9:.2f} % of the model")

# %% [markdown]
# ## Into the real model
#
# `add_lora` swaps the linear layers for `LoRALinear` in place; the weights are shared, not copied.
# Three facts to check with your own eyes: fresh adapters change nothing (1); switched off, the base
# is back, bit for bit (2); and, after exercise 4.3, merged into the weights they give the same up
# to rounding (3).

# %%
model = with_lora()
trained = trainable_parameters(model)
print(f"{len(trained)} tensors to train, {sum(p.numel() for p in trained.values()):,} numbers")
ids = torch.tensor([layout.image_side()] * 2)
pixels = embedder.pixel_values(pictures[:2])
with torch.no_grad():
    fresh = model(ids, pixels)  # (B, T, D)
    for parameter in trained.values():
        parameter += 0.02 * torch.randn_like(parameter)  # as if it had been trained
    changed = model(ids, pixels)
    with adapters_disabled(model):
        disabled = model(ids, pixels)
print("hidden (B, T, D):", tuple(changed.shape))
print(f"largest change by the adapters: {(changed - fresh).abs().max():.3f}")
print("fresh adapters (1) and disabled ones (2) give the same to the last bit:")
print(torch.equal(fresh, disabled), "- B = 0 adds nothing, and the base was never touched")

# %% [markdown]
# ### Exercise 4.3: fold it into the weight (3 minutes)
#
# After training, nothing forces us to carry A and B along. Since $Wx + s\,BAx = (W + s\,BA)\,x$,
# they fit into W.


# %% exercise 4.3
def merged_weight(W, A, B, scale):
    """W (out, in), A (R, in), B (out, R) -> (out, in)."""
    return ...


# %% solution 4.3
def merged_weight(W, A, B, scale):
    """W (out, in), A (R, in), B (out, R) -> (out, in)."""
    return W + scale * B @ A


# %% check 4.3
checks.exercise_4_3(merged_weight)

# %%
with torch.no_grad():
    merge_lora(model)
    merged = model(ids, pixels)
difference = (merged - changed).abs().max()
print(f"3. merged: {len(lora.adapters(model))} adapters left, largest difference {difference:.1e}")

# %% [markdown]
# ## The lean one (at home)
#
# Autograd would do the backward pass for us. Yet by hand it needs less memory: we know which
# tensors are needed, and which can be made again. With rows instead of columns as in the code, and
# $p = x A^\top$, the layer is $y = x W^\top + s\,p\,B^\top$, where $s$ is the scale. With $dy$ the
# gradient that arrives:
#
# $$ dp = s \, dy \, B, \qquad dA = dp^\top x, \qquad dx = dy \, W + dp \, A $$
#
# $dB$ is yours: it is made of $dy$ and $p$ as $dA$ is made of $dp$ and $x$. There is no $dW$, for W
# is frozen; autograd knows that, too.
#
# ### Exercise 4.4: the backward pass (4 minutes, at home)


# %% exercise 4.4
def lora_backward(x, W, A, B, scale, dy):
    """x (N, in), W (out, in), A (R, in), B (out, R), dy (N, out) -> gradients like x, A, B."""
    p = x @ A.T  # (N, R)
    dp = scale * dy @ B  # (N, R)
    dA = ...
    dB = ...
    dx = ...
    return dx, dA, dB


# %% solution 4.4
def lora_backward(x, W, A, B, scale, dy):
    """x (N, in), W (out, in), A (R, in), B (out, R), dy (N, out) -> gradients like x, A, B."""
    p = x @ A.T  # (N, R)
    dp = scale * dy @ B  # (N, R)
    dA = dp.T @ x
    dB = scale * dy.T @ p
    dx = dy @ W + dp @ A
    return dx, dA, dB


# %% check 4.4
checks.exercise_4_4(lora_backward)

# %% [markdown]
# `LoRALinear` leaves the backward pass to autograd. While training, `train.py` puts a lean form in
# its place (`fast.install`, in `fast/lean.py`), with the same numbers. It does what you wrote for
# several layers with the same input at once (q, k and v read the same x; so do gate and up), so
# that p is one product. And it does not keep x: the norm in front can make it again from what is
# kept anyway. Compare the lines of `dBs`, `dp`, `dA` and `dx` with yours; the others bring tensors
# into shape.

# %% home
print(inspect.getsource(LeanLoRA.backward))

# %% [markdown]
# What does it save? You need not read the next cell, only its result. Autograd tells what it keeps
# for the backward pass. We count the bytes of one forward pass of 16 pictures, with the plain form
# and with the lean one.


# %% home
def kept_megabytes(model):
    """MB that autograd keeps of a forward pass; each piece of memory counts once, parameters do
    not."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # bytes, by address

    def pack(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    def unpack(saved):
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        ids = torch.tensor([layout.image_side()] * 16)
        hidden = model(ids, embedder.pixel_values(pictures[:16]))
    del hidden  # held until now, so that no address was used twice
    return sum(kept.values()) / 1e6


model = with_lora()
plain = kept_megabytes(model)
fast.install(model)
lean = kept_megabytes(model)
draw.bars(("kept for the backward pass, MB", ["plain", "lean"], [plain, lean]))
print(f"plain {plain:.1f} MB, lean {lean:.1f} MB")

# %% [markdown]
# ## Soft prompts
#
# *Summarize the provided image in one word:* was found by trying. A soft prompt lets gradient
# descent look for a better one, not among words, but among **vectors**: the embeddings of the
# prompt's tokens become parameters. They start as the embeddings of the hand-written words, first
# the image prompt's, then the text prompt's. In the code, ids from V on stand for them: id V + i is
# row i.

# %%
V = model.config.text.vocab_size
soft_layout = layout.with_soft_prompts(V)
hard = layout.image_side()[-10:]
soft = soft_layout.image_side()[-10:]


def token(index):
    """-> (word, color)."""
    if index >= V:
        return str(index), draw.PURPLE
    if index == layout.image_id:
        return "img", draw.ORANGE
    return tokenizer.tokenizer.id_to_token(index), draw.GREEN


draw.tokens(
    ("hand-written: words of the vocabulary", [token(index) for index in hard]),
    (f"soft: rows behind the vocabulary of {V}", [token(index) for index in soft]),
)

# %% [markdown]
# ### Exercise 4.5: look up words and soft rows (4 minutes)


# %% exercise 4.5
def soft_embedding(ids, table, soft):
    """ids (B, T) in [0, V + P), table (V, D), soft (P, D) -> (B, T, D)."""
    V = len(table)
    is_soft = ids >= V  # (B, T)
    words = table[ids.masked_fill(is_soft, 0)]  # (B, T, D), nonsense where it is soft
    # (B, T, D), nonsense where it is a word: which row? .clamp(min=0) keeps it in range
    prompt = soft[...]
    return torch.where(is_soft[..., None], prompt, words)


# %% solution 4.5
def soft_embedding(ids, table, soft):
    """ids (B, T) in [0, V + P), table (V, D), soft (P, D) -> (B, T, D)."""
    V = len(table)
    is_soft = ids >= V  # (B, T)
    words = table[ids.masked_fill(is_soft, 0)]  # (B, T, D), nonsense where it is soft
    prompt = soft[(ids - V).clamp(min=0)]
    return torch.where(is_soft[..., None], prompt, words)


# %% check 4.5
checks.exercise_4_5(soft_embedding)

# %%
print(inspect.getsource(lora.SoftPrompt.forward))

# %% [markdown]
# Now train only the prompts (`TrainConfig` holds every setting; what is given differs from its
# defaults): a handful of vectors, and all that will change. Half a minute at most.


# %%
def t2i(each):
    texts = encode_text(each, [text for _, captions in items for text in captions])
    scores = texts @ encode_image(each, pictures).T  # (texts, images)
    return recall_at_k(scores, torch.arange(len(items)).repeat_interleave(2))["t2i_r1"]


# Soft prompts only.
config = TrainConfig(
    steps=fewer(40, SHARE), batch_size=32, warmup=4, autoregressive_weight=0.0, lora_rank=0
)
prompted = load_embedder(MODEL, device="cpu")
before = t2i(prompted)
add_adapters(prompted, config)
prompt = prompted.model.language_model.embed_tokens  # a SoftPrompt now
learned = prompt.image.numel() + prompt.text.numel()
share = learned / sum(p.numel() for p in prompted.model.parameters())
vectors = len(prompt.image) + len(prompt.text)
print(f"{vectors} vectors, {learned:,} numbers, {100 * share:.1f} % of the model")
out = ROOT / "runs" / "workshop" / "prompts"
shutil.rmtree(out, ignore_errors=True)  # of a former run of this cell
out.mkdir(parents=True)
dataset = CaptionDataset(WORLD / "train.jsonl", prompted.layout, prompted.processor)
train(prompted, config, dataset, out)
print(f"text to image R@1: {before:.1f} -> {t2i(prompted):.1f} %")

# %% [markdown]
# At best a small step in the right direction: with so few captions, a point or two is noise.
# What the full runs gained on the big world (three seeds, `toy/ablation.md`):

# %%
committed = json.loads((ROOT / "toy" / "ablation.json").read_text())


def mean_recall(row):
    runs = committed[row].values()
    return sum(run["columns"]["T2I@1"] for run in runs) / len(runs)


for row in ("soft prompts", "both"):
    gain = mean_recall(row) - mean_recall("no training")
    print(f"{row:14} text to image R@1 {gain:+.1f} points")

# %% [markdown]
# (*both* is LoRA and soft prompts.) What did the prompts become? For each token: the nearest word
# of the vocabulary now (by cosine), how far it moved, in lengths of the vector it was, and the
# cosine with that vector.

# %%
table = prompt.weight.detach()  # (V, D)
start = table[layout.image_prompt]  # (P, D)
end = prompt.image.detach()  # (P, D)
moved = (end - start).norm(dim=-1) / start.norm(dim=-1)
cosine = F.normalize(end, dim=-1) @ F.normalize(table, dim=-1).T  # (P, V)
own = cosine.gather(1, torch.tensor(layout.image_prompt)[:, None])[:, 0]
labels = []
for was, now in zip(layout.image_prompt, cosine.argmax(-1).tolist()):
    labels.append(f"{token(was)[0]} → {token(now)[0]}")
draw.bars(
    ("was → nearest word now; how far it moved", labels, moved.tolist()),
    ("cosine with the word that it was", labels, own.tolist()),
)
still = (cosine.argmax(-1) == torch.tensor(layout.image_prompt)).sum().item()
print(f"{still} of {len(start)} are still nearest to the word that they were")

# %% [markdown]
# They moved in directions where no other word lies, however far. The paper saw something
# similar in LLaVA: soft prompts hardly change their meaning.
#
# ## What to take home
#
# * LoRA: $W$ frozen, $BA$ trained, $B$ starts at zero. Folded into W it costs nothing.
# * Knowing the backward pass lets you keep less, with the same gradients.
# * A soft prompt is a question written in vectors. A few thousand numbers already help.
#
# If there is time: `add_lora(model, LoRAConfig(rank=16, targets=("q_proj", "v_proj")))` on a fresh
# model is what the first LoRA paper did. How many parameters is that?
