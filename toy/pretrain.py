"""Makes toy/tiny-llava from nothing: a small LLaVA that has learned to look, read and answer.

    python -m toy.pretrain                                      9 minutes on two idle CPU cores
    python -m toy.pretrain --plain --out toy/tiny-llava-plain   the same without binding words

Purely generative, as real LVLMs are trained: captions, questions about pictures and about texts,
one-word summaries. No two examples are ever compared: whatever the embeddings can do afterwards
comes from generation.

The language has compound nouns, as German has: "red-ring" (a color and its shape), "large-red",
"large-ring", and "left-red", "top-ring" (on which side of another object). They are answers to
"Summarize the provided image in one word:" that are right of a picture with a red ring and a blue
star, and wrong of one with a red star and a blue ring. Every true word is a right answer, so the
target is their distribution. Without them (--plain) a summary is a bag of words, and so is every
embedding made from it.

Each scene is made up on the spot, from the "train" split of the toy world: the model hardly sees
one twice.

Axes: B rows of a batch, T tokens, D hidden, V vocabulary.
"""

import argparse
import dataclasses
import json
import math
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

from model import Llava, LlavaConfig, TextConfig, VisionConfig
from toy import world
from toy.world import OPPOSITE, PLACES, RELATIONS, Caption, Scene, Thing, holds, name

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
UNKNOWN, START, STOP, IMAGE, PAD = range(5)  # their ids
IGNORE = -100  # no prediction is asked for at this position
SUMMARIZE_IMAGE = "\nSummarize the provided image in one word: ASSISTANT:"
SUMMARIZE_TEXT = "\nSummarize the provided text in one word: ASSISTANT:"
DESCRIBE = "\nDescribe the image in detail. ASSISTANT:"
# Real data ask for captions in many ways. A model that knows one of them only has to learn to
# caption behind the summary prompt, and pays with what it says behind the one that it knew.
DESCRIBE_WORDINGS = [
    DESCRIBE,
    "\nSummarize the provided image in detail: ASSISTANT:",
    "\nDescribe the provided image: ASSISTANT:",
]
SIDES = {  # on which side of the other the first and the second thing of a relation are
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
TOKEN = r"user:|assistant:|[a-z]+(?:-[a-z]+)*|[^\sa-z]"
OTHER_WORDS = """user: assistant: summarize the provided image text in one word : describe detail .
briefly ? , an a is are there of picture shows with and on background objects object what color
size shape where how many nothing unknown yes no left right top bottom above below"""

# The paper's base is no finished one. Here the rate falls as if 1,600 steps were to come, after
# which little would be left to learn.
STEPS = 1000
SCHEDULE = 1600
SCENES_A_STEP = 16
MUON_RATE = 4e-3
ADAMW_RATE = 1.8e-3
# Of the summaries' loss against the answers'; at 0.2 summaries of texts stay bags of words, and the
# more it is, the earlier they learn who owns what.
SUMMARY_WEIGHT = 2.0
LOG_EVERY = 50  # steps

VISION = VisionConfig(
    hidden_size=160,
    intermediate_size=640,
    num_hidden_layers=5,  # the fifth is never read
    num_attention_heads=5,
    image_size=world.IMAGE_SIZE,
    patch_size=12,  # so a picture is 16 image tokens
)
TEXT = TextConfig(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
)
MODEL = LlavaConfig(VISION, TEXT, image_token_id=IMAGE, pad_token_id=PAD, eos_token_ids=(STOP,))


# ---- language


def binding_words() -> list[str]:
    """Every compound noun that can be true of a scene."""
    words = []
    for color in world.COLORS:
        for shape in world.SHAPES:
            words.append(f"{color}-{shape}")
    for what in [*world.SIZES, "left", "right", "top", "bottom"]:
        for quality in [*world.COLORS, *world.SHAPES]:
            words.append(f"{what}-{quality}")
    return words


def make_tokenizer() -> Tokenizer:
    """One token a word: lower case, "USER:" and "ASSISTANT:" and compound nouns in one piece, `<s>`
    in front."""
    words = [*SPECIAL, *OTHER_WORDS.split()]
    words += [*world.SIZES, *world.COLORS, *world.SHAPES, *world.BACKGROUNDS]
    words += [*world.NUMBERS.values(), *binding_words()]
    vocabulary = {}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))  # some are in more than one of the lists
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", START)]
    )
    # It joins words by spaces, with none before punctuation.
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def summary_words(
    things: list[Thing], sides: list[set[str]], background: str | None, plain: bool
) -> dict[str, float]:
    """The words that may stand for a picture or a text, with their weights.

    `sides[i]`: on which sides of another thing the i-th is known to be ("left", "top", ...)."""
    words = defaultdict(float)  # what is true of two things weighs twice
    if background:
        words[background] += 0.4
    for (size, color, shape), known in zip(things, sides):
        qualities = [shape] if color is None else [color, shape]
        for quality in qualities:
            words[quality] += 1.0 if plain else 0.15
        if plain:
            if size:
                words[size] += 0.4
            continue
        if color:
            words[f"{color}-{shape}"] += 1.0
        for what in [size, *sorted(known)]:
            if what:
                for quality in qualities:
                    words[f"{what}-{quality}"] += 0.4
    return words


