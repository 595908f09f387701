# %% [markdown]
# # 2. From next token to embedding
#
# A LLaVA answers questions. Search needs something else: one vector for a picture and one for a
# text, near each other when they belong together. This notebook gets such vectors out of the model
# **without any training**, and measures how good they are.
#
# You need: what a hidden state is, and that attention is causal (notebook 1). About 25 minutes in a
# room, 40 with what is marked *at home*; four exercises. Nothing later depends on your answers;
# solutions are in `workshop/solutions/`.
#
# Axes: **B** batch, **T** tokens, **D** hidden size, **V** vocabulary.

# %% [markdown]
# **The only setting.** How much of a processor core is yours: 1.0 on a laptop of your own, 0.2 on a
# busy shared server (`python -m examples.check` tells). At 1.0 no cell takes a minute. At 0.2 a
# cell waits about twice as long as on a quiet laptop, and
# retrieval is measured on fewer pictures, which is easier (higher numbers) and less sure.

# %% setup
SHARE = 1.0

# %% setup
import inspect
import sys
from pathlib import Path

here = Path.cwd()  # the project's folder, or workshop/ in it
found = [folder for folder in [here, *here.parents] if (folder / "lora.py").exists()]
assert found, f"{here} is not in the project's folder: start jupyter there, in a terminal"
ROOT = found[0]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import eval as evaluation
from data import Layout, open_image
from eval import Embedder, encode_image, encode_text, load_embedder, recall_at_k
from formats.testsets import read_retrieval, read_winoground
from toy import world
from workshop import checks, draw
from workshop.pace import fewer

WORLD = world.build(ROOT / "runs" / "workshop" / "world", train_scenes=1024, test_scenes=240)
embedder = load_embedder(ROOT / "toy" / "tiny-llava", device="cpu")
model = embedder.model
layout = embedder.layout
tokenizer = embedder.tokenizer
# (path of a picture, two captions), ...
items = read_retrieval(WORLD / "test" / "karpathy.json", WORLD / "images", most=2)
items = items[: fewer(240, SHARE)]
pictures = [open_image(path) for path, _ in items]
captions = [caption for _, texts in items for caption in texts]
image_of_text = torch.arange(len(items)).repeat_interleave(2)  # the picture of each caption
_ = torch.set_grad_enabled(False)  # nothing is trained in this notebook

# %% [markdown]
# ## Two roads that meet at one token
#
# The trick is a question. We show the picture and ask *"Summarize the provided image in one
# word:"*. Before the model says that word, everything it would say is packed into **one** hidden
# state: that of the last token of the prompt. We take this state and never say the word. A text
# gets the same treatment with its own question. Both roads end in the same language model, at the
# same kind of token.

# %%
word_of = tokenizer.tokenizer.id_to_token
image_ids = layout.image_side()
text_ids = layout.text_side(captions[0])


def strip(ids, prompt_length):
    """-> (word, color) of each token."""
    words = []
    for place, index in enumerate(ids):
        color = draw.BLUE
        if place >= len(ids) - prompt_length:
            color = draw.GREEN
        elif index == layout.image_id:
            color = draw.ORANGE
        words.append((word_of(index).replace("<image>", "img"), color))
    return words


image_strip = strip(image_ids, len(layout.image_prompt))
text_strip = strip(text_ids, len(layout.text_prompt))
draw.tokens(
    ("image side: picture (orange), prompt (green)", image_strip),
    ("text side: template and caption (blue), prompt (green)", text_strip),
    title="The outlined token is the summary.",
    marked={(0, len(image_ids) - 1), (1, len(text_ids) - 1)},
)
print("image side (B, T):", (1, len(image_ids)))
print("text side  (B, T):", (1, len(text_ids)))

# %% [markdown]
# What would the model say? Here is its next-token distribution at the summary, for a picture and
# for one of its captions. The toy's language has compound nouns for what belongs together:
# "red-ring" is a ring that is red, "right-cyan" something cyan on the right. So one word can say
# who owns what. (Not all that get a share are true: this base was stopped early, and often mixes up
# who owns what.)


