# %% [markdown]
# # 1. LLaVA's forward pass, shape by shape
#
# A picture and a question go in, words come out. This notebook follows one picture through the
# machine and stops at every box. At the end you know every tensor on the way, and you have changed
# the real code and seen what breaks. It begins with the whole paper on one page.
#
# You need: Python, some PyTorch (what a matrix product and `nn.Linear` are). About 40 minutes in a
# room, 50 with everything; four exercises. What is marked *at home* is left out when a room has
# three hours for notebooks 1 to 5: skip these cells, and go on at the next text. Nothing later
# needs them.
#
# How to work: run the cells in order with Shift+Enter. An exercise is a cell with a blank, `...`.
# The cell below it checks your answer and gives a hint. Replace the `...`; you may add lines.
# **Nothing later depends on your answers.** If you are stuck, read the hint, look into
# `workshop/solutions/`, or go on.
#
# Axes, in this notebook and in the code: **B** batch, **T** tokens, **N** image tokens, **D**
# hidden size, **H** heads, **V** vocabulary.

# %% [markdown]
# **The only setting.** How much of a processor core is yours: 1.0 on a laptop of your own, 0.2 on a
# busy shared server (`python -m examples.check` tells). At 1.0 no cell takes a minute. At 0.2 a
# cell waits about twice as long as on a quiet laptop, and
# the page's run has fewer steps; all else is short anyway.

# %% setup
SHARE = 1.0

# %% setup
import inspect
import json
import runpy
import sys
from pathlib import Path

here = Path.cwd()  # the project's folder, or workshop/ in it
found = [folder for folder in [here, *here.parents] if (folder / "lora.py").exists()]
assert found, f"{here} is not in the project's folder: start jupyter there, in a terminal"
ROOT = found[0]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import model as llava_code  # model.py; `model` below is the loaded network
from data import open_image
from eval import load_embedder
from formats.testsets import read_retrieval
from toy import world
from workshop import checks, draw
from workshop.pace import fewer

WORLD = world.build(ROOT / "runs" / "workshop" / "world", train_scenes=1024, test_scenes=240)
MODEL = ROOT / "toy" / "tiny-llava"
embedder = load_embedder(MODEL, device="cpu")  # a model with all it takes to use it
model = embedder.model
layout = embedder.layout  # of sequences
tokenizer = embedder.tokenizer
# (path of a picture, its captions), ...
items = read_retrieval(WORLD / "test" / "karpathy.json", WORLD / "images")
_ = torch.set_grad_enabled(False)  # nothing is trained in this notebook

# %% [markdown]
# That built a small world of pictures (once for all notebooks, a few seconds) and loaded a small
# LLaVA. It has the same parts, in the same file format, as the real one of 7 billion parameters.

# %%
size = sum(parameter.numel() for parameter in model.parameters())
print(f"{size / 1e6:.1f} million parameters")
pictures = [open_image(path) for path, _ in items[:12]]
draw.pictures(pictures, [captions[0] for _, captions in items[:12]])

# %% [markdown]
# ## The whole paper on one page
#
# The paper is VladVA, "Discriminative Fine-tuning of LVLMs" (CVPR 2025, arXiv 2412.04378). It takes
# a LLaVA that was trained to write (the *base*), and teaches it to give one vector for a picture
# and one for a text, such that those of a pair lie close. How often the right one is the nearest is
# called recall. Two losses: the *contrastive* one lets partners find each other, the
# *autoregressive* one is the next word's, so that writing is not lost.
# [`workshop/one_page.py`](one_page.py) is all of it in 200 lines: LLaVA, what is added to it, both
# losses, training, retrieval and a caption before and after. It imports nothing of this project,
# and a test holds it to the same losses and gradients. At home, read `losses` and `read_images` in
# it; you will not understand all of it yet, it comes piece by piece in the notebooks. This is what
# it prints, after 100 steps, which take a minute or two. (Its captions end in sentences about how
# things lie to each other. Most of those are false, before training and after it: this base was
# stopped early, and has places and colors mostly right, relations not.)

# %%
print((ROOT / "docs" / "one-page.txt").read_text())

# %% [markdown]
# At home, see it live, for 20 steps on this notebook's smaller world. (`runpy` does what `python
# workshop/one_page.py --steps 20` does in a terminal.) It takes up to half a minute. Look at two
# things: what recall was and is (with so few steps and pictures, a point or two is noise), and that
# the model still writes.

