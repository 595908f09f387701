# %% [markdown]
# # 3. Two losses, one pass
#
# VladVA trains with two losses at once. The **contrastive** loss pulls a picture and its short caption together. The
# **autoregressive** loss keeps the model able to write long captions. This notebook builds both, shows why the
# contrastive one must not see long captions, and how one forward pass serves both.
#
# You need: an embedding is the hidden state at the summary position (notebook 2). About 35 minutes, four exercises.
# Nothing later depends on your answers; solutions are in `workshop/solutions/`.
#
# Axes: **B** pairs in a batch, **T** tokens, **D** hidden size, **V** vocabulary.

# %% setup
import inspect
import json
import shutil
import sys
import time
from pathlib import Path

ROOT = next(folder for folder in [Path.cwd(), *Path.cwd().parents] if (folder / "lora.py").exists())
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import losses
from data import IGNORE, CaptionDataset, collate, open_image, read_retrieval
from eval import encode_image, encode_text, load_run, recall_at_k
from toy import world
from train import TrainConfig, add_adapters, train
from workshop import checks, draw

WORLD = world.build(ROOT / "runs" / "workshop" / "world", train_scenes=1024, test_scenes=400)
run = load_run(ROOT / "toy" / "tiny-llava", device="cpu")
model, layout, tokenizer = run.model, run.layout, run.tokenizer
dataset = CaptionDataset(WORLD / "train.jsonl", layout, run.processor)

# %% [markdown]
# One record of the training data (`dataset[index, draw]` takes one caption of each kind; `draw` says which): a
# picture, short captions that say a part of the truth, and a long one that says all of it.

# %%
record = dataset.record(0)
draw.pictures([open_image(dataset.root / record["image"])], side=2)
print("short:", *record["short"], sep="\n  ")
print("long:", *record["long"], sep="\n  ")

# %% [markdown]
# ## The contrastive loss
#
# Take B pairs. Compare every picture with every text: a B x B matrix of cosine similarities, times a scale (1 /
# temperature). In row i, the right text is in column i. That is a classification problem with B classes, and the loss
# for it is cross-entropy. The same for the columns:
#
# $$ s_{ij} = \frac{1}{\tau} \cos(f_v^i, f_t^j), \qquad
# L = -\frac{1}{2B} \sum_i \left( \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} +
# \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}} \right) $$

# %%
samples = [dataset[index, 0] for index in range(12)]
pictures = [open_image(dataset.root / dataset.record(index)["image"]) for index in range(12)]
images, texts = encode_image(run, pictures), encode_text(run, [sample.short for sample in samples])
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
# Keep log B in mind: a loss at log B means that nothing is learned yet.
#
# ## Where the gradient goes
#
# The gradient of the loss at $s_{ij}$ is $(p_{ij} + q_{ij} - 2\,[i = j]) / 2B$, where p is the softmax over rows and
# q over columns. So a wrong pair gets a push in proportion to the probability the model gives it. Easy negatives get
# none. **Hard** negatives get it all. The toy world makes hard ones: a scene and its *twin*, in which two objects
# have exchanged color, size or place.

# %%
first = next(index for index in range(len(dataset)) if "group" in dataset.record(index))
chosen = [first, first + 1, first + 2, first + 3, first + 4, first + 5]
pictures = [open_image(dataset.root / dataset.record(index)["image"]) for index in chosen]
short = [dataset.record(index)["short"][0] for index in chosen]
draw.pictures(pictures, short)
weights = (encode_image(run, pictures) @ encode_text(run, short).T / 0.07).softmax(1)  # (6, 6)
draw.matrices(("p: which text each picture picks", weights), numbers=True)

# %% [markdown]
# Pictures 0 and 1 are twins, and so are 4 and 5 (in the matrices above they were the 2 x 2 blocks on the diagonal).
# Whatever probability is lost is lost to the twin's text. This is why `train.py` keeps twins in the same batch
# (`--groups`).
#
# ## The autoregressive loss
#
# Nothing new: predict the next token of the long caption, given the picture, the prompt, and the caption so far.
#
# $$ L_{AR} = -\frac{1}{\text{tokens}} \sum_t \log p(u_{t+1} \mid \text{picture}, \text{prompt}, u_{\le t}) $$
#
# The long caption stands **behind** the image prompt. Outlined below: the positions that are trained to predict what
# follows them. The first of them is the summary position itself.