# %%
def next_words(ids, pixels=None, count=8):
    hidden = model(torch.tensor([ids]), pixels)  # (1, T, D)
    best = model.logits(hidden[0, -1]).softmax(-1).topk(count)
    return [word_of(index) for index in best.indices.tolist()], best.values.tolist()


draw.pictures(pictures[:1], [captions[0]], side=2)
draw.bars(
    ("behind the picture", *next_words(image_ids, embedder.pixel_values(pictures[:1]))),
    (f"behind the text: {captions[0]}", *next_words(text_ids)),
    xlabel="probability",
)

# %% [markdown]
# Many words get a share: there is no single right word for a picture. That is good news. A state
# that must be ready to say many different words has to know many things.
#
# ### Exercise 2.1: find the summary in a padded batch (4 minutes)
#
# Sequences of a batch have different lengths. Shorter ones are filled up with padding on the
# **right**. So the summary of row b is not at position -1. It is at position `lengths[b] - 1`.
# Taking -1 is the most common silent bug in embedding code: nothing crashes, the numbers are just
# worse.


# %% exercise 2.1
def summary_states(hidden, lengths):
    """hidden (B, T, D), lengths (B,): real tokens of each row -> (B, D)."""
    rows = torch.arange(len(hidden))
    positions = ...  # (B,), of each row's summary
    return hidden[rows, positions]


# %% solution 2.1
def summary_states(hidden, lengths):
    """hidden (B, T, D), lengths (B,): real tokens of each row -> (B, D)."""
    rows = torch.arange(len(hidden))
    positions = lengths - 1
    return hidden[rows, positions]


# %% check 2.1
checks.exercise_2_1(summary_states)

# %% [markdown]
# ### Exercise 2.2: embed texts (5 minutes, at home)
#
# Three steps: lay out each text with its prompt (`layout.text_side(text)` gives the ids), run the
# padded batch through the model, take the summary states and bring them to unit length: $e = h /
# \lVert h \rVert$, so that a dot product is a cosine. The model takes the ids alone, without a
# mask: what pads a row stands behind its tokens, and no token sees what is behind it.