# %% home
page = str(ROOT / "workshop" / "one_page.py")
command = [page, "--data", str(WORLD), "--steps", str(fewer(20, SHARE))]
with checks.replaced(sys, "argv", command), torch.enable_grad():
    _ = runpy.run_path(page, run_name="__main__")

# %% [markdown]
# Where each block of the page grows in these notebooks ([docs/one-page.md](../docs/one-page.md)
# says the same of the code):
#
# | on the page | what it is | notebook |
# |---|---|---|
# | `see`, `norm`, `attention`, `read` | LLaVA's forward pass | 1, all of it |
# | `encode`, `embed` | words to ids to vectors | 1, *One sequence for both*; 4, *Soft prompts* |
# | `read_images`, `read_texts` | what stands where in a sequence | 2, *Two roads ...* |
# | `measure` | recall at 1 | 2, *Zero-shot retrieval* |
# | `losses` | both losses, one pass | 3, all of it |
# | `linear`, `add_adapters` | LoRA and what else learns | 4, all of it |
# | the loop | a training run | 5, all of it |
# | a line of your own | another loss, model, prompt; what breaks in silence | 6, all of it |

# %% [markdown]
# ## The map
#
# Here is the whole machine. Every box is one class in `model.py`, or one line. Below each name
# stands the shape that leaves the box, for one picture.

# %%
vision = model.config.vision
text = model.config.text
S = vision.image_size
P = vision.patch_size
N = model.config.num_image_tokens
draw.flow(
    [
        ("picture", f"{S} x {S}", draw.GRAY),
        ("pixel values", f"(1, 3, {S}, {S})", draw.GRAY),
        ("patches", f"(1, {N}, {vision.hidden_size})", draw.BLUE),
        ("vision tower", f"(1, {vision.num_states}, {vision.hidden_size})", draw.BLUE),
        ("projector", f"(1, {N}, {text.hidden_size})", draw.ORANGE),
    ],
    [
        ("question", "text", draw.GRAY),
        ("token ids", "(1, T)", draw.GRAY),
        ("embeddings", f"(1, T, {text.hidden_size})", draw.GREEN),
        ("language model", f"(1, T, {text.hidden_size})", draw.GREEN),
        ("head", f"(1, T, {text.vocab_size})", draw.PURPLE),
    ],
    title="Row 1 makes image features. They take the image tokens' places in row 2's embeddings.",
)

# %% [markdown]
# ## From a picture to patches
#
# The image processor resizes the picture and normalises each color channel: $x = (\text{pixel}/255
# - \text{mean}) / \text{std}$. The numbers come from the checkpoint's `preprocessor_config.json`.
# The processor keeps the results for all 256 values in a table.

# %% setup
image = open_image(items[0][0])
pixel_values = embedder.pixel_values([image])

# %%
settings = json.loads((MODEL / "preprocessor_config.json").read_text())
red = image.getpixel((0, 0))[0]  # in the top left corner
x = (red / 255 - settings["image_mean"][0]) / settings["image_std"][0]  # the formula
found = pixel_values[0, 0, 0, 0]
print("pixel_values (B, 3, height, width):", tuple(pixel_values.shape))
print(f"red in the top left corner: {red}; by the formula {x:.4f}, in pixel_values {found:.4f}")
draw.patch_grid(image, P)

# %% [markdown]
# A transformer reads a sequence, so the picture is cut into patches and read row by row. The code
# does both, cutting and multiplying, with one convolution whose stride equals its kernel. Here is
# the real module (at home):

# %% home
print(inspect.getsource(llava_code.VisionEmbeddings.forward))

# %% [markdown]
# ### Exercise 1.1: the patch embedding without a convolution (4 minutes, at home)
#
# A patch is $3 \cdot P \cdot P$ numbers. Its embedding is $W \cdot \text{patch}$: one matrix for
# all patches. Cutting is done for you. Flatten the patches and multiply.
#
# The weight of the convolution has shape (D, 3, P, P), with D the tower's own width.
# `tensor.flatten(1)` makes it (D, 3 · P · P).


# %% exercise 1.1
def patch_embedding(pixels, weight):
    """pixels (B, 3, S, S), weight (D, 3, P, P) -> (B, patches, D), row by row."""
    P = weight.shape[-1]
    patches = pixels.unfold(2, P, P).unfold(3, P, P)  # (B, 3, rows, columns, P, P)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (B, rows, columns, 3, P, P)
    # 1. Flatten to (B, rows * columns, 3 * P * P).
    # 2. Multiply by the flattened weight, transposed.
    return ...