def summarize_scene(scene: Scene, plain: bool) -> dict[str, float]:
    places = scene.occupied()
    things = [scene.objects[place] for place in places]
    sides = []
    for place in places:
        known = set()
        for relation in RELATIONS:
            if any(holds(relation, place, other) for other in places):
                known.add(SIDES[relation][0])
        sides.append(known)
    return summary_words(things, sides, scene.background, plain)


def summarize_caption(caption: Caption, plain: bool) -> dict[str, float]:
    sides = [set(), set(), set()]
    if caption.relation:
        first, second = SIDES[caption.relation]
        sides = [{first}, {second}, set()]
    return summary_words(caption.things, sides, caption.background, plain)


# ---- lessons


class Dialogue:
    """A conversation in LLaVA-1.5's template: token ids, and at each position the id that should
    come next."""

    def __init__(self, tokenizer: Tokenizer, scene_index: int | None = None):
        """scene_index: which picture of the batch it is about; None: it is about a text."""
        self.tokenizer = tokenizer
        self.scene_index = scene_index
        self.ids = [START]
        self.targets = [IGNORE]
        self.summary: tuple[int, dict[int, float]] | None = None  # position, {id: probability}
        self.user("USER: ")
        if scene_index is not None:
            self.append([IMAGE] * MODEL.num_image_tokens)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def append(self, ids: list[int]) -> None:
        self.ids += ids
        self.targets += [IGNORE] * len(ids)

    def user(self, text: str) -> None:
        self.append(self.encode(text))

    def assistant(self, text: str) -> None:
        answer = [*self.encode(text), STOP]
        self.ids += answer
        self.targets[-1:] = [*answer, IGNORE]  # the last position so far predicts its first token

    def summarize(self, words: dict[str, float], rng: random.Random) -> None:
        """Ask for the distribution of true words at the last position; the dialogue goes on with
        one of them."""
        total = sum(words.values())
        ids = {self.tokenizer.token_to_id(word): weight / total for word, weight in words.items()}
        self.summary = (len(self.ids) - 1, ids)
        said = rng.choices(list(ids), list(ids.values()))
        self.append([*said, STOP])


def yes_or_no(statement: bool) -> str:
    return "yes" if statement else "no"


