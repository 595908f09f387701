# %% [markdown]
# # 3. Two losses, one pass
#
# VladVA trains with two losses at once. The **contrastive** loss pulls a picture and its short
# caption together. The **autoregressive** loss keeps the model able to write long captions. This
# notebook builds both, shows why the contrastive one must not see long captions, and how one
# forward pass serves both.
#
# You need: an embedding is the hidden state at the summary position (notebook 2). About 35 minutes
# in a room, 45 with what is marked *at home*; four exercises. Nothing later depends on your
# answers; solutions are in `workshop/solutions/`.
#
# Axes: **B** pairs in a batch, **T** tokens, **D** hidden size, **V** vocabulary.

# %% [markdown]
# **The only setting.** How much of a processor core is yours: 1.0 on a laptop of your own, 0.2 on a
# busy shared server (`python -m examples.check` tells). At 1.0 no cell takes a minute. At 0.2 a
# cell waits about twice as long as on a quiet laptop, and
# both runs are shorter, and the difference between them is smaller.

# %% setup
SHARE = 1.0

# %% setup
import inspect
import json
import shutil
import sys
import time
from pathlib import Path

here = Path.cwd()  # the project's folder, or workshop/ in it
found = [folder for folder in [here, *here.parents] if (folder / "lora.py").exists()]
assert found, f"{here} is not in the project's folder: start jupyter there, in a terminal"
ROOT = found[0]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import losses
from data import CaptionDataset, collate, next_tokens, open_image
from eval import encode_image, encode_text, load_embedder, recall_at_k
from formats.testsets import read_retrieval
from losses import IGNORE
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
dataset = CaptionDataset(WORLD / "train.jsonl", layout, embedder.processor)


def picture_of(index):
    record = dataset.record(index)
    return open_image(dataset.root / record["image"], record.get("part"))


# %% [markdown]
# One record of the training data (`dataset[index, draw]` takes one caption of each kind; `draw`
# says which): a picture, short captions that say a part of the truth, and a long one that says all
# of it.

# %%
record = dataset.record(0)
draw.pictures([picture_of(0)], side=2)
print("short:", *record["short"], sep="\n  ")
print("long:", *record["long"], sep="\n  ")

# %% [markdown]
# ## The contrastive loss
#
# Take B pairs. Compare every picture with every text: a B x B matrix of cosine similarities, times
# a scale (1 / temperature). In row i, the right text is in column i. That is a classification
# problem with B classes, and the loss for it is cross-entropy. The same for the columns:
#
# $$ s_{ij} = \frac{1}{\tau} \cos(f_v^i, f_t^j), \qquad
# L = -\frac{1}{2B} \sum_i \left( \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} +
# \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}} \right) $$

# %%
images = encode_image(embedder, [picture_of(index) for index in range(12)])  # (B, D)
texts = encode_text(embedder, [dataset[index, 0].short for index in range(12)])  # (B, D)
similarity = images @ texts.T / 0.07  # (B, B)
print("similarity (B, B):", tuple(similarity.shape))
draw.matrices(
    ("similarity / temperature", similarity),
    ("softmax over rows: pictures choose texts", similarity.softmax(1)),
    ("softmax over columns: texts choose pictures", similarity.softmax(0)),
)

# %% [markdown]
# ### Exercise 3.1: InfoNCE (5 minutes)
#
# Four lines. `F.cross_entropy(scores, target)` takes the log and the softmax for you.


# %% exercise 3.1
def info_nce(image_embeddings, text_embeddings, scale):
    """(B, D), (B, D), 1 / temperature -> a scalar."""
    images = F.normalize(image_embeddings, dim=-1)
    texts = ...
    similarity = ...  # (B, B)
    target = torch.arange(len(images))  # the right column of each row
    return ...  # the mean of the cross-entropies of the rows and of the columns