# %% solution 1.1
def patch_embedding(pixels, weight):
    """pixels (B, 3, S, S), weight (D, 3, P, P) -> (B, patches, D), row by row."""
    P = weight.shape[-1]
    patches = pixels.unfold(2, P, P).unfold(3, P, P)  # (B, 3, rows, columns, P, P)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (B, rows, columns, 3, P, P)
    patches = patches.flatten(3).flatten(1, 2)  # (B, patches, 3 * P * P)
    return patches @ weight.flatten(1).T


# %% check 1.1
checks.exercise_1_1(patch_embedding)

# %% [markdown]
# ## The vision tower and the projector
#
# The tower is the half of CLIP that sees, a network trained to match pictures and texts. It gives a
# *state* for each position, a vector. CLIP puts a class token in front of the patches, so there is
# one state more than patches. LLaVA does not want it. The real one does not read the last layer
# either: it takes the last but one (`vision_feature_layer`), whose states are still about their own
# place; the toy has few layers and takes its last. Then two linear layers bring each patch to the
# width of the language model.

# %%
features = model.vision_tower(pixel_values)
projected = model.multi_modal_projector(features[:, 1:])
print("vision tower (B, class token + N, D of the vision tower):", tuple(features.shape))
print("projector    (B, N, D of the language model):           ", tuple(projected.shape))
print()
print(inspect.getsource(llava_code.Llava.image_features))

# %% [markdown]
# ## One sequence for both
#
# The question is text with a hole for the picture: the token `<image>`, once for each patch. Around
# it stands the template that this model was trained with: `<s> USER: ... ASSISTANT:`. Run the cell
# and read the strip from left to right.

# %% setup
question = "Describe the image in detail."
prompt = layout.question(question)  # token ids, a list
input_ids = torch.tensor([prompt])  # (1, T)
word_of = tokenizer.tokenizer.id_to_token

# %%
words = [word_of(index).replace("<image>", "img") for index in prompt]
colors = [draw.ORANGE if index == layout.image_id else draw.GREEN for index in prompt]
draw.tokens(("orange: places of image features, green: words", list(zip(words, colors))))
count = prompt.count(layout.image_id)
print(f"input_ids (B, T): {(1, len(prompt))}; {count} of them are {layout.image_id}, <image>")

# %% [markdown]
# ### Exercise 1.2: put the image features in their places (4 minutes)
#
# Look up the embedding of every id. Then write the features over the rows where the id is the image
# token's. All pictures have the same number of features, so a boolean mask and one assignment are
# enough.


# %% exercise 1.2
def splice(input_ids, features, table, image_token_id):
    """input_ids (B, T), features (B, N, D), table (V, D) -> embeddings (B, T, D)."""
    embeddings = table[input_ids]  # (B, T, D), a copy
    is_image = ...  # (B, T), True where the id is the image token's
    ...  # write the features, flattened to (B * N, D), into embeddings[is_image]
    return embeddings


# %% solution 1.2
def splice(input_ids, features, table, image_token_id):
    """input_ids (B, T), features (B, N, D), table (V, D) -> embeddings (B, T, D)."""
    embeddings = table[input_ids]  # (B, T, D), a copy
    is_image = input_ids == image_token_id  # (B, T), True where the id is the image token's
    embeddings[is_image] = features.flatten(0, 1)
    return embeddings


# %% check 1.2
checks.exercise_1_2(splice)

# %% [markdown]
# The real code does the same with `masked_scatter` (which also works on tensors that need
# gradients), and first counts whether places and features match. Below it stands the whole forward
# pass.

# %%
print(inspect.getsource(llava_code.Llava.insert_images))
print(inspect.getsource(llava_code.Llava.forward))

# %% [markdown]
# ## Attention looks back, never ahead
#
# In the language model, each token collects from the tokens before it. Three linear layers make of
# its state a query q (what it looks for), a key k (what it offers) and a value v (what it gives),
# of $d$ numbers each (`head_dim`), in each of H heads. The output is weights times values, with
#
# $$ \text{weights} = \text{softmax}\!\left(\frac{q k^\top}{\sqrt{d}}\right), \qquad
# \text{weights}_{t,s} = 0 \text{ for } s > t $$
#
# That last part, *causal*, is what lets a model write. It is also what this whole project rests on:
# a token cannot know what comes behind it.
#
# ### Exercise 1.3: causal attention weights (5 minutes)


