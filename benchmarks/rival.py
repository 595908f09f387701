"""The practical rival: sentence-transformers on the same LLaVA, the same pairs, the same loss.

    pip install sentence-transformers peft
    python -m benchmarks.rival                a quarter of an hour on two idle CPU cores

It loads a LLaVA folder as it is, with the small files beside it that `examples.export` writes. LoRA
comes from peft; its multiple-negatives loss is the contrastive loss, and there is one with a
gradient cache as well. It has no loss of captions, no soft prompts and no learnable temperature, so
all of that is off here: what is compared is contrast alone, which both compute alike (the first
step's loss and gradients are compared). Both begin with pictures in memory and captions as text.

Three things are measured: encoding, a step, and recall on validation scenes after the same time.

Axes: B pairs, D hidden.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import data
import eval
import lora
import train
from benchmarks.measure import DEVICE, device_name, paired_ratio, peak_memory
from benchmarks.step import TARGETS, largest_difference
from data import Sample
from examples.export import write_sentence_transformers
from toy import world

Pair = tuple[Image.Image, str]  # a picture and a short caption
# Contrast alone, LoRA alone: all that both have. A temperature that does not move.
SETTINGS = train.TrainConfig(
    autoregressive_weight=0.0, soft_prompts=False, temperature_lr=0.0, gradient_cache=True
)


# ---- The two


class Ours:
    def __init__(self, config: train.TrainConfig):
        self.config = config
        self.embedder = eval.load_base(config.model, DEVICE)
        train.add_adapters(self.embedder, config)
        self.model = self.embedder.model.train()
        self.optimizer = train.make_optimizer(self.model, config)

    def backward(self, pairs: list[Pair]) -> float:
        """Loss and gradients of a batch."""
        samples = []
        for picture, caption in pairs:
            samples.append(Sample(self.embedder.processor(picture), caption, None))
        batch = data.collate(samples, self.embedder.layout, self.config.micro_batch)
        return train.training_step(self.model, batch, self.config)["contrastive"]

    def step(self, pairs: list[Pair], number: int) -> None:
        self.backward(pairs)
        train.update(self.model, self.optimizer, number, self.config)

    def parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's, by name."""
        named = lora.trainable_parameters(self.model)
        return {name: parameter for name, parameter in named.items() if ".lora_" in name}

    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        self.model.eval()
        return eval.encode_image(self.embedder, pictures, batch_size=64)

    def texts(self, captions: list[str]) -> torch.Tensor:
        self.model.eval()
        return eval.encode_text(self.embedder, captions, batch_size=256)


