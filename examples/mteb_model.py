"""A run of train.py, or a base model, in MTEB: a model for any of its tasks, and a task from a Karpathy file.

    python -m examples.mteb_model runs/toy toy/data/test/karpathy.json --images toy/data/images

In Python, on tasks of its own (which it downloads):

    mteb.evaluate(Encoder(load_run("runs/toy")), mteb.get_tasks(["Flickr30kT2IRetrieval", "Flickr30kI2TRetrieval"]))

hit_rate_at_k is what the image-text literature, and eval.py, calls R@k; recall_at_k is the share of an image's captions
that were found. MTEB ranks equal scores by their ids; eval.py counts a tie as a failure.
"""

import argparse
import json
from pathlib import Path

import datasets
import mteb
import torch
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from data import read_retrieval, to_rgb
from eval import Run, encode_image, encode_text, load_run


class Encoder(AbsEncoder):
    """MTEB's model protocol. Instructions of tasks are not used: the prompts were trained."""

    def __init__(self, run: Run, name: str = "nanoVladVA/run"):
        self.run = run
        settings = {"name": name, "revision": "local", "modalities": ["text", "image"]}
        self.mteb_model_meta = ModelMeta.create_empty(settings | {"similarity_fn_name": ScoringFunction.COSINE})

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> torch.Tensor:
        """A loader of batches with "image" or "text" -> (N, D). Pictures with text, as in composed retrieval, are not
        what was trained."""
        parts = []
        for batch in inputs:
            if "image" in batch and "text" in batch:
                raise ValueError("a picture together with a text has no embedding here")
            if "image" in batch:
                parts.append(encode_image(self.run, [to_rgb(image) for image in batch["image"]]))
            else:
                parts.append(encode_text(self.run, batch["text"]))
        return torch.cat(parts)


def karpathy_task(file: Path, images: Path, category: str, name: str = "Karpathy") -> AbsTaskRetrieval:
    """Retrieval of all images by captions ("t2i") or of all captions by images ("i2t"), from a file's test split."""
    items = read_retrieval(file, images)
    paths = [str(path) for path, _ in items]
    picture = datasets.Dataset.from_dict({"id": [f"image-{i}" for i in range(len(items))], "image": paths})
    picture = picture.cast_column("image", datasets.Image())
    pairs = [(f"image-{i}", text) for i, (_, captions) in enumerate(items) for text in captions]
    names = [f"text-{i}" for i in range(len(pairs))]
    text = datasets.Dataset.from_dict({"id": names, "text": [caption for _, caption in pairs]})
    relevant: dict[str, dict[str, int]] = {}
    for caption, (image, _) in zip(names, pairs):
        query, found = (caption, image) if category == "t2i" else (image, caption)
        relevant.setdefault(query, {})[found] = 1
    queries, corpus = (text, picture) if category == "t2i" else (picture, text)

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"{name}{category.upper()}Retrieval",
            description="Retrieval among all images and captions of one file.",
            reference=None,
            dataset={"path": "local/karpathy", "revision": "local"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )

        def load_data(self, *args, **kwargs) -> None:
            split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Task()


def retrieval(run: Run, file: Path, images: Path) -> dict[str, float]:
    """Scores of both directions, shares: {"t2i hit_rate_at_1": ..., ...}."""
    scores = {}
    for category in ("t2i", "i2t"):
        task = karpathy_task(file, images, category)
        result = mteb.evaluate(Encoder(run), task, cache=None, show_progress_bar=False)
        found = result.task_results[0].scores["test"][0]
        kept = [f"{metric}_at_{k}" for metric in ("hit_rate", "recall", "ndcg") for k in (1, 5, 10)]
        scores |= {f"{category} {metric}": found[metric] for metric in kept}
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run of train.py or LLaVA folder")
    parser.add_argument("file", type=Path, metavar="JSON", help="Karpathy's JSON")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the pictures are (default: beside the file)")
    parser.add_argument("--device")
    args = parser.parse_args()
    images = args.images or args.file.parent
    print(json.dumps(retrieval(load_run(args.run, args.device), args.file, images), indent=1))


if __name__ == "__main__":
    main()
