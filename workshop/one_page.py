"""VladVA on one page: a LLaVA, trained to write, learns to embed better, and can still write.

    python -m toy.world             draws a small world of pictures (once, some seconds)
    python workshop/one_page.py     trains for about a minute, prints what became better

It tells the paper (arXiv 2412.04378) and imports nothing of ours. Begin with `losses`, then go up;
docs/one-page.md leads from each block to where the project does the same at full strength.
Axes: B pictures or texts, T tokens, N image tokens, D hidden, H heads, V words, S side in pixels.
"""

import argparse
import io
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

TOY = Path(__file__).resolve().parents[1] / "toy"
# Asked for one word, the model packs all it saw into its last state: that is our embedding.
IMAGE_PROMPT = "\nSummarize the provided image in one word: ASSISTANT:"
TEXT_PROMPT = "\nSummarize the provided text in one word: ASSISTANT:"
DESCRIBE = "\nDescribe the image in detail. ASSISTANT:"


class Llava:  # what we start from: pictures become tokens, and a language model reads them
    def __init__(self, folder):
        self.frozen = load_file(folder / "model.safetensors")  # by name; none will ever change
        self.learned = {}  # by name (a soft prompt: by its text), what fine-tuning adds
        self.config = json.loads((folder / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        self.vocabulary = tokenizer["model"]["vocab"]  # from a word to its id
        self.pattern = re.compile("</?s>|" + tokenizer["pre_tokenizer"]["pattern"]["Regex"])

    def encode(self, text):
        words = self.pattern.findall(text.lower())
        return torch.tensor([self.vocabulary.get(word, 0) for word in words], dtype=torch.long)

    def embed(self, text):
        """Text -> (T, D), a row of the table for each word. A soft prompt has its own rows."""
        table = self.frozen["language_model.model.embed_tokens.weight"]  # (V, D)
        return self.learned.get(text, table[self.encode(text)])

    def linear(self, x, name):
        """W x + b; where there is LoRA, + B A x, a narrow path that learns (alpha = rank)."""
        y = F.linear(x, self.frozen[name + ".weight"], self.frozen.get(name + ".bias"))
        if name + ".A" in self.learned:
            y = y + x @ self.learned[name + ".A"].T @ self.learned[name + ".B"].T
        return y

    def norm(self, x, name):
        weight = self.frozen[name + ".weight"]
        if name + ".bias" in self.frozen:  # CLIP's norm also centres; LLaMA's only scales
            return F.layer_norm(x, weight.shape, weight, self.frozen[name + ".bias"])
        return F.rms_norm(x, weight.shape, weight, self.config["text_config"]["rms_norm_eps"])

    def attention(self, x, name, out, config, turn=None):
        """No turn: patches see all patches. With it: a token sees itself and those before it."""
        heads = config["num_attention_heads"]
        projected = [self.linear(x, f"{name}.{part}_proj") for part in "qkv"]
        q, k, v = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in projected]
        if turn is not None:  # RoPE: q and k turn with their position, as complex numbers
            q, k = [torch.complex(*each.chunk(2, dim=-1)) * turn for each in (q, k)]
            q, k = [torch.cat([each.real, each.imag], dim=-1) for each in (q, k)]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=turn is not None)  # (B, H, T, D / H)
        return self.linear(y.transpose(1, 2).flatten(2), f"{name}.{out}")  # (B, T, D)

    def see(self, pixels):
        """CLIP's tower and LLaVA's projector: pixels (B, 3, S, S) -> image tokens (B, N, D)."""
        config = self.config["vision_config"]
        tower = "vision_tower.vision_model."
        patch = self.frozen[tower + "embeddings.patch_embedding.weight"]
        x = F.conv2d(pixels, patch, stride=patch.shape[-1]).flatten(2).transpose(1, 2)  # (B, N, D)
        class_token = self.frozen[tower + "embeddings.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1)
        x = x + self.frozen[tower + "embeddings.position_embedding.weight"]
        x = self.norm(x, tower + "pre_layrnorm")
        for layer in range(self.config["vision_feature_layer"] % (config["num_hidden_layers"] + 1)):
            name = f"{tower}encoder.layers.{layer}."
            h = self.norm(x, name + "layer_norm1")
            x = x + self.attention(h, name + "self_attn", "out_proj", config)
            h = self.linear(self.norm(x, name + "layer_norm2"), name + "mlp.fc1")
            x = x + self.linear(h * torch.sigmoid(1.702 * h), name + "mlp.fc2")  # CLIP's own GELU
        h = self.linear(x[:, 1:], "multi_modal_projector.linear_1")  # without the class token
        return self.linear(F.gelu(h), "multi_modal_projector.linear_2")

    def read(self, rows):
        """LLaMA: embeddings, B times (t, D) -> states (B, T, D); each saw all in front of it."""
        x = pad_sequence(rows, batch_first=True)  # padding stands behind, where no word looks
        config = self.config["text_config"]
        slowness = config["rope_theta"] ** torch.arange(0, 1, 2 / config["head_dim"])
        turn = torch.exp(1j * (torch.arange(x.shape[1])[:, None] / slowness))  # (T, D / H / 2)
        for layer in range(config["num_hidden_layers"]):
            name = f"language_model.model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")
            x = x + self.attention(h, name + "self_attn", "o_proj", config, turn)
            h = self.norm(x, name + "post_attention_layernorm")
            gate = F.silu(self.linear(h, name + "mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(h, name + "mlp.up_proj"), name + "mlp.down_proj")
        return self.norm(x, "language_model.model.norm")

    def read_images(self, pixels, captions, prompt):
        """[image][prompt][caption] -> states (B, 1 + longest caption, D), from the prompt's end on.
        State 0 is the embedding: it saw image and prompt, not the caption. And it predicts word 0
        of the caption, as state i predicts word i. So one pass serves both losses (figure 1)."""
        rows = []
        for image, caption in zip(self.see(torch.stack(pixels)), captions):
            front = torch.cat([self.embed("<s> USER:"), image, self.embed(prompt)])
            rows.append(torch.cat([front, self.embed(caption)]))
        return self.read(rows)[:, len(front) - 1 :]  # `front` is as long in every row

    def read_texts(self, captions):
        """[caption][prompt] -> the state at the end of each: embeddings (B, D), same model."""
        prompt = self.embed(TEXT_PROMPT)
        rows = [torch.cat([self.embed("<s> USER: " + text), prompt]) for text in captions]
        return self.read(rows)[torch.arange(len(rows)), [len(row) - 1 for row in rows]]


def add_adapters(model, rank=16):
    """All that will learn. B is 0, soft prompts begin as words: the model is still what it was."""
    for name, weight in model.frozen.items():
        if re.search(r"language_model.*_proj\.weight", name):
            model.learned[name.replace("weight", "A")] = 0.05 * torch.randn(rank, weight.shape[1])
            model.learned[name.replace("weight", "B")] = torch.zeros(len(weight), rank)
    model.learned[IMAGE_PROMPT] = model.embed(IMAGE_PROMPT)
    model.learned[TEXT_PROMPT] = model.embed(TEXT_PROMPT)
    model.learned["log_scale"] = torch.tensor(1 / 0.07).log()  # of the similarities, as in CLIP
    for tensor in model.learned.values():
        tensor.requires_grad_()


def losses(model, pixels, short, long):
    """The method. Short captions are told apart (with long ones it is too easy), long written."""
    states = model.read_images(pixels, long, IMAGE_PROMPT)
    # Contrastive, equation 1: each image finds its text among all of the batch, and the reverse.
    images = F.normalize(states[:, 0], dim=-1)
    texts = F.normalize(model.read_texts(short), dim=-1)
    similarity = model.learned["log_scale"].exp() * images @ texts.T  # (B, B)
    own = torch.arange(len(images))
    contrastive = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    # Autoregressive, equation 2: each word of the caption, given the image and the words before.
    words = pad_sequence(list(map(model.encode, long)), batch_first=True, padding_value=-100)
    logits = model.linear(states[:, :-1], "language_model.lm_head")  # (B, T, V)
    return contrastive, F.cross_entropy(logits.transpose(1, 2), words)  # -100: padding


def read_record(folder, record, draw=0):
    """A line of the data -> pixels (3, S, S), a short caption of it, a long one with its end."""
    offset, size = record.get("part", (0, -1))  # a picture is a file, or a part of a large one
    with open(folder / record["image"], "rb") as file:
        file.seek(offset)
        picture = Image.open(io.BytesIO(file.read(size))).convert("RGB")
    pixels = torch.tensor(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    return pixels, record["short"][draw % len(record["short"])], record["long"][0] + " </s>"


@torch.no_grad()
def measure(model, pixels, captions):
    """How many captions find their image, and images their caption; what the model writes."""
    images = F.normalize(model.read_images(pixels, [""] * len(pixels), IMAGE_PROMPT)[:, 0], dim=-1)
    similarity = images @ F.normalize(model.read_texts(captions), dim=-1).T  # (B, B)
    own = torch.arange(len(images))
    found, named = [(similarity.argmax(dim) == own).float().mean() for dim in (0, 1)]
    text = ""
    while not text.endswith("</s>") and len(text) < 500:
        states = model.read_images(pixels[:1], [text], DESCRIBE)  # never trained on
        logits = model.linear(states[0, -1], "language_model.lm_head")
        text += " " + list(model.vocabulary)[logits.argmax()]
    return f"text to image {found:.1%}, image to text {named:.1%}\n      {text}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=TOY / "data", help="what toy.world drew")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)
    train = [json.loads(line) for line in (args.data / "train.jsonl").open()]
    test = [json.loads(line) for line in (args.data / "test.jsonl").open()]
    model = Llava(TOY / "tiny-llava")
    pixels, short, _ = zip(*[read_record(args.data, record) for record in test[:500]])
    print("before", measure(model, pixels, short))
    add_adapters(model)
    optimizer = torch.optim.AdamW(model.learned.values(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)  # as in the paper
    for step in range(args.steps):
        batch = [read_record(args.data, train[i], step) for i in torch.randperm(len(train))[:48]]
        contrastive, autoregressive = losses(model, *zip(*batch))
        (contrastive + autoregressive).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step} contrastive {contrastive:.3f} autoregressive {autoregressive:.3f}")
    print("after ", measure(model, pixels, short))