# %% solution 3.1
def info_nce(image_embeddings, text_embeddings, scale):
    """(B, D), (B, D), 1 / temperature -> a scalar."""
    images = F.normalize(image_embeddings, dim=-1)
    texts = F.normalize(text_embeddings, dim=-1)
    similarity = scale * images @ texts.T  # (B, B)
    target = torch.arange(len(images))  # the right column of each row
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


# %% check 3.1
checks.exercise_3_1(info_nce)

# %%
print(inspect.getsource(losses.contrastive_loss))
noise = losses.contrastive_loss(torch.randn(64, 128), torch.randn(64, 128), 1.0)
print(f"random embeddings, B = 64: {noise:.2f}; chance is log B = {torch.tensor(64.0).log():.2f}")

# %% [markdown]
# Keep log B in mind: that is the loss of embeddings that are all alike, from which nothing can be
# told.
#
# ## Where the gradient goes
#
# The gradient of the loss at $s_{ij}$ is $(p_{ij} + q_{ij} - 2\,[i = j]) / 2B$, where p is the
# softmax over rows and q over columns. So a wrong pair gets a push in proportion to the probability
# the model gives it. Easy negatives get none. **Hard** negatives get it all. The hardest that the
# toy world has: a scene and its *twin*, in which two objects have exchanged color, size or place.
# Here we put some into one batch by hand.

# %%
# Twins share a "group".
first = next(index for index in range(len(dataset)) if "group" in dataset.record(index))
chosen = range(first, first + 6)
pictures = [picture_of(index) for index in chosen]
short = [dataset.record(index)["short"][0] for index in chosen]
draw.pictures(pictures, short)
similarity = encode_image(embedder, pictures) @ encode_text(embedder, short).T / 0.07
weights = similarity.softmax(1)  # (6, 6)
draw.matrices(("p: which text each picture picks", weights), numbers=2)

# %% [markdown]
# Pictures 0 and 1 are twins, and so are 4 and 5. (In the first matrices of this notebook they are
# rows 2 and 3, and 6 and 7.) Most of what they lose is lost to the twin's text; the base hardly
# tells twins apart, so 0.5 against 0.5 is no surprise. The paper's batches are random, and so are
# the default's. (Each scene is made of one of 16 sets of four colors and four shapes, so a random
# batch has some pictures that are nearly as hard.)
#
# ## The autoregressive loss
#
# Nothing new: predict the next token of the long caption, given the picture, the prompt, and the
# caption so far. The prompt is the one that asks for *one word*, and a long caption is no good
# answer to it. It stands there all the same, for then one sequence serves both losses (below), and
# the model learns it quickly: the prompt's tokens are learned, too (notebook 4).
#
# $$ L_{AR} = -\frac{1}{\text{tokens}} \sum_t
# \log p(u_{t+1} \mid \text{picture}, \text{prompt}, u_{\le t}) $$
#
# The long caption stands **behind** the image prompt. Outlined below: the positions that are
# trained to predict what follows them. The first of them is the summary position itself.

# %%
caption = tokenizer.encode("There are two objects on a navy background.")
ids = layout.image_side(caption)
words = []
for place, index in enumerate(ids):
    color = draw.GREEN if place <= layout.image_summary else draw.BLUE
    if index == layout.image_id:
        color = draw.ORANGE
    word = tokenizer.tokenizer.id_to_token(index).replace("<image>", "img")
    words.append((word, color))
supervised = {(0, place) for place in range(layout.image_summary, len(ids) - 1)}
label = "picture (orange), prompt (green), long caption (blue)"
draw.tokens((label, words), marked=supervised)
print("input_ids (B, T):", (1, len(ids)), " image_summary:", layout.image_summary)

# %% [markdown]
# ### Exercise 3.2: the labels (5 minutes)
#
# `labels[t]` is the token that follows position t, or `IGNORE` (-100) where nothing is to be
# predicted. `ids.roll(-1)` moves every id one place to the left: a good start. Then decide which
# positions predict.