# %%
caption = tokenizer.encode("There are two objects on a navy background.")
ids = layout.image_side(caption)
names = [tokenizer.tokenizer.id_to_token(index).replace("<image>", "img") for index in ids]
colors = [
    draw.ORANGE if i == layout.image_id else draw.GREEN if n <= layout.image_summary else draw.BLUE
    for n, i in enumerate(ids)
]
supervised = {(0, place) for place in range(layout.image_summary, len(ids) - 1)}
draw.tokens(("picture (orange), prompt (green), long caption (blue)", list(zip(names, colors))), marked=supervised)
print("input_ids (B, T):", (1, len(ids)), " image_summary:", layout.image_summary)

# %% [markdown]
# ### Exercise 3.2: the labels (5 minutes)
#
# `labels[t]` is the token that follows position t, or `IGNORE` (-100) where nothing is to be predicted.
# `ids.roll(-1)` moves every id one place to the left: a good start. Then decide which positions predict.


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
checks.exercise_3_2(caption_labels, run)

# %% [markdown]
# The real lines are in `data.collate`; look for `predicts`:

# %%
print(*[line for line in inspect.getsource(collate).splitlines() if "predicts" in line or "summary" in line], sep="\n")

# %% [markdown]
# ## One pass for both
#
# We need the state at the summary, and we need predictions for the caption behind it. Because attention is causal,
# the summary cannot see the caption. So **one** forward pass of `[picture][prompt][long caption]` gives both: the
# embedding is the same as without the caption.

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
# ### Exercise 3.3: both from one pass (6 minutes)
#
# A `Chunk` of `data.py` holds `input_ids` (b, T), `pixel_values`, `summary` (b,) and `labels` (b, T).
# `losses.cross_entropy_of_logits(hidden, head, labels, num_tokens)` is the autoregressive loss; the head's matrix is
# `model.lm_head.weight`, (V, D).


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
    loss = losses.cross_entropy_of_logits(hidden, model.lm_head.weight, chunk.labels, num_tokens)
    return embeddings, loss


# %% check 3.3
checks.exercise_3_3(one_pass, run, collate([dataset[i, 0] for i in range(4)], layout, micro_batch=4).images[0], 200)

# %% [markdown]
# Is it exact, and what does it save? We compare with two passes, forward and backward, on 32 pictures. (`model` has
# no adapters yet: its own weights get the gradients here, and nobody uses them.)

# %%
chunk = collate([dataset[index, 0] for index in range(32)], layout, micro_batch=32).images[0]
tokens = int((chunk.labels != IGNORE).sum())
head, rows = model.lm_head.weight, torch.arange(len(chunk.input_ids))


def once():
    hidden = model(chunk.input_ids, chunk.pixel_values)
    return hidden[rows, chunk.summary], losses.cross_entropy_of_logits(hidden, head, chunk.labels, tokens)


def twice():
    short = model(chunk.input_ids[:, : layout.image_summary + 1], chunk.pixel_values)  # ends at the summary
    hidden = model(chunk.input_ids, chunk.pixel_values)
    return short[:, -1], losses.cross_entropy_of_logits(hidden, head, chunk.labels, tokens)


seconds = {}
for name, function in [("two passes", twice), ("one pass", once)] * 3:
    start = time.perf_counter()
    embeddings, loss = function()
    (embeddings.sum() + loss).backward()
    model.zero_grad()
    seconds[name] = min(seconds.get(name, 99), time.perf_counter() - start)
difference = (once()[0] - twice()[0]).abs().max().item()
print(f"largest difference of the embeddings: {difference:.1e} (rounding)")
print(*[f"{name}: {value:.2f} s" for name, value in seconds.items()], sep="\n")

# %% [markdown]
# Here it saves a part; the caption is the longer half. In a real LLaVA, 576 image tokens come in front of a caption
# of 100 or 200, and reading them twice would cost far more.
#
# ## Why long captions collapse the contrastive loss
#
# Long captions say everything. Would they not be the better partners? We try, live. Two runs with the real
# `train.train`, contrastive loss only, which differ in one setting: `contrast="short"` or `"long"`. Each takes up to
# half a minute.


