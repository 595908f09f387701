# %% [markdown]
# # 5. Train, ablate, evaluate, break it
#
# The parts are known: embeddings (notebook 2), two losses (3), LoRA and soft prompts (4). Now they
# become a training run. You write the step, compare four runs, learn to tell a result from noise,
# and break things on purpose, since broken training rarely says so.
#
# You need: what a training loop is. About 30 minutes in a room, 50 with what is marked *at home*;
# four exercises. Nothing later depends on your answers; solutions are in `workshop/solutions/`.
#
# Axes: **B** batch, **b** a chunk of it, **T** tokens, **D** hidden size.

# %% [markdown]
# **The only setting.** How much of a processor core is yours: 1.0 on a laptop of your own, 0.2 on a
# busy shared server (`python -m examples.check` tells). At 1.0 no cell takes a minute. At 0.2 a
# cell waits about twice as long as on a quiet laptop, and
# the runs are shorter and tested on fewer pictures; compare rows with each other only.

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
from torch import nn

import train as training  # train.py; `train` below is its function
from data import CaptionDataset, collate, open_image
from eval import caption, encode_image, encode_text, load_embedder, recall_at_k
from formats.files import InputError
from formats.testsets import read_retrieval
from losses import IGNORE
from toy import world
from train import TrainConfig, add_adapters, make_optimizer, train, training_step
from workshop import checks, draw
from workshop.pace import fewer

WORLD = world.build(ROOT / "runs" / "workshop" / "world", train_scenes=1024, test_scenes=240)
MODEL = ROOT / "toy" / "tiny-llava"
base = load_embedder(MODEL, device="cpu")
items = read_retrieval(WORLD / "test" / "karpathy.json", WORLD / "images", most=2)
items = items[: fewer(240, SHARE)]
pictures = [open_image(path) for path, _ in items]
texts = [text for _, captions in items for text in captions]
image_of_text = torch.arange(len(items)).repeat_interleave(2)
dataset = CaptionDataset(WORLD / "train.jsonl", base.layout, base.processor)
lines = (WORLD / "test.jsonl").read_text().splitlines()
long_captions = [json.loads(line)["long"] for line in lines]
_ = torch.manual_seed(0)

# %% [markdown]
# ## The path of one step

# %%
draw.flow(
    [
        ("records", "train.jsonl", draw.GRAY),
        ("collate", "chunks (b, T)", draw.BLUE),
        ("model", "states (b, T, D)", draw.GREEN),
        ("two losses", "scalars", draw.PURPLE),
        ("AdamW", "LoRA, prompts", draw.ORANGE),
    ],
    title="training_step does everything up to the gradients; the loop does the rest",
)

# %% [markdown]
# A batch is not one tensor. `collate` lays pictures and texts out, sorts them by length and cuts
# them into chunks of similar length, so that little padding is computed. The contrastive loss still
# compares all pairs of the batch: embeddings are collected from all chunks first.

# %%
samples = [dataset[index, 0] for index in range(32)]
batch = collate(samples, base.layout, micro_batch=16, caption_share=0.25)
for kind, chunks in (("images", batch.images), ("texts", batch.texts)):
    for chunk in chunks:
        shape = tuple(chunk.input_ids.shape)
        print(f"{kind}: input_ids (b, T) {shape}, summaries at {chunk.summary[:4].tolist()} ...")
print(f"{batch.num_pairs} pairs")
print(f"{batch.num_tokens} tokens for the autoregressive loss, from a quarter of the pictures")
# A quarter in this cell only; the runs below take half, as train.py does, the paper all.

# %% [markdown]
# `training_step` counts the pairs and the tokens of the whole batch, and hands over to
# `backward_whole`, where both losses stand: read this one. Below it, for home: how a chunk becomes
# embeddings, and one of the two losses (`fast.twin` is the same loss in less memory).

# %%
print(inspect.getsource(training.backward_whole))

# %% home
print(inspect.getsource(training.encode))
print(inspect.getsource(training.contrastive))