# %% exercise 3.2
def caption_labels(ids, summary):
    """ids (T,) of one sequence without padding, the summary's position -> labels (T,)."""
    following = ids.roll(-1)
    position = torch.arange(len(ids))
    predicts = ...  # (T,) True from the summary to the last but one position
    return torch.where(predicts, following, IGNORE)


# %% solution 3.2
def caption_labels(ids, summary):
    """ids (T,) of one sequence without padding, the summary's position -> labels (T,)."""
    following = ids.roll(-1)
    position = torch.arange(len(ids))
    predicts = (position >= summary) & (position < len(ids) - 1)
    return torch.where(predicts, following, IGNORE)


# %% check 3.2
checks.exercise_3_2(caption_labels, embedder)

# %% [markdown]
# The real function does it for a padded batch: `lengths` says where each row ends.

# %%
print(inspect.getsource(next_tokens))

# %% [markdown]
# ## One pass for both
#
# We need the state at the summary, and we need predictions for the caption behind it. Because
# attention is causal, the summary cannot see the caption. So **one** forward pass of
# `[picture][prompt][long caption]` gives both: the embedding is the same as without the caption.

# %%
draw.flow(
    [
        ("picture, prompt", "embedding", draw.ORANGE),
        ("contrastive", "with short texts", draw.PURPLE),
    ],
    [
        ("picture, prompt,", "long caption again", draw.ORANGE),
        ("autoregressive", "next tokens", draw.BLUE),
    ],
    title="two passes: the picture and the prompt are read twice",
)
draw.flow(
    [
        ("picture, prompt,", "long caption", draw.ORANGE),
        ("state at summary", "contrastive", draw.PURPLE),
        ("states behind it", "autoregressive", draw.BLUE),
    ],
    title="one pass",
)

# %% [markdown]
# ### Exercise 3.3: both from one pass (6 minutes, at home)
#
# A `Chunk` of `data.py` holds `input_ids` (b, T), `pixel_values`, `summary` (b,) and `labels` (b,
# T). `losses.cross_entropy(hidden, head, labels, num_tokens)` is the autoregressive loss; the
# head's matrix is `model.lm_head.weight`, (V, D).


# %% exercise 3.3
def one_pass(model, chunk, num_tokens):
    """-> embeddings (b, D), not normalised, and the autoregressive loss (scalar)."""
    hidden = model(chunk.input_ids, chunk.pixel_values)  # (b, T, D), the only forward pass
    embeddings = ...  # (b, D)
    loss = ...
    return embeddings, loss


# %% solution 3.3
def one_pass(model, chunk, num_tokens):
    """-> embeddings (b, D), not normalised, and the autoregressive loss (scalar)."""
    hidden = model(chunk.input_ids, chunk.pixel_values)  # (b, T, D), the only forward pass
    embeddings = hidden[torch.arange(len(hidden)), chunk.summary]
    loss = losses.cross_entropy(hidden, model.lm_head.weight, chunk.labels, num_tokens)
    return embeddings, loss


# %% check 3.3
four = collate([dataset[index, 0] for index in range(4)], layout, micro_batch=4)
checks.exercise_3_3(one_pass, embedder, four.images[0], four.num_tokens)

# %% [markdown]
# Is it exact, and what does it save? We compare with two passes, forward and backward, on 32
# pictures, at home. (`model` has no adapters yet: its own weights get the gradients here, and
# nobody uses them.)

# %% home
chunk = collate([dataset[index, 0] for index in range(32)], layout, micro_batch=32).images[0]
num_tokens = int((chunk.labels != IGNORE).sum())
head = model.lm_head.weight
rows = torch.arange(len(chunk.input_ids))


def one_pass_of_32():
    hidden = model(chunk.input_ids, chunk.pixel_values)
    loss = losses.cross_entropy(hidden, head, chunk.labels, num_tokens)
    return hidden[rows, chunk.summary], loss