# %% exercise 1.3
def attention_weights(q, k):
    """q, k (B, H, T, head_dim) -> weights (B, H, T, T); row t sums to 1 and is 0 behind t."""
    T, head_dim = q.shape[-2:]
    scores = ...  # (B, H, T, T): every query with every key, over the square root of head_dim
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)  # True above the diagonal
    scores = ...  # minus infinity where future is True: tensor.masked_fill(mask, value)
    return scores.softmax(dim=-1)


# %% solution 1.3
def attention_weights(q, k):
    """q, k (B, H, T, head_dim) -> weights (B, H, T, T); row t sums to 1 and is 0 behind t."""
    T, head_dim = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / head_dim**0.5
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)  # True above the diagonal
    scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(dim=-1)


# %% check 1.3
checks.exercise_1_3(attention_weights)

# %% [markdown]
# The real module does the same, with one call of PyTorch for all of it. `rotate` tells q and k
# where they stand (more of it below), and `cache` is for generation. Around it stands the decoder
# layer: attention, then three linear layers, one of which is a gate, each part added to what came
# in. (Look at the lines from `q` to `k`, and at the call; `cache`, `mask` and `is_grouped` are for
# writing and for other models.)

# %%
print(inspect.getsource(llava_code.Attention.forward))
print(inspect.getsource(llava_code.DecoderLayer.forward))

# %% [markdown]
# ### Where does it look? (at home)
#
# You need not read the next cell, only its figure. PyTorch's fused attention never shows its
# weights. A trick: attention returns *weights times
# values*, so if the values are the identity matrix, it returns the weights. We put a listener in
# place of the function that every layer of the real model calls (`checks.replaced(owner, name,
# value)` does that inside of its `with`, and puts the old one back), and see what the last token of
# the question looks at in the picture.


# %% home
def watch_attention(ids, pixels):
    """-> a list, one a layer, of attention weights (B, H, T, T)."""
    seen = []
    attention = F.scaled_dot_product_attention

    def listener(q, k, v, is_causal=False, **options):
        if is_causal:  # the language model's; in the vision tower patches look both ways
            B, H, T, _ = q.shape
            identity = torch.eye(T).expand(B, H, -1, -1)  # the values, (B, H, T, T)
            seen.append(attention(q, k, identity, is_causal=True))
        return attention(q, k, v, is_causal=is_causal, **options)

    with checks.replaced(llava_code.F, "scaled_dot_product_attention", listener):
        model(ids, pixels)
    return seen


maps = watch_attention(input_ids, pixel_values)
is_image = input_ids[0] == layout.image_id
print("attention of one layer (B, H, T, T):", tuple(maps[0].shape))
on_image = {}
for index, weights in enumerate(maps):
    on_image[f"layer {index}"] = weights[0, :, -1, is_image].mean(0)  # (N,), over the heads
draw.attention_over(image, on_image)

# %% [markdown]
# Brighter means more attention, averaged over the heads; each map has its own scale. Which layers
# look at the objects? Where a later layer looks elsewhere, remember: by then the patches have
# talked to each other, and what a position holds is no longer only what was drawn there.

# %% [markdown]
# ## From hidden states to words
#
# The last norm's output is the **hidden state**, one vector of D numbers a token. The head
# multiplies it by a matrix of V rows: one score, a *logit*, for each word of the vocabulary. The
# softmax of the logits is the model's bet on the next word.

# %%
hidden = model(input_ids, pixel_values)
logits = model.logits(hidden)
print("hidden (B, T, D):", tuple(hidden.shape))
print("logits (B, T, V):", tuple(logits.shape))
probability = logits[0, -1].softmax(-1)  # behind the last token of the question
best = probability.topk(6)
words = [word_of(index) for index in best.indices.tolist()]
draw.bars(("the first word of the answer", words, best.values))

# %% [markdown]
# ### Exercise 1.4: write a caption, one word at a time (6 minutes)
#
# Greedy generation: run the model, take the likeliest next token, put it at the end, repeat. Stop
# at a stop token. No cache, so each step computes everything again.