# %% setup
def make():
    """A fresh embedder with adapters, an optimizer for them, and a batch of eight pictures."""
    embedder = load_embedder(MODEL, device="cpu")
    config = TrainConfig(steps=10)
    add_adapters(embedder, config)
    optimizer = make_optimizer(embedder.model, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    data = CaptionDataset(WORLD / "train.jsonl", embedder.layout, embedder.processor)
    batch = collate([data[index, 0] for index in range(8)], embedder.layout, micro_batch=8)

    def losses():
        return training_step(embedder.model, batch, config)

    return embedder, optimizer, parameters, losses


# %% [markdown]
# ### Exercise 5.1: the step around the step (6 minutes, at home)
#
# `losses()` runs forward and backward, so gradients are in `.grad` when it returns. Do the four
# things that every training loop does. Each group of the optimizer has its own `"peak_lr"`; the
# schedule gives a `factor` from 0 to 1.


# %% exercise 5.1
def step(optimizer, parameters, losses, factor):
    """One optimizer step of `parameters`, a list. Returns what losses() returned."""
    for group in optimizer.param_groups:
        group["lr"] = ...  # 1. the schedule
    result = losses()
    ...  # 2. clip the gradient's norm to 1.0: torch.nn.utils.clip_grad_norm_
    ...  # 3. move
    ...  # 4. forget the gradients
    return result


# %% solution 5.1
def step(optimizer, parameters, losses, factor):
    """One optimizer step of `parameters`, a list. Returns what losses() returned."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    result = losses()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return result


# %% check 5.1
checks.exercise_5_1(step, make)

# %% [markdown]
# The real loop does the same: `training_step`, and then `update`, which also keeps the temperature
# from becoming too cold, and does not move where a gradient is not finite (the run then stops, and
# says so).

# %%
print(inspect.getsource(training.update))

# %% [markdown]
# ## An ablation
#
# Does it need all its parts? Train without one, change nothing else, compare. The paper's table 4
# has four trained rows: soft prompts, LoRA, both, and both with the autoregressive loss. Compare
# only rows that differ in one thing.

# %% [markdown]
# ### Exercise 5.2: four settings (4 minutes)
#
# A row is a dictionary of what differs from `TrainConfig`'s defaults (`dict()` is one, too), which
# are: LoRA of rank 16 (`lora_rank`; 0 switches it off), soft prompts (`soft_prompts`, True or
# False), autoregressive loss at weight 1 (`autoregressive_weight`; 0 switches it off).

# %% exercise 5.2
ROWS = {
    "soft prompts": dict(lora_rank=0, autoregressive_weight=0.0),
    "LoRA": ...,
    "both": ...,
    "both + AR": ...,
}

# %% solution 5.2
ROWS = {
    "soft prompts": dict(lora_rank=0, autoregressive_weight=0.0),
    "LoRA": dict(soft_prompts=False, autoregressive_weight=0.0),
    "both": dict(autoregressive_weight=0.0),
    "both + AR": dict(),
}

# %% check 5.2
checks.exercise_5_2(ROWS)

# %% [markdown]
# Now the runs: 30 steps of 32 pictures each (at SHARE = 1), with the real `train.train`. To save
# time we train two of the rows, *both* and *both + AR*; the committed results of all rows come
# below. Each run takes up to half a minute.


# %%
def train_row(name, steps, **settings):
    """-> the trained embedder, and its log: one dictionary a step."""
    config = TrainConfig(batch_size=32, warmup=4, steps=steps, **settings)
    embedder = load_embedder(MODEL, device="cpu")
    add_adapters(embedder, config)
    data = CaptionDataset(WORLD / "train.jsonl", embedder.layout, embedder.processor)
    out = ROOT / "runs" / "workshop" / name
    shutil.rmtree(out, ignore_errors=True)  # of a former run of this cell
    out.mkdir(parents=True)
    train(embedder, config, data, out)
    log = (out / "log.jsonl").read_text().splitlines()
    return embedder, [json.loads(line) for line in log]


steps = fewer(30, SHARE, least=24)  # with fewer, captions would not have come back
contrast_only, contrast_log = train_row("both", steps, autoregressive_weight=0.0)

# %%
both_losses, both_log = train_row("both + AR", steps)


# %%
def column_of(log, name):
    return [line[name] for line in log]


contrasts = {
    "both": column_of(contrast_log, "contrastive"),
    "both + AR": column_of(both_log, "contrastive"),
}
captions_loss = {"both + AR": column_of(both_log, "autoregressive")}
draw.curves(("contrastive loss", contrasts), ("autoregressive loss", captions_loss))

# %% [markdown]
# ## Evaluate
#
# Two questions: does it find (recall at 1, both ways), and does it still caption? For captions
# there is an exact measure here, because the world is known: the share of sizes, colors and shapes
# that are right in a greedy long caption.


# %%
def scores_of(embedder):
    scores = encode_text(embedder, texts) @ encode_image(embedder, pictures).T  # (texts, images)
    table = recall_at_k(scores, image_of_text)
    count = fewer(48, SHARE)
    said = caption(embedder, pictures[:count], max_new_tokens=80)
    right = world.score_captions(said, long_captions[:count])
    return [table["t2i_r1"], table["i2t_r1"], right["attributes"]]


models = {"before": base, "both": contrast_only, "both + AR": both_losses}
results = {name: scores_of(each) for name, each in models.items()}
names = ["text to image R@1", "image to text R@1", "attributes in captions"]
draw.grouped_bars(names, results)

# %%
draw.pictures(pictures[:1], side=2)
for name, each in models.items():
    print(f"{name}:")
    print(" ", caption(each, pictures[:1], max_new_tokens=80)[0])

# %% [markdown]
# Both runs search about equally well (a point or two more or less is noise). The one without the
# autoregressive loss can no longer say what it sees, behind the prompt that it was trained with.
# The other one still can, with mistakes after so few steps. (The full runs of `toy/ablation.md` end
# at 92.9 % of the attributes, from 92.3, and at 21.0 without this loss.) (Check the last sentences
# against the picture, too: relations are what such a small model knows least.) The curve of the
# contrastive loss shows nothing of all that. **Only an evaluation of the thing you care about
# does.**
#
# `train.py` runs the whole set of tests (`eval.evaluate`: retrieval, SugarCrepe, SugarCrepe++,
# Winoground, captioning) before and after, and prints both.
#
# ## Is the difference real?
#
# `toy/ablation.json` holds the full runs, 150 steps of 128, three seeds a row. Three numbers each.
# Is *both + AR* better than *both*? The seeds give the answer: pair the runs by seed, take the mean
# difference, and its 95 % interval:
#
# $$ \bar d \pm t \, \frac{s}{\sqrt n}, \qquad s^2 = \frac{1}{n-1} \sum_i (d_i - \bar d)^2, \qquad
# t = 4.30 \text{ for } n = 3 $$
#
# ### Exercise 5.3: a difference with its interval (5 minutes)


# %% exercise 5.3
def paired_difference(first, second):
    """Two lists of three scores, by seed -> (mean of second - first, half of its interval)."""
    d = torch.tensor(second) - torch.tensor(first)
    mean = ...
    half = ...  # tensor.std() divides by n - 1 already
    return float(mean), float(half)


# %% solution 5.3
def paired_difference(first, second):
    """Two lists of three scores, by seed -> (mean of second - first, half of its interval)."""
    d = torch.tensor(second) - torch.tensor(first)
    mean = d.mean()
    half = 4.30 * d.std() / len(d) ** 0.5
    return float(mean), float(half)


# %% check 5.3
checks.exercise_5_3(paired_difference)

# %%
committed = json.loads((ROOT / "toy" / "ablation.json").read_text())


def column(row, name):
    return torch.tensor([committed[row][seed]["columns"][name] for seed in sorted(committed[row])])


differences = [
    ("soft prompts", "both", "T2I@1"),
    ("soft prompts", "both", "swap"),
    ("both", "both + AR", "T2I@1"),
    ("both", "both + AR", "swap"),
    ("both", "both + AR", "attributes"),
    ("long captions contrasted", "both", "T2I@1"),
]
small = {}  # those that fit into one figure
for first, second, name in differences:
    d = column(second, name) - column(first, name)  # (3,), one difference a seed
    mean = d.mean().item()
    half = 4.30 * d.std().item() / 3**0.5
    label = f"{name}: {first} → {second}"
    found = "within noise" if abs(mean) <= half else "a difference"
    print(f"{label:48} {mean:+6.2f} ± {half:4.2f}   {found}")
    if abs(mean) < 10:
        small[label] = (mean, half)
draw.intervals(small, "points (the large ones left out)")

# %% [markdown]
# What does LoRA bring, what the autoregressive loss? The paper reports *more composition through
# the autoregressive loss* (swap). Do these three runs say so? Where the interval holds zero, they
# give no evidence either way. Say so when you write it down. And where it does not hold zero, ask
# how much it is: a third of a point of search is small next to losing the captions.
#
# ## Break it
#
# Three ways to ruin a run (the first and the third at home). Guess the symptom before you run a
# cell.
#
# **1. A learning rate 50 times too high** (at home). Chance is log 32 = 3.47.

# %% home
try:
    too_high = 50 * TrainConfig.lr
    _, log = train_row("broken", 12, autoregressive_weight=0.0, lr=too_high)
    lines = {"loss": column_of(log, "contrastive"), "chance": column_of(log, "chance")}
    draw.curves((f"contrastive loss, learning rate {too_high:g}", lines))
except InputError as error:
    print("train.py stopped:", error)

# %% [markdown]
# No crash and no NaN, most of the time. A loss that sits at chance means here: all embeddings have
# become alike.
# That is why the progress bar of `train.py` shows chance beside the loss.
#
# **2. The last position instead of the summary.** The classic. Training is fine, evaluation reads
# `hidden[:, -1]`, where shorter texts of a batch have padding.


# %%
@torch.no_grad()
def encode_text_wrong(embedder, texts):
    rows = [torch.tensor(embedder.layout.text_side(text)) for text in texts]
    hidden = embedder.model(nn.utils.rnn.pad_sequence(rows, batch_first=True))  # (B, T, D)
    return nn.functional.normalize(hidden[:, -1], dim=-1)


images = encode_image(both_losses, pictures)
for name, function in [("summary", encode_text), ("last position", encode_text_wrong)]:
    scores = function(both_losses, texts) @ images.T
    recall = recall_at_k(scores, image_of_text)["t2i_r1"]
    print(f"{name:14} T2I R@1 {recall:5.1f} %")

# %% [markdown]
# Fast, silent, and far from zero: it looks like a model that is a bit weak.

# %% [markdown]
# **3. A leak** (at home). If the caption stood in front of the summary, the summary could read it,
# and the picture would not matter: the contrastive loss would be solved by comparing texts. The
# next exercise catches such bugs before they cost a week.
#
# ### Exercise 5.4: write the test (7 minutes, at home)
#
# `is_right` gets a collate function: the real one, or one of five with a bug that someone really
# has written. It must return True for the real one and False for all others. One check is there;
# four are missing. (A caption ends with `layout.stop_id`, so that the model learns to stop. A test
# that crashes counts as one that caught the bug.)


# %% exercise 5.4
def is_right(collate, layout, samples):
    batch = collate(samples, layout, micro_batch=4)
    for chunk in batch.images:
        start = layout.image_summary
        if not (chunk.summary == start).all():  # the embedding is read at the end of the prompt
            return False
        prompt_is_ignored = ...  # 1. before `start`, every label of `chunk.labels` is IGNORE
        if not prompt_is_ignored:
            return False
        for ids, labels in zip(chunk.input_ids, chunk.labels):  # one sequence: (T,), (T,)
            places = (labels != IGNORE).nonzero()[:, 0]  # positions that are trained, in order
            begins_at_start = ...  # 2. the first of them is `start`
            says_what_follows = ...  # 3. there, the labels are the ids one place further
            learns_to_stop = ...  # 4. the last of these labels is layout.stop_id
            if not (begins_at_start and says_what_follows and learns_to_stop):
                return False
    return True


# %% solution 5.4
def is_right(collate, layout, samples):
    batch = collate(samples, layout, micro_batch=4)
    for chunk in batch.images:
        start = layout.image_summary
        if not (chunk.summary == start).all():  # the embedding is read at the end of the prompt
            return False
        prompt_is_ignored = (chunk.labels[:, :start] == IGNORE).all()
        if not prompt_is_ignored:
            return False
        for ids, labels in zip(chunk.input_ids, chunk.labels):  # one sequence: (T,), (T,)
            places = (labels != IGNORE).nonzero()[:, 0]  # positions that are trained, in order
            begins_at_start = places[0] == start
            says_what_follows = torch.equal(labels[places], ids[places + 1])
            learns_to_stop = labels[places[-1]] == layout.stop_id
            if not (begins_at_start and says_what_follows and learns_to_stop):
                return False
    return True


# %% check 5.4
checks.exercise_5_4(is_right, base.layout, [dataset[index, 0] for index in range(8)])

# %% [markdown]
# Such tests are in `tests/test_data.py` and `tests/test_train.py`. The strongest one runs a whole
# training step against a plain implementation with transformers and peft, and compares losses and
# gradients.
#
# ## What to take home
#
# * A step is: schedule, losses, clip, move, forget.
# * An ablation changes one thing. A difference has an interval. Three seeds are few, one is none.
# * Broken training is silent. Watch chance level, evaluate what you care about, and test the
#   layout.
#
# ## Where to go from here
#
# * Notebook 6: a loss, a model and a prompt of your own, and four faults to find.
# * `python train.py` is the full run of the toy: some minutes, tables before and after.
# * `python train.py --model DIR --data FILE` is the same on a real LLaVA; the README says what it
#   needs.
# * `python -m toy.ablation` repeats the ablation; `python -m toy.pretrain` makes the base model.