def two_passes_of_32():
    prompts = chunk.input_ids[:, : layout.image_summary + 1]  # they end at the summary
    embeddings = model(prompts, chunk.pixel_values)[:, -1]
    hidden = model(chunk.input_ids, chunk.pixel_values)
    return embeddings, losses.cross_entropy(hidden, head, chunk.labels, num_tokens)


def seconds_of(function):
    start = time.perf_counter()
    embeddings, loss = function()
    (embeddings.sum() + loss).backward()
    model.zero_grad()
    return time.perf_counter() - start


twice = min(seconds_of(two_passes_of_32) for _ in range(3))
once = min(seconds_of(one_pass_of_32) for _ in range(3))
difference = (one_pass_of_32()[0] - two_passes_of_32()[0]).abs().max().item()
print(f"largest difference of the embeddings: {difference:.1e} (rounding)")
print(f"two passes: {twice:.2f} s")
print(f"one pass:   {once:.2f} s")

# %% [markdown]
# Here it saves a part; the caption is the longer half. In a real LLaVA, 576 image tokens come in
# front of a caption of 100 or 200, and reading them twice would cost far more.

# %% [markdown]
# ## Why long captions collapse the contrastive loss
#
# Long captions say everything. Would they not be the better partners? We try, live. Two runs with
# the real `train.train`, contrastive loss only, which differ in one setting: `contrast="short"` or
# `"long"`. Each takes up to half a minute on a core of your own. (Before the first step stands what
# the run will need of the memory.)


# %%
def train_briefly(contrast):
    """-> the trained embedder, and its log: one dictionary a step."""
    config = TrainConfig(
        steps=fewer(40, SHARE),
        batch_size=32,
        warmup=4,
        autoregressive_weight=0.0,
        contrast=contrast,
    )
    trained = load_embedder(MODEL, device="cpu")
    add_adapters(trained, config)
    file = WORLD / "train.jsonl"
    captions = CaptionDataset(file, trained.layout, trained.processor, contrast=contrast)
    out = ROOT / "runs" / "workshop" / contrast
    shutil.rmtree(out, ignore_errors=True)  # of a former run of this cell
    out.mkdir(parents=True)
    train(trained, config, captions, out)
    log = (out / "log.jsonl").read_text().splitlines()
    return trained, [json.loads(line) for line in log]


on_short, short_log = train_briefly("short")

# %%
on_long, long_log = train_briefly("long")

# %%
items = read_retrieval(WORLD / "test" / "karpathy.json", WORLD / "images", most=2)
items = items[: fewer(240, SHARE)]
test_pictures = [open_image(path) for path, _ in items]
test_texts = [text for _, captions in items for text in captions]
image_of_text = torch.arange(len(items)).repeat_interleave(2)
recalls = {}
trained = {"before": embedder, "trained on short": on_short, "trained on long": on_long}
for name, each in trained.items():
    scores = encode_text(each, test_texts) @ encode_image(each, test_pictures).T  # (texts, images)
    table = recall_at_k(scores, image_of_text)
    recalls[name] = [table["t2i_r1"], table["i2t_r1"]]


def smooth(log):
    """The mean of each 5 steps."""
    values = torch.tensor([line["contrastive"] for line in log])
    return values.unfold(0, 5, 1).mean(1).tolist()


draw.curves(
    (
        "contrastive loss in training, mean of 5 steps",
        {"short captions": smooth(short_log), "long captions": smooth(long_log)},
    ),
    log=True,
)
title = f"retrieval of {len(items)} test pictures by short captions"
draw.grouped_bars(["text to image R@1", "image to text R@1"], recalls, title=title)

# %% [markdown]
# The loss of the long captions falls much lower. And the search by text? Forty steps are few, and a
# point or two is noise; these are the full runs (`python -m toy.ablation`, three seeds, on the big
# world):