# %% exercise 1.4
def answer(model, prompt, pixel_values, most=80):
    """prompt: a list of ids. Returns the list of new ids, without the stop token."""
    new = []
    for _ in range(most):
        hidden = model(torch.tensor([prompt + new]), pixel_values)  # (1, T, D)
        # The id with the largest logit behind the last position, an int: see .argmax().item()
        token = ...
        if token in model.config.eos_token_ids:
            break
        new.append(token)
    return new


# %% solution 1.4
def answer(model, prompt, pixel_values, most=80):
    """prompt: a list of ids. Returns the list of new ids, without the stop token."""
    new = []
    for _ in range(most):
        hidden = model(torch.tensor([prompt + new]), pixel_values)  # (1, T, D)
        token = model.logits(hidden[0, -1]).argmax().item()
        if token in model.config.eos_token_ids:
            break
        new.append(token)
    return new


# %% check 1.4
checks.exercise_1_4(answer, embedder, image)

# %% [markdown]
# The real `Llava.generate` gives the same words and is faster: it keeps keys and values of what it
# has seen (`KVCache`), so a step computes one token instead of all.


# %%
def describe(pixels):
    ids = model.generate([layout.question(question)] * len(pixels), pixels, max_new_tokens=80)
    return [tokenizer.decode(row) for row in ids]


said = describe(embedder.pixel_values(pictures[:3]))
draw.pictures(pictures[:3], said, columns=3, width=48, side=2.6)

# %% [markdown]
# The last two sentences of each are mostly invented, even if exercise 1.4 has its ✓: relations
# are what this base has not learned.
#
# ## Change the machine
#
# Reading is good, breaking is better. Each cell changes the real module for a moment, and puts it
# back.
#
# **Swap the features of two pictures.** The language model never sees pixels, so it should describe
# the other picture.

# %%
pixels_of_two = embedder.pixel_values(pictures[:2])
pair = model.image_features(pixels_of_two)  # (2, N, D)
print("image_features (B, N, D):", tuple(pair.shape))


def swapped(pixels):
    return pair.flip(0)


with checks.replaced(model, "image_features", swapped):
    said = describe(pixels_of_two)
draw.pictures(pictures[:2], said, columns=2, width=48, side=2.6)

# %% [markdown]
# **Take away positions** (at home). `rotary_embedding` tells attention where a token stands: it
# turns each pair of numbers in q and k by an angle that grows with the position. Angle 0 everywhere
# means: no order. Guess first: does the model still know the objects? Can it still count, and stop?


# %% home
def no_rotation(positions, head_dim, theta, dtype, scaling):
    B, T = positions.shape
    cos = torch.ones(B, 1, T, head_dim, dtype=dtype)  # cos 0
    sin = torch.zeros(B, 1, T, head_dim, dtype=dtype)  # sin 0
    return cos, sin


with checks.replaced(llava_code, "rotary_embedding", no_rotation):
    print("without positions:  ", describe(pixel_values)[0])
print("with them, as it is:", describe(pixel_values)[0])

# %% [markdown]
# **Take away the picture.** Zeros in place of the features: what does a model say that sees
# nothing? It makes something up, in perfect grammar. Remember this when a caption sounds
# convincing.


# %%
def nothing(pixels):
    return torch.zeros(len(pixels), N, text.hidden_size)


with checks.replaced(model, "image_features", nothing):
    print("blind:", describe(pixel_values)[0])

# %% [markdown]
# ## The property that the next notebooks use
#
# Causal attention again: states before a token do not change when the token changes. So a caption
# *behind* the picture and its prompt cannot change the state *at* the prompt. We append a whole
# caption and compare.

# %%
caption_ids = tokenizer.encode(items[0][1][0])
longer = model(torch.tensor([prompt + caption_ids]), pixel_values)
difference = (longer[:, : len(prompt)] - hidden).abs().max().item()
print("hidden (B, T, D):                  ", tuple(hidden.shape))
print("hidden with a caption behind it:   ", tuple(longer.shape))
print(f"largest difference on the common positions: {difference:.1e}")
print("(rounding: the sums have another length)")

# %% [markdown]
# ## What to take home
#
# * A picture becomes N vectors that take the places of N tokens. From there on there are only
#   tokens.
# * The hidden state at a token has seen this token and everything before it, nothing behind it.
# * The head turns a hidden state into a bet on the next word. In notebook 2 we drop the head,
#   and keep the hidden state as an **embedding**.
#
# If there is time: `print(inspect.getsource(llava_code.KVCache))`, and find the line that lets rows
# have different lengths.
