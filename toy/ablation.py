"""The paper's table 4 and more, on the toy world: which part brings what, over three seeds.

    python -m toy.ablation          every row and seed that toy/ablation.json lacks, then tables
    python -m toy.ablation --rows "both + AR" "CLIP from scratch" --seeds 0 --split val

All rows see the same scenes for the same number of steps, in the order that the seed gives; the
CLIP trained from scratch gets the seconds that the same seed's "both + AR" took. Results are
written after each run, so an interrupted ablation goes on where it stopped. Choices were made on
the validation split; the tables are of the test split.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import CaptionDataset, ResumableSampler, open_image
from eval import METRICS, Embedder, Embeddings, evaluate, load_base, read_test, table_columns
from formats.files import read_json
from losses import contrastive_loss
from model import LanguageModel, VisionTower
from runtime.embeddings import KeptEmbeddings
from toy import world
from train import TrainConfig, add_adapters, make_optimizer, train, update

HERE = Path(__file__).parent
RESULTS = HERE / "ablation.json"
NO_AR = {"autoregressive_weight": 0.0}
ROWS = {  # what differs from the default settings
    "no training": {"steps": 0},
    "soft prompts": NO_AR | {"lora_rank": 0},
    "LoRA (VLM2Vec's recipe)": NO_AR | {"soft_prompts": False},
    "both": NO_AR,
    "both + AR": {},
    "AR only": {"contrastive_weight": 0.0},
    "long captions contrasted": NO_AR | {"contrast": "long"},
    "text only (E5-V's recipe)": {"soft_prompts": False},
    "CLIP from scratch": {},
    # Hard negatives, beyond the paper: a scene and its twin, of the same words, in one batch.
    "both, twins": NO_AR | {"groups": True},
    "both + AR, twins": {"groups": True},
}
# What the paper says goes up: (from, to, columns).
ORDERINGS = [
    (
        "no training",
        "both + AR",
        ("T2I@1", "I2T@1", "replace", "swap", "add", "wino text", "wino group", "described"),
    ),
    ("no training", "soft prompts", ("T2I@1", "I2T@1", "replace", "swap", "add")),
    ("soft prompts", "LoRA (VLM2Vec's recipe)", ("T2I@1", "replace", "swap")),
    ("LoRA (VLM2Vec's recipe)", "both", ("T2I@1", "I2T@1", "replace", "swap")),
    (
        "both",
        "both + AR",
        ("T2I@1", "replace", "swap", "add", "wino text", "wino group", "attributes", "described"),
    ),
    ("AR only", "both + AR", ("T2I@1", "I2T@1", "replace", "swap", "add")),
    ("long captions contrasted", "both", ("T2I@1", "I2T@1")),
    (
        "text only (E5-V's recipe)",
        "both + AR",
        ("T2I@1", "I2T@1", "replace", "swap", "add", "attributes"),
    ),
    (
        "LoRA (VLM2Vec's recipe)",
        "both + AR",
        ("T2I@1", "I2T@1", "replace", "swap", "add", "attributes"),
    ),
    (
        "CLIP from scratch",
        "both + AR",
        ("T2I@1", "I2T@1", "replace", "swap", "add", "wino text", "wino group"),
    ),
    ("both + AR", "both + AR, twins", ("T2I@1", "I2T@1", "replace", "swap", "wino group")),
]


def train_text_only(embedder: Embedder, config: TrainConfig, dataset: CaptionDataset) -> None:
    """E5-V (arXiv 2407.12580): two captions of one scene must find each other among the batch's; no
    image is seen.

    One direction and temperature 0.05, as there; its entailment pairs become pairs of captions of
    the same scene."""
    optimizer = make_optimizer(embedder.model, config)
    batches = ResumableSampler(dataset.units, config.batch_size, config.steps, config.seed)
    for step, keys in enumerate(tqdm(batches, desc="text only", unit="step", leave=False)):
        first = []
        second = []
        for index, draw in keys:
            short, _ = dataset.captions(dataset.record(index))
            first.append(short[draw % len(short)])
            second.append(short[(draw + 1) % len(short)])
        anchors = F.normalize(embed_texts(embedder, first), dim=-1)
        positives = F.normalize(embed_texts(embedder, second), dim=-1)
        similarity = anchors @ positives.T / 0.05
        loss = F.cross_entropy(similarity, torch.arange(len(keys)))
        loss.backward()
        update(embedder.model, optimizer, step, config)


def embed_texts(embedder: Embedder, texts: list[str]) -> torch.Tensor:
    """(B, D), with gradients."""
    rows = [torch.tensor(embedder.layout.text_side(text)) for text in texts]
    last = torch.tensor([len(row) - 1 for row in rows])
    hidden = embedder.model(nn.utils.rnn.pad_sequence(rows, batch_first=True))  # (B, T, D)
    return hidden[torch.arange(len(rows)), last]


class Clip(nn.Module):
    """CLIP (arXiv 2103.00020) with the sizes of TinyLLaVA's parts: class token and last text token,
    projected."""

    def __init__(self, embedder: Embedder):
        super().__init__()
        config = embedder.model.config
        self.layout = embedder.layout
        self.processor = embedder.processor
        self.vision = VisionTower(config.vision, config.vision.num_hidden_layers)
        self.text = LanguageModel(config.text)
        self.project = nn.Linear(config.vision.hidden_size, config.text.hidden_size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(0.07)))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.project(self.vision(pixel_values)[:, 0])

    def texts(self, captions: list[str]) -> torch.Tensor:
        tokenizer = self.layout.tokenizer
        rows = []
        for text in captions:
            ids = [*tokenizer.begin, *tokenizer.encode(text), self.layout.stop_id]
            rows.append(torch.tensor(ids))
        last = torch.tensor([len(row) - 1 for row in rows])
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = self.text(self.text.embed_tokens(input_ids))  # (B, T, D)
        return hidden[torch.arange(len(rows)), last]


class ClipEmbeddings(Embeddings):
    """What the tests ask for, from a Clip."""

    def __init__(self, clip: Clip):
        self.clip = clip
        self.kept = KeptEmbeddings()

    @torch.no_grad()
    def encode_files(self, paths: list[Path]) -> torch.Tensor:
        pixels = [self.clip.processor(open_image(path)) for path in paths]
        return F.normalize(self.clip.images(torch.stack(pixels)), dim=-1)

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> torch.Tensor:
        return F.normalize(self.clip.texts(captions), dim=-1)


def train_clip(
    embedder: Embedder,
    config: TrainConfig,
    dataset: CaptionDataset,
    seconds: float,
    peak_lr: float = 1e-3,
) -> Clip:
    """CLIP on the same scenes for so many seconds, with a schedule by the clock."""
    torch.manual_seed(config.seed)
    clip = Clip(embedder)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    units = dataset.units if config.groups else range(len(dataset))
    batches = iter(ResumableSampler(units, config.batch_size, 10**6, config.seed))
    started = time.perf_counter()
    elapsed = 0.0
    step = 0
    with tqdm(total=round(seconds), desc="CLIP from scratch", unit="s", leave=False) as progress:
        while elapsed < seconds:
            progress.update(int(elapsed) - progress.n)
            warmup = min(1, (step + 1) / 50)
            cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * elapsed / seconds))
            factor = warmup * cosine
            samples = [dataset[key] for key in next(batches)]
            images = clip.images(torch.stack([sample.pixel_values for sample in samples]))
            texts = clip.texts([sample.short for sample in samples])
            for group in optimizer.param_groups:
                group["lr"] = factor * peak_lr
            contrastive_loss(images, texts, clip.log_scale.exp().clamp(max=100)).backward()
            nn.utils.clip_grad_norm_(clip.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            elapsed = time.perf_counter() - started
    return clip.eval()


def run_row(name: str, seed: int, tests: Path, data: Path, seconds: float, model: str) -> dict:
    """Train one row with one seed and test it -> columns of the table, seconds, and the contrastive
    loss of each step."""
    settings = {key: value for key, value in ROWS[name].items() if key != "steps"}
    config = TrainConfig(model=model, seed=seed, **settings)
    embedder = load_base(config.model, "cpu")
    if name == "no training":
        return {"columns": measure_embedder(embedder, tests), "seconds": 0.0}
    if name.startswith("CLIP"):
        dataset = CaptionDataset(data, embedder.layout, embedder.processor)
        clip = train_clip(embedder, config, dataset, seconds)
        return {"columns": measure_clip(clip, tests), "seconds": seconds}
    started = time.perf_counter()
    add_adapters(embedder, config)
    dataset = CaptionDataset(data, embedder.layout, embedder.processor, contrast=config.contrast)
    curve = []
    if name.startswith("text only"):
        train_text_only(embedder, config, dataset)
    else:
        out = Path("runs") / "ablation"
        shutil.rmtree(out, ignore_errors=True)
        (out / "checkpoints").mkdir(parents=True)
        train(embedder, config, dataset, out)
        for line in (out / "log.jsonl").read_text().splitlines():
            curve.append(round(json.loads(line)["contrastive"], 4))
    took = time.perf_counter() - started
    embedder.model.eval()
    columns = measure_embedder(embedder, tests)
    return {"seconds": took, "contrastive": curve, "columns": columns}


def measure_embedder(embedder: Embedder, tests: Path) -> dict[str, float]:
    return table_columns(evaluate(Embeddings(embedder), tests, world.score_captions))


def measure_clip(clip: Clip, tests: Path) -> dict[str, float]:
    """All tests but captioning: a CLIP cannot write."""
    embeddings = ClipEmbeddings(clip)
    tables = {}
    for test, settings in read_json(tests).items():
        if test != "captioning":
            file = tests.parent / settings["file"]
            images = tests.parent / settings["images"]
            items, _ = read_test(test, file, images, settings.get("split", "test"))
            tables[test] = METRICS[test](embeddings, items)
    return table_columns(tables)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval (Student's t)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return mean, t * deviation / math.sqrt(len(values))


def report(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: the table of means and intervals, and what became of the paper's orderings."""
    names = [name for name in ROWS if name in results]
    columns = []
    for name in names:
        for run in results[name].values():
            columns += [column for column in run["columns"] if column not in columns]
    lines = ["| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for column in columns:
            runs = [run["columns"] for run in results[name].values()]
            cells.append(cell([run[column] for run in runs if column in run]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| from | to | column | difference, paired by seed | the paper's direction is |",
        "|---|---|---|---|---|",
    ]
    for first, second, wanted in ORDERINGS:
        if first in results and second in results:
            for column in wanted:
                lines.append(verdict(results, first, second, column))
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    """The mean over seeds and its interval; "-" where a row has no such column."""
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f}" if math.isfinite(half) else f"{mean:.1f}"


def verdict(results: dict, first: str, second: str, column: str) -> str:
    base = results[first]
    if first == "no training":  # the same for every seed
        base = dict.fromkeys(results[second], base["0"])
    differences = []
    for seed, run in results[second].items():
        if seed in base:
            differences.append(run["columns"][column] - base[seed]["columns"][column])
    mean, half = interval(differences)
    if len(differences) < 2:
        return f"| {first} | {second} | {column} | {mean:+.1f} | (one seed) |"
    if abs(mean) <= half:
        word = "within noise"
    else:
        word = "reproduced" if mean > 0 else "not reproduced"
    return f"| {first} | {second} | {column} | {mean:+.1f} ± {half:.1f} | {word} |"


def draw_collapse(results: dict[str, dict[str, dict]], path: Path) -> None:
    """The contrastive loss of short and of long captions in training, and what comes of it (needs
    matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {
        "both": ("short captions", "tab:blue"),
        "long captions contrasted": ("long captions", "tab:orange"),
    }
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.4), width_ratios=[2, 1], layout="constrained"
    )
    for number, (name, (label, color)) in enumerate(rows.items()):
        runs = [result for result in results[name].values() if result.get("contrastive")]
        for run in runs:
            left.plot(run["contrastive"], color=color, alpha=0.25, linewidth=0.8)
        smooth = torch.tensor([run["contrastive"] for run in runs]).mean(0)
        smooth = F.avg_pool1d(F.pad(smooth[None], (4, 4), mode="replicate"), 9, stride=1)[0]
        left.plot(smooth, color=color, label=label)
        for place, column in enumerate(("T2I@1", "I2T@1", "swap", "add")):
            mean, half = interval([run["columns"][column] for run in runs])
            right.bar(
                place + 0.4 * number - 0.2,
                mean,
                0.38,
                color=color,
                yerr=half if math.isfinite(half) else None,
            )
    left.set(
        yscale="log",
        xlabel="step",
        ylabel="contrastive loss",
        title="in training (thin: single seeds)",
    )
    left.legend()
    right.set(
        xticks=range(4),
        xticklabels=["T2I@1", "I2T@1", "swap", "add"],
        title="on test scenes",
        ylim=(0, 105),
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="(all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument(
        "--split", choices=["val", "test"], default="test", help="scenes of the tables (test)"
    )
    parser.add_argument("--model", default="toy/tiny-llava", help="the base (toy/tiny-llava)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="results, read and extended (toy/ablation.json)"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="PNG",
        help="draw the collapse of long captions (matplotlib)",
    )
    args = parser.parse_args()
    folder = world.build(HERE / "data")
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for seed in args.seeds:
        for name in args.rows:
            done = results.setdefault(name, {})
            if str(seed) in done or (name == "no training" and done):
                continue
            print(f"{name}, seed {seed}")
            seconds = results.get("both + AR", {}).get(str(seed), {}).get("seconds", 150.0)
            done[str(seed)] = run_row(
                name,
                seed,
                folder / args.split / "tests.json",
                folder / "train.jsonl",
                seconds,
                args.model,
            )
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    table = report(results)
    args.out.with_suffix(".md").write_text(table + "\n")
    print(table)
    if args.picture:
        draw_collapse(results, args.picture)


if __name__ == "__main__":
    main()