class Theirs:
    def __init__(self, config: train.TrainConfig, folder: Path, like: Ours):
        import peft
        from sentence_transformers import SentenceTransformer, losses

        self.config = config
        self.model = SentenceTransformer(str(folder), device=str(DEVICE))
        # What their `add_adapter` does. (That of transformers 5.24 asks for a peft of tomorrow.)
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=TARGETS
            ),
            self.model[0].auto_model,
        )
        with torch.no_grad():
            start = like.parameters()
            for name, parameter in self.parameters().items():
                parameter.copy_(start[name])
        # Both directions, each a softmax of its own: equation 1 of the paper.
        settings = {
            "scale": 1 / config.temperature,
            "directions": ("query_to_doc", "doc_to_query"),
            "partition_mode": "per_direction",
        }
        if config.gradient_cache:
            self.loss = losses.CachedMultipleNegativesRankingLoss(
                self.model, mini_batch_size=config.micro_batch, **settings
            )
        else:
            self.loss = losses.MultipleNegativesRankingLoss(self.model, **settings)
        self.optimizer = torch.optim.AdamW(
            self.parameters().values(), betas=(0.9, 0.98), weight_decay=0.0
        )
        self.model.train()

    def backward(self, pairs: list[Pair]) -> float:
        """What their trainer does with a batch: its collator, its loss."""
        columns = [[picture for picture, _ in pairs], [caption for _, caption in pairs]]
        features = []
        for column in columns:
            of_column = self.model.preprocess(column)
            for key, value in of_column.items():
                if torch.is_tensor(value):
                    of_column[key] = value.to(DEVICE)
            features.append(of_column)
        loss = self.loss(features, None)
        loss.backward()
        return loss.item()

    def step(self, pairs: list[Pair], number: int) -> None:
        self.backward(pairs)
        factor = train.learning_rate_factor(number, self.config)
        self.optimizer.param_groups[0]["lr"] = factor * self.config.lr
        nn.utils.clip_grad_norm_(self.parameters().values(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, under our names."""
        named = {}
        for name, parameter in self.model[0].auto_model.named_parameters():
            if parameter.requires_grad:
                named[name.replace(".default", "")] = parameter
        return named

    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        return self.model.encode(pictures, batch_size=64, convert_to_tensor=True).cpu()

    def texts(self, captions: list[str]) -> torch.Tensor:
        return self.model.encode(captions, batch_size=256, convert_to_tensor=True).cpu()


def write_rival_folder(folder: Path) -> None:
    """The toy's LLaVA with the files that sentence-transformers reads: our prompts, in words."""
    shutil.copytree(eval.TOY_MODEL, folder)
    embedder = eval.load_base(folder)
    template = embedder.layout.template
    image_prompt, text_prompt = embedder.layout.prompt_texts
    prompts = {
        "image": f"{template.first_turn}{template.behind_image}{image_prompt}{template.assistant}",
        "text": f"{template.begin}{template.user}{{text}}\n{text_prompt}{template.assistant}",
    }
    # (Of a JSON file, where \n is two characters; jinja reads it so as well.)
    write_sentence_transformers(folder, prompts, embedder.model.config.text.hidden_size)


# ---- The pairs


def make_pairs(
    embedder: eval.Embedder, path: Path, batch_size: int, steps: int
) -> list[list[Pair]]:
    """Batches of training pictures as they are, each with one of its short captions."""
    dataset = data.CaptionDataset(path, embedder.layout, processor=lambda picture: picture)
    sampler = data.ResumableSampler(dataset.units, batch_size, steps)
    batches = []
    for keys in sampler:
        samples = [dataset[key] for key in keys]
        batches.append([(sample.pixel_values, sample.short) for sample in samples])
    return batches


def validation_pairs(scenes: int) -> list[tuple[Image.Image, list[str]]]:
    items, _ = eval.read_test(
        "retrieval", train.TOY / "val" / "karpathy.json", train.TOY / "images", "val"
    )
    return [(data.open_image(path), captions) for path, captions in items[:scenes]]


# ---- What is measured


def first_step_differs_by(ours: Ours, theirs: Theirs, pairs: list[Pair]) -> float:
    """The largest relative difference of the loss and of the gradient of any LoRA tensor."""
    losses = []
    gradients = []
    for one in (ours, theirs):
        losses.append(one.backward(pairs))
        # A's gradient is zero as long as B is.
        found = {}
        for name, parameter in one.parameters().items():
            if ".lora_B." in name:
                found[name] = parameter.grad.clone()
        gradients.append(found)
        one.optimizer.zero_grad()
    return max(abs(losses[1] / losses[0] - 1), largest_difference(*gradients))


def recalls(one: Ours | Theirs, items: list) -> dict[str, float]:
    captions = []
    image_of_text = []
    for number, (_, its_captions) in enumerate(items):
        captions += its_captions
        image_of_text += [number] * len(its_captions)
    images = one.images([picture for picture, _ in items])
    scores = one.texts(captions) @ images.T
    return eval.recall_at_k(scores, torch.tensor(image_of_text), ks=(1,))


def spread(times: dict[str, float]) -> str:
    return f"{times['ratio']:.2f} ({times['low']:.2f} - {times['high']:.2f})"


def compare_encoding(ours: Ours, theirs: Theirs, items: list, rounds: int) -> None:
    """Pictures and captions to embeddings, both sides with the same batches of 64 and 256."""
    pictures = [picture for picture, _ in items]
    captions = [caption for _, its_captions in items for caption in its_captions]
    tasks = [
        (f"encoding {len(pictures)} pictures", ours.images, theirs.images, pictures),
        (f"encoding {len(captions)} captions", ours.texts, theirs.texts, captions),
    ]
    for name, our_encode, their_encode, inputs in tasks:
        difference = (our_encode(inputs) - their_encode(inputs)).abs().max()
        times = paired_ratio(partial(our_encode, inputs), partial(their_encode, inputs), rounds)
        speed = len(inputs) / times["seconds_of_first"]
        print(f"| {name} | {spread(times)} | ours {speed:.0f}/s; differ by {difference:.0e} | |")


def compare_steps(name: str, ours: Ours, theirs: Theirs, pairs: list[Pair], rounds: int) -> float:
    """Their time over ours for one step, of which the models learn a little."""
    ours.model.train()
    theirs.model.train()
    our_step = partial(ours.step, pairs, 0)
    their_step = partial(theirs.step, pairs, 0)
    times = paired_ratio(our_step, their_step, rounds)
    speed = len(pairs) / times["seconds_of_first"]
    peaks = f"{peak_memory(our_step) / 1e6:.0f} MB, theirs {peak_memory(their_step) / 1e6:.0f} MB"
    print(f"| {name} | {spread(times)} | ours {speed:.0f} pairs/s | ours {peaks} |", flush=True)
    return times["ratio"]


def train_for(one: Ours | Theirs, batches: list[list[Pair]]) -> None:
    one.model.train()
    for number, pairs in enumerate(batches):
        one.step(pairs, number)


def compare(batch_size: int, steps: int, rounds: int, scenes: int, folder: Path) -> None:
    config = replace(SETTINGS, batch_size=batch_size, steps=steps)
    at_once = replace(config, gradient_cache=False)
    write_rival_folder(folder)
    ours = Ours(config)
    theirs = Theirs(config, folder, ours)
    world.build(train.TOY)
    batches = make_pairs(ours.embedder, train.TOY / "train.jsonl", batch_size, steps)
    items = validation_pairs(scenes)
    difference = first_step_differs_by(ours, theirs, batches[0])
    print(f"the first step's loss and gradients differ by {difference:.0e}")

    print("| | their time / ours | speed | peak |")
    print("|---|---|---|---|")
    base = recalls(ours, items)
    compare_encoding(ours, theirs, items, rounds)
    compare_steps("a step, with the gradient cache", ours, theirs, batches[0], rounds)
    ours = Ours(at_once)
    theirs = Theirs(at_once, folder, ours)
    slower = compare_steps("a step, without it", ours, theirs, batches[0], rounds)

    # In the time of our steps they get so many done. Each has a schedule of its own length.
    fewer = round(steps / slower)
    print(f"| contrast alone, {scenes} validation scenes | steps | T2I@1 | I2T@1 |")
    print("|---|---|---|---|")
    print(f"| untrained | 0 | {base['t2i_r1']:.1f} | {base['i2t_r1']:.1f} |")
    ours = Ours(at_once)
    theirs = Theirs(replace(at_once, steps=fewer), folder, ours)
    for name, one, number in (("ours", ours, steps), ("sentence-transformers", theirs, fewer)):
        train_for(one, batches[:number])
        found = recalls(one, items)
        row = f"| {name} | {number} | {found['t2i_r1']:.1f} | {found['i2t_r1']:.1f} |"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128, help="pairs in a batch (128)")
    parser.add_argument("--steps", type=int, default=100, help="ours; theirs by the clock (100)")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of timed steps (9)")
    parser.add_argument("--scenes", type=int, default=1000, help="validation pictures (1000)")
    args = parser.parse_args()
    try:
        import peft
        import sentence_transformers
    except ImportError as missing:
        print(f"skipped: {missing.name} is not here; pip install sentence-transformers peft")
        return
    versions = f"sentence-transformers {sentence_transformers.__version__}, peft {peft.__version__}"
    print(f"{device_name()}, torch {torch.__version__}, {versions}, {args.batch} pairs a batch")
    with tempfile.TemporaryDirectory() as folder:
        compare(args.batch, args.steps, args.pairs, args.scenes, Path(folder) / "rival")


if __name__ == "__main__":
    sys.exit(main())