# %%
def train_briefly(contrast):
    """-> the trained run, and its log: one dictionary a step."""
    config = TrainConfig(steps=40, batch_size=32, warmup=4, ar_weight=0.0, contrast=contrast)
    trained = load_run(ROOT / "toy" / "tiny-llava", device="cpu")
    add_adapters(trained, config)
    data = CaptionDataset(WORLD / "train.jsonl", trained.layout, trained.processor, contrast=contrast)
    out = ROOT / "runs" / "workshop" / contrast
    shutil.rmtree(out, ignore_errors=True)  # of a former run of this cell
    out.mkdir(parents=True)
    train(trained, config, data, out)
    return trained, [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


on_short, short_log = train_briefly("short")

# %%
on_long, long_log = train_briefly("long")

# %%
items = read_retrieval(WORLD / "test" / "karpathy.json", WORLD / "images", most=2)
test_pictures = [open_image(path) for path, _ in items]
test_texts = [text for _, captions in items for text in captions]
image_of_text = torch.arange(len(items)).repeat_interleave(2)
recalls = {}
for name, each in {"untrained": run, "trained on short": on_short, "trained on long": on_long}.items():
    scores = encode_text(each, test_texts) @ encode_image(each, test_pictures).T  # (texts, images)
    table = recall_at_k(scores, image_of_text)
    recalls[name] = [table["t2i_r1"], table["i2t_r1"]]


def smooth(log):
    return F.avg_pool1d(torch.tensor([[line["contrastive"] for line in log]]), 5, 1)[0].tolist()


draw.curves(
    (
        "contrastive loss in training, mean of 5 steps",
        {"short captions": smooth(short_log), "long captions": smooth(long_log)},
    ),
    log=True,
)
draw.grouped_bars(
    ["text to image R@1", "image to text R@1"], recalls, title="retrieval of 400 test pictures by short captions"
)

# %% [markdown]
# The loss of the long captions falls much lower, and the search by text gets **worse** than without any training.
# With 150 steps (`python -m toy.ablation`, over three seeds) the loss ends at 0.02 against 0.34, and text-to-image
# R@1 at half.
#
# Why? A long caption differs from every other in many words at once. A few of them are enough to find the partner, so
# the task is soon solved, and then nothing is left to learn from. The number for that is easy to compute.
#
# ### Exercise 3.4: what is left to learn (5 minutes)
#
# In the gradient above, the push on pair (i, i) is $(p_{ii} + q_{ii} - 2)/2B$. Summed over i, with the opposite sign,
# it is the mean of $1 - (p_{ii} + q_{ii})/2$: the probability that still lies on wrong pairs. At 1 everything is to
# be learned, at 0 nothing.


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
held_out = [json.loads(line) for line in (WORLD / "test.jsonl").read_text().splitlines()[:128]]
looks = [open_image(WORLD / each["image"]) for each in held_out]
left = {}
for kind, each, log in [("short", on_short, short_log), ("long", on_long, long_log)]:
    values = []
    for one, temperature in [(run, 0.07), (each, log[-1]["temperature"])]:
        s = encode_image(one, looks) @ encode_text(one, [e[kind][0] for e in held_out]).T / temperature
        values.append(50 * (2 - s.softmax(0).diagonal() - s.softmax(1).diagonal()).mean().item())
    left[f"{kind} captions"] = values
draw.grouped_bars(
    ["before training", "after 40 steps"],
    left,
    title="probability on wrong pairs, among 128 test scenes, at the run's temperature",
)

# %% [markdown]
# ## What to take home
#
# * Contrastive: cosine over temperature, cross-entropy both ways. The gradient lives on hard negatives.
# * Autoregressive: next token, from the summary position on, on long captions only.
# * Causal attention lets one pass serve both, exactly.
# * Too easy a task teaches nothing. Short captions leave something to learn; long ones do not, and they are not what
#   people type into a search box.
#
# If there is time: change `steps=40` to `steps=80` for the long captions. Does the search recover?