# %% exercise 2.2
def embed_texts(embedder, texts):
    """A list of B strings -> (B, D), unit length."""
    rows = [torch.tensor(embedder.layout.text_side(text)) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    # (B, T), padded on the right with 0
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = ...  # (B, T, D)
    summary = ...  # (B, D)
    return F.normalize(summary, dim=-1)


# %% solution 2.2
def embed_texts(embedder, texts):
    """A list of B strings -> (B, D), unit length."""
    rows = [torch.tensor(embedder.layout.text_side(text)) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    # (B, T), padded on the right with 0
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = embedder.model(input_ids)
    summary = hidden[torch.arange(len(rows)), lengths - 1]
    return F.normalize(summary, dim=-1)


# %% check 2.2
checks.exercise_2_2(embed_texts, embedder)

# %% [markdown]
# The real function is `eval.encode`. It sorts by length to save padding, and takes pictures too (at
# home):

# %% home
print(inspect.getsource(evaluation.encode))

# %% [markdown]
# ## Zero-shot retrieval
#
# Some pictures, 2 captions each. We embed all and compare all: `texts @ images.T`.

# %% setup
images = encode_image(embedder, pictures)
texts = encode_text(embedder, captions)
scores = texts @ images.T  # (texts, images), cosine similarities

# %%
print(f"{len(pictures)} pictures, {len(captions)} captions")
print("images (B, D):         ", tuple(images.shape))
print("texts (B, D):          ", tuple(texts.shape))
print("scores (texts, images):", tuple(scores.shape))
some = scores[0:24:2, :12]  # the first caption of each of 12 pictures
draw.matrices(("cosine: 12 captions (down) with their 12 pictures (across)", some))

# %% [markdown]
# The bright diagonal was never trained: no two examples were ever compared while this model learned
# to talk.
#
# ### Exercise 2.3: recall at 1 (5 minutes)
#
# R@1 is the share of texts whose own picture has the highest score of all pictures. One trap:
# **ties**. If a broken model gives every picture the same score, "my score is at least as high as
# the others" is always true, and R@1 would be 100 %. So the own picture must be *strictly* better
# than every other one.


# %% exercise 2.3
def recall_at_1(scores, image_of_text):
    """scores (texts, images), image_of_text (texts,): the right picture of each text -> percent."""
    own = scores.gather(1, image_of_text[:, None])  # (texts, 1), the score of the right picture
    at_least_as_good = ...  # (texts,), how many pictures score >= own; the right one always does
    return 100 * (at_least_as_good == 1).double().mean().item()


# %% solution 2.3
def recall_at_1(scores, image_of_text):
    """scores (texts, images), image_of_text (texts,): the right picture of each text -> percent."""
    own = scores.gather(1, image_of_text[:, None])  # (texts, 1), the score of the right picture
    at_least_as_good = (scores >= own).sum(dim=1)
    return 100 * (at_least_as_good == 1).double().mean().item()


# %% check 2.3
checks.exercise_2_3(recall_at_1)

# %%
for way, value in recall_at_k(scores, image_of_text).items():
    print(f"{way}  {value:5.1f} %")
print(f"chance of t2i_r1: {100 / len(pictures):.2f} %")

# %% [markdown]
# T2I is text to image, I2T image to text; `r1`, `r5` and `r10` ask whether the right one is among
# the first one, five or ten. Now look: three captions, and the six nearest pictures of each, with
# their cosine. A green frame marks the caption's own picture.

# %%
for text_index in (0, 8, 16):
    best = scores[text_index].topk(6)
    found = best.indices.tolist()
    own = image_of_text[text_index].item()
    frames = [True if index == own else None for index in found]
    cosines = [f"{value:.3f}" for value in best.values.tolist()]
    print(captions[text_index])
    draw.pictures([pictures[index] for index in found], cosines, frames=frames, side=1.3)

# %% [markdown]
# ## The prompt matters
#
# Does it have to be this question? We try others, and an empty one (then only `ASSISTANT:`
# follows). For each we measure R@1, and the **entropy** of the next-token distribution at the
# summary:
#
# $$ H = -\sum_v p_v \log p_v $$
#
# It is 0 when the model is sure of one word, and $\log V$ when all words are equally likely. The
# paper found over 50 prompts: higher entropy goes with richer embeddings and better retrieval.
#
# ### Exercise 2.4: entropy (3 minutes)


# %% exercise 2.4
def entropy(logits):
    """logits (B, V) -> (B,), in nats. log_softmax is safe where a probability is almost 0."""
    log_p = logits.log_softmax(dim=-1)
    return ...


# %% solution 2.4
def entropy(logits):
    """logits (B, V) -> (B,), in nats. log_softmax is safe where a probability is almost 0."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


# %% check 2.4
checks.exercise_2_4(entropy)

# %% [markdown]
# One more number, for home, tells how rich the embeddings are. The **effective rank** is $\exp
# H(\sigma)$: the exponential of the entropy of the embedding matrix's singular values, scaled to
# sum to 1. It says how many directions the embeddings really use, out of D. The cell takes up to
# half a minute.

# %%
PROMPTS = {  # name: (image prompt, text prompt)
    "one word (the paper's)": (
        "Summarize the provided image in one word:",
        "Summarize the provided text in one word:",
    ),
    "describe": ("Describe the image in detail.", "Describe the text in detail."),
    "what color": ("What color is the object?", "What color is the object?"),
    "how many": ("How many objects are there?", "How many objects are there?"),
    "yes or no": ("Is there a picture? yes no", "Is there a picture? yes no"),
    "empty question": ("", ""),
}


def effective_rank(embeddings):  # (B, D) -> a number from 1 to D
    values = torch.linalg.svdvals(embeddings - embeddings.mean(0))
    p = values / values.sum()
    return (-(p * p.clamp(min=1e-12).log()).sum()).exp().item()  # exp H


def mean_entropy(embedder, pictures):
    """Of the next token behind the image prompt, in nats."""
    input_ids = torch.tensor([embedder.layout.image_side()] * len(pictures))
    hidden = embedder.model(input_ids, embedder.pixel_values(pictures))  # (B, T, D)
    log_p = embedder.model.logits(hidden[:, -1]).log_softmax(-1)  # (B, V)
    return -(log_p.exp() * log_p).sum(-1).mean().item()


count = fewer(200, SHARE)
recalls = []
entropies = []
for name, prompts in PROMPTS.items():
    asked = Layout(tokenizer, layout.num_image_tokens, *prompts)
    other = Embedder(model, asked, embedder.processor)
    i = encode_image(other, pictures[:count])
    t = encode_text(other, captions[: 2 * count : 2])
    recalls.append(recall_at_k(t @ i.T, torch.arange(count))["t2i_r1"])
    entropies.append(mean_entropy(other, pictures[: fewer(64, SHARE)]))
    print(f"{name:24} T2I R@1 {recalls[-1]:5.1f} %   entropy {entropies[-1]:.2f}", end="   ")
    print(f"effective rank {effective_rank(i):.0f}")

# %%
x_label = "entropy of the next token (nats)"
draw.scatter(entropies, recalls, list(PROMPTS), x_label, f"T2I R@1 of {count}, %")

# %% [markdown]
# Two things to see:
#
# * *Describe the image* has the lowest entropy, and nearly no retrieval. Of course: every
#   description of this world begins with "there". The state behind this prompt is busy with one
#   word that is the same for all pictures. *How many* is the same story with three words.
# * High entropy goes with good retrieval, as in the paper. But read it with care: six prompts, one
#   small model. Where the empty question does nearly as well as the paper's, that is this model:
#   its pre-training is full of one-word summaries, so that is what it does when nothing is asked. A
#   real LLaVA would begin to chat.

# %% [markdown]
# ## Who owns what (at home)
#
# Same words, different owners: a test in the manner of Winoground. A model that reads a caption
# like a bag of words cannot tell these apart. Row: caption. Column: picture. In each row and each
# column the diagonal must win; where it does not, the model has read words and not the sentence.
# (Right is [0, 1], both times. Of all such items this base gets one of twelve.)

# %% home
folder = WORLD / "test" / "winoground"
quadruples = read_winoground(folder / "examples.jsonl", folder / "images")
for item in quadruples[:2]:
    pair = [open_image(item["image_0"]), open_image(item["image_1"])]
    both = [item["caption_0"], item["caption_1"]]
    draw.pictures(pair, both, columns=2)
    grid = encode_text(embedder, both) @ encode_image(embedder, pair).T  # (2, 2)
    draw.matrices(("cosine", grid), rows=both, columns=["first", "second"], numbers=3)
    pictures_chosen = grid.argmax(dim=1).tolist()
    captions_chosen = grid.argmax(dim=0).tolist()
    print(f"captions choose pictures {pictures_chosen}, pictures choose captions {captions_chosen}")
    print("all of them right:", pictures_chosen == captions_chosen == [0, 1])

# %% [markdown]
# ## What to take home
#
# * An embedding is the hidden state at the last token of a well-chosen prompt. No new head, no
#   pooling layer.
# * Right padding: the summary is at `lengths - 1`, never at -1.
# * The model retrieves already, before any fine-tuning. It was trained to say, not to compare:
#   notebooks 3 and 5 train it to do that, too.
#
# If there is time: add your own prompt to `PROMPTS`. The model knows the words in
# `toy/tiny-llava/tokenizer.json`, any other is `<unk>`. Notebook 6 makes an exercise of it.