# %%
committed = json.loads((ROOT / "toy" / "ablation.json").read_text())
runs = list(committed["no training"].values())
recall = sum(run["columns"]["T2I@1"] for run in runs) / len(runs)
print(f"before fine-tuning: text to image R@1 {recall:.1f} %")
for name, row in [("short captions", "both"), ("long captions", "long captions contrasted")]:
    runs = list(committed[row].values())
    loss = sum(run["contrastive"][-1] for run in runs) / len(runs)
    recall = sum(run["columns"]["T2I@1"] for run in runs) / len(runs)
    print(f"{name:14}  last contrastive loss {loss:.2f}, then text to image R@1 {recall:.1f} %")

# %% [markdown]
# The lower loss belongs to the **worse** search. What has collapsed is the loss, and with it what
# there is to learn; so the search gains little over the model before fine-tuning. Why? A long
# caption differs from every other in many words at once. A few of them are enough to find the
# partner, so the task is soon solved, and then nothing is left to learn from. The number for that
# is easy to compute.
#
# ### Exercise 3.4: what is left to learn (5 minutes)
#
# In the gradient above, the push on pair (i, i) is $(p_{ii} + q_{ii} - 2)/2B$. Summed over i, with
# the opposite sign, it is the mean of $1 - (p_{ii} + q_{ii})/2$: the probability that still lies on
# wrong pairs. At 1 everything is to be learned, at 0 nothing.


# %% exercise 3.4
def remaining_signal(similarity):
    """similarity (B, B), divided by the temperature already -> a number from 0 to 1."""
    p = similarity.softmax(dim=1).diagonal()  # (B,), pictures choose texts
    q = ...  # (B,), texts choose pictures
    return ...


# %% solution 3.4
def remaining_signal(similarity):
    """similarity (B, B), divided by the temperature already -> a number from 0 to 1."""
    p = similarity.softmax(dim=1).diagonal()  # (B,), pictures choose texts
    q = similarity.softmax(dim=0).diagonal()  # (B,), texts choose pictures
    return (1 - (p + q) / 2).mean().item()


# %% check 3.4
checks.exercise_3_4(remaining_signal)

# %%
lines = (WORLD / "test.jsonl").read_text().splitlines()[: fewer(128, SHARE)]
held_out = [json.loads(line) for line in lines]
test_pictures = [open_image(WORLD / record["image"]) for record in held_out]


def left_over(embedder, kind, temperature):
    """Percent of the probability that lies on wrong pairs."""
    captions = [record[kind][0] for record in held_out]
    cosine = encode_image(embedder, test_pictures) @ encode_text(embedder, captions).T
    s = cosine / temperature
    right = (s.softmax(0).diagonal() + s.softmax(1).diagonal()) / 2
    return 100 * (1 - right).mean().item()


left = {}
for kind, trained, log in [("short", on_short, short_log), ("long", on_long, long_log)]:
    before = left_over(embedder, kind, 0.07)
    after = left_over(trained, kind, log[-1]["temperature"])
    left[f"{kind} captions"] = [before, after]
title = f"probability on wrong pairs, among {len(held_out)} scenes, at the run's temperature"
draw.grouped_bars(["before training", "after it"], left, title=title)

# %% [markdown]
# How much has either task left, once it is trained? That is all that its gradient can still use.
# (Before training long captions leave at least as much: the base was never asked to summarize so
# long a text. It learns to, and then they are solved.)
#
# ## What to take home
#
# * Contrastive: cosine over temperature, cross-entropy both ways. The gradient lives on hard
#   negatives.
# * Autoregressive: next token, from the summary position on, on long captions only.
# * Causal attention lets one pass serve both, exactly.
# * Too easy a task teaches little. Short captions leave something to learn; long ones do not, and
#   they are not what people type into a search box.
#
# If there is time: change 40 to 80 steps for the long captions. Does the search recover?