def ask_about_scene(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about a picture and its answer."""
    kind = rng.randrange(8)
    place = rng.choice(scene.occupied())
    thing = scene.objects[place]
    if kind == 0:
        return "How many objects are there?", world.NUMBERS[len(scene.occupied())]
    if kind == 1:
        return "What color is the background?", scene.background
    if kind == 2:
        place = rng.randrange(4)
        thing = scene.objects[place]
        answer = world.with_article(thing) if thing else "nothing"
        return f"What is in the {PLACES[place]}?", answer
    if kind == 3:
        return f"Where is the {thing.color} {thing.shape}?", PLACES[place]
    if kind == 4:
        quality = rng.choice(list(world.ATTRIBUTES))
        return f"What {quality} is the object in the {PLACES[place]}?", getattr(thing, quality)
    if kind == 5:
        other = rng.choice([each for each in scene.occupied() if each != place])
        # Of those that hold, or hold the other way round.
        asked = [r for r in RELATIONS if holds(r, place, other) or holds(r, other, place)]
        relation = rng.choice(asked)
        second = scene.objects[other]
        answer = yes_or_no(holds(relation, place, other))
        return (
            f"Is the {thing.color} {thing.shape} {relation} the {second.color} {second.shape}?",
            answer,
        )
    return "Describe the image briefly.", str(world.sample_caption(scene, rng))


def ask_about_caption(caption: Caption, rng: random.Random) -> tuple[str, str]:
    """A question about a text; most cannot be answered from its words alone, without their
    order."""
    things = caption.things
    relation = caption.relation
    if relation and rng.random() < 0.4:
        asked = rng.choice([relation, OPPOSITE[relation]])
        question = f"Is the {name(things[0])} {asked} the {name(things[1])}?"
        return question, yes_or_no(asked == relation)
    if len(things) > 1 and things[0].color and things[1].color and rng.random() < 0.5:
        thing = things[0]._replace(color=rng.choice(things[:2]).color)
        is_there = any(thing[1:] == other[1:] for other in things)
        return f"Is there {world.with_article(thing._replace(size=None))}?", yes_or_no(is_there)
    thing = rng.choice(things)
    quality = rng.choice(["color", "size"])
    answers = {getattr(other, quality) for other in things if other.shape == thing.shape}
    answer = answers.pop() if len(answers) == 1 else None  # two rings of two colors: which one?
    return f"What {quality} is the {thing.shape}?", answer or "unknown"


def make_dialogues(
    scene: Scene, index: int, rng: random.Random, tokenizer: Tokenizer, plain: bool
) -> list[Dialogue]:
    """Four dialogues about a scene: describe it; summarize it, then answer questions; and twice the
    same on a text."""
    describe = Dialogue(tokenizer, index)
    describe.user(rng.choice(DESCRIBE_WORDINGS))
    describe.assistant(world.long_caption(scene, rng))
    look = Dialogue(tokenizer, index)
    look.user(SUMMARIZE_IMAGE)
    look.summarize(summarize_scene(scene, plain), rng)
    for _ in range(3):
        question, answer = ask_about_scene(scene, rng)
        look.user(f"USER: {question} ASSISTANT:")
        look.assistant(answer)
    dialogues = [describe, look]
    for _ in range(2):
        caption = world.sample_caption(scene, rng)
        read = Dialogue(tokenizer)
        read.user(f"{caption}{SUMMARIZE_TEXT}")
        read.summarize(summarize_caption(caption, plain), rng)
        question, answer = ask_about_caption(caption, rng)
        read.user(f"USER: {question} ASSISTANT:")
        read.assistant(answer)
        dialogues.append(read)
    return dialogues


# ---- training


def initialize(model: Llava) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.04)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)


def to_pixels(pictures: list) -> torch.Tensor:
    """(48, 48, 3) uint8 arrays -> (B, 3, 48, 48), normalised as preprocessor_config.json says."""
    pixels = torch.stack([torch.from_numpy(picture) for picture in pictures])
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def losses(
    model: Llava, pixels: torch.Tensor, dialogues: list[Dialogue]
) -> tuple[torch.Tensor, ...]:
    """Cross-entropy of the answers; of the summaries, against their distribution; and the share of
    answer tokens that are right."""
    device = model.device
    features = model.image_features(pixels.to(device))
    answers = []  # states that predict a token of an answer, and these tokens
    targets = []
    summaries = []  # states that predict a summary, and the distribution of the true words
    distributions = []
    by_length = sorted(dialogues, key=lambda dialogue: len(dialogue.ids))
    # Four groups of like length: little padding.
    for start in range(0, len(by_length), len(pixels)):
        group = by_length[start : start + len(pixels)]
        scenes = [dialogue.scene_index for dialogue in group if dialogue.scene_index is not None]
        ids = pad([dialogue.ids for dialogue in group], PAD).to(device)
        hidden = model(ids, image_features=features[scenes] if scenes else None)  # (B, T, D)
        target = pad([dialogue.targets for dialogue in group], IGNORE).to(device)
        answers.append(hidden[target != IGNORE])
        targets.append(target[target != IGNORE])
        for row, dialogue in enumerate(group):
            if dialogue.summary:
                position, words = dialogue.summary
                summaries.append(hidden[row, position])
                distributions.append(words)
    logits = model.logits(torch.cat(answers))  # (answer tokens, V)
    targets = torch.cat(targets)
    answer_loss = F.cross_entropy(logits, targets)
    right = (logits.argmax(dim=-1) == targets).float().mean()
    logp = model.logits(torch.stack(summaries)).log_softmax(dim=-1)  # (summaries, V)
    wanted = torch.zeros_like(logp)
    for row, words in enumerate(distributions):
        wanted[row, list(words)] = torch.tensor(list(words.values()), device=device)
    summary_loss = F.kl_div(logp, wanted, reduction="batchmean")
    return answer_loss, summary_loss, right


def decay(step: int) -> float:
    """What the rates are multiplied by: 100 steps of warm-up, then a cosine down to 3 %."""
    return min(1, (step + 1) / 100) * (0.515 + 0.485 * math.cos(math.pi * step / SCHEDULE))


def make_optimizers(model: Llava) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for the rest: embeddings, patches, the head, vectors.

    Muon (kellerjordan.github.io/posts/muon) learns to tell shapes apart far sooner than AdamW
    alone: toy/README.md."""
    matrices = []
    others = []
    for where, parameter in model.named_parameters():
        is_of_a_layer = "layers" in where or "projector" in where
        if parameter.ndim == 2 and is_of_a_layer:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train(model: Llava, tokenizer: Tokenizer, steps: int, seed: int, plain: bool) -> list[dict]:
    """The loop -> its log, a line of means every LOG_EVERY steps."""
    rng = random.Random(f"pretrain {seed}")
    optimizers = make_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, decay) for optimizer in optimizers]
    log = []
    sums = torch.zeros(3)  # of the answers' loss, the summaries' loss, and of answer tokens right
    started = time.time()
    progress = tqdm(range(1, steps + 1), desc="pre-training", unit="step")
    for step in progress:
        scenes = [world.sample_scene(rng, "train") for _ in range(SCENES_A_STEP)]
        pixels = to_pixels([world.render(scene, rng) for scene in scenes])
        dialogues = []
        for index, scene in enumerate(scenes):
            dialogues += make_dialogues(scene, index, rng, tokenizer, plain)

        answer_loss, summary_loss, right = losses(model, pixels, dialogues)
        model.zero_grad()
        (answer_loss + SUMMARY_WEIGHT * summary_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()

        sums += torch.stack([answer_loss.detach(), summary_loss.detach(), right]).cpu()
        if step % LOG_EVERY == 0 or step == steps:
            number = step % LOG_EVERY or LOG_EVERY  # of steps since the last line
            answers, summaries, accuracy = [round(each, 4) for each in (sums / number).tolist()]
            line = {
                "step": step,
                "minutes": round((time.time() - started) / 60, 2),
                "answer_loss": answers,
                "summary_loss": summaries,
                "answer_accuracy": accuracy,
            }
            log.append(line)
            progress.set_postfix(answers=answers, summaries=summaries, right=accuracy)
            sums.zero_()
    return log


# ---- evaluation


@torch.no_grad()
def embed(
    model: Llava, dialogues: list[Dialogue], features: torch.Tensor | None = None
) -> torch.Tensor:
    """The normalised hidden state at the last position of each dialogue, (B, D)."""
    ids = pad([dialogue.ids for dialogue in dialogues], PAD).to(model.device)
    last = torch.tensor([len(dialogue.ids) - 1 for dialogue in dialogues])
    hidden = model(ids, image_features=features)  # (B, T, D)
    return F.normalize(hidden[torch.arange(len(last)), last], dim=-1)


def embed_captions(model: Llava, tokenizer: Tokenizer, captions: list[Caption]) -> torch.Tensor:
    """(B, D), unit length: the states before the one-word summaries of texts."""
    dialogues = []
    for caption in captions:
        dialogue = Dialogue(tokenizer)
        dialogue.user(f"{caption}{SUMMARIZE_TEXT}")
        dialogues.append(dialogue)
    return embed(model, dialogues)


@torch.no_grad()
def evaluate(model: Llava, tokenizer: Tokenizer, number: int = 500) -> dict[str, float]:
    """What the base can do without any fine-tuning, on validation scenes; in percent, except the
    two distances."""
    rng = random.Random("pretrain evaluation")
    scenes = [world.sample_scene(rng, "val") for _ in range(number)]
    pixels = to_pixels([world.render(scene, rng) for scene in scenes]).to(model.device)

    # Does it describe?
    describe = Dialogue(tokenizer, 0)
    describe.user(DESCRIBE)
    answers = model.generate([describe.ids] * 200, pixels[:200], max_new_tokens=110)
    references = [[world.long_caption(scene, rng)] for scene in scenes[:200]]
    scores = world.score_captions(tokenizer.decode_batch(answers), references)

    # Does it find, by the states before its summaries?
    captions = [world.sample_caption(scene, rng, number=rng.choice([2, 2, 3])) for scene in scenes]
    look = Dialogue(tokenizer, 0)
    look.user(SUMMARIZE_IMAGE)
    images = embed(model, [look] * number, model.image_features(pixels))
    texts = embed_captions(model, tokenizer, captions)
    similarity = (images @ texts.T).cpu()
    own = torch.arange(number)
    scores["i2t_r1"] = 100 * (similarity.argmax(dim=1) == own).float().mean().item()
    scores["t2i_r1"] = 100 * (similarity.argmax(dim=0) == own).float().mean().item()

    # Does it prefer a true caption to a false one of nearly the same words?
    for kind in ("swap_obj", "swap_att", "replace_obj", "replace_rel"):
        index = []
        negatives = []
        for i in range(number):
            negative = world.sample_negatives(captions[i], scenes[i], rng).get(kind)
            if negative:
                index.append(i)
                negatives.append(negative)
        false = embed_captions(model, tokenizer, negatives)
        difference = texts[index] - false
        wins = (images[index] * difference).sum(dim=-1) > 0
        scores[kind] = 100 * wins.float().mean().item()
        if kind.startswith("swap"):
            scores[f"{kind}_distance"] = difference.norm(dim=-1).mean().item()
    return {key: round(value, 3) for key, value in scores.items()}


# ---- files


def save(
    model: Llava, tokenizer: Tokenizer, folder: Path, log: list[dict], scores: dict[str, float]
) -> None:
    """Write a Hugging Face LLaVA folder beside `folder`, then put it in its place."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    side = world.IMAGE_SIZE
    files = {
        "tokenizer_config.json": {
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "extra_special_tokens": {"image_token": "<image>"},
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "rescale_factor": 1 / 255,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 3,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": VISION.patch_size,
            "num_additional_image_tokens": 1,  # the class token
            "image_token": "<image>",
            "vision_feature_select_strategy": "default",
        },
        "pretraining.json": {"scores": scores, "log": log},
    }
    for file, content in files.items():
        (unfinished / file).write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-trains TinyLLaVA on the toy world.")
    parser.add_argument(
        "--out", type=Path, default=Path("toy/tiny-llava"), help="folder of the checkpoint"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="optimizer steps; fewer for a trial"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the scenes")
    parser.add_argument(
        "--plain", action="store_true", help="summaries without binding words (an ablation)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    text = dataclasses.replace(MODEL.text, vocab_size=tokenizer.get_vocab_size())
    model = Llava(dataclasses.replace(MODEL, text=text))
    initialize(model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"TinyLLaVA: {sum(p.numel() for p in model.parameters()):,} parameters on {model.device}")
    log = train(model, tokenizer, arguments.steps, arguments.seed, arguments.plain)
    scores = evaluate(model.eval(), tokenizer)
    save(model.cpu(), tokenizer, arguments.out, log, scores)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
