"""A run of train.py, or a base model, in MTEB: a model for its tasks, a task from a Karpathy file.

    python -m examples.mteb_model runs/toy toy/data/test/karpathy.json --images toy/data/images

In Python, on tasks of its own (which it downloads):

    tasks = mteb.get_tasks(["Flickr30kT2IRetrieval", "Flickr30kI2TRetrieval"])
    mteb.evaluate(Encoder(load_embedder("runs/toy")), tasks)

hit_rate_at_k is what the image-text literature, and eval.py, calls R@k; recall_at_k is the share of
an image's captions that were found. MTEB ranks equal scores by their ids; eval.py counts a tie as a
failure.
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

from eval import Embedder, encode_image, encode_text, load_embedder
from formats.images import to_rgb
from formats.testsets import read_retrieval
from runtime.terminal import errors_in_one_line


class Encoder(AbsEncoder):
    """MTEB's model protocol. Instructions of tasks are not used: the prompts were trained."""

    def __init__(self, embedder: Embedder, name: str = "nanoVladVA/run"):
        self.embedder = embedder
        settings = {
            "name": name,
            "revision": "local",
            "modalities": ["text", "image"],
            "similarity_fn_name": ScoringFunction.COSINE,
        }
        self.mteb_model_meta = ModelMeta.create_empty(settings)

    def encode(
        self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs
    ) -> torch.Tensor:
        """A loader of batches with "image" or "text" -> (N, D).

        Raises ValueError for pictures with text, as in composed retrieval: that was not trained."""
        parts = []
        for batch in inputs:
            if "image" in batch and "text" in batch:
                raise ValueError("a picture together with a text has no embedding here")
            if "image" in batch:
                images = [to_rgb(image) for image in batch["image"]]
                parts.append(encode_image(self.embedder, images))
            else:
                parts.append(encode_text(self.embedder, batch["text"]))
        return torch.cat(parts)


def karpathy_data(file: Path, images: Path, category: str) -> dict:
    """A file's test split as MTEB holds it: queries, a corpus, and which belong together.

    category: "t2i", where captions are the queries, or "i2t", where images are."""
    image_names = []
    paths = []
    text_names = []
    texts = []
    relevant: dict[str, dict[str, int]] = {}
    for number, (path, captions) in enumerate(read_retrieval(file, images)):
        image = f"image-{number}"
        image_names.append(image)
        paths.append(str(path))
        for text in captions:
            caption = f"text-{len(texts)}"
            text_names.append(caption)
            texts.append(text)
            if category == "t2i":
                relevant.setdefault(caption, {})[image] = 1
            else:
                relevant.setdefault(image, {})[caption] = 1
    pictures = datasets.Dataset.from_dict({"id": image_names, "image": paths})
    pictures = pictures.cast_column("image", datasets.Image())
    captions = datasets.Dataset.from_dict({"id": text_names, "text": texts})
    queries = captions if category == "t2i" else pictures
    corpus = pictures if category == "t2i" else captions
    return {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}


def karpathy_task(
    file: Path, images: Path, category: str, name: str = "Karpathy"
) -> AbsTaskRetrieval:
    """Retrieval of all images by captions ("t2i") or of all captions by images ("i2t")."""
    data = karpathy_data(file, images, category)

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
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    return Task()


def retrieval(embedder: Embedder, file: Path, images: Path) -> dict[str, float]:
    """Scores of both directions, shares: {"t2i hit_rate_at_1": ..., ...}."""
    scores = {}
    for category in ("t2i", "i2t"):
        task = karpathy_task(file, images, category)
        result = mteb.evaluate(Encoder(embedder), task, cache=None, show_progress_bar=False)
        found = result.task_results[0].scores["test"][0]
        for metric in ("hit_rate", "recall", "ndcg"):
            for k in (1, 5, 10):
                scores[f"{category} {metric}_at_{k}"] = found[f"{metric}_at_{k}"]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images = "where the pictures are (default: beside the file)"
    parser.add_argument("run", metavar="RUN", help="run of train.py or LLaVA folder")
    parser.add_argument("file", type=Path, metavar="JSON", help="Karpathy's JSON")
    parser.add_argument("--images", type=Path, metavar="DIR", help=images)
    parser.add_argument("--device")
    args = parser.parse_args()
    with errors_in_one_line():
        embedder = load_embedder(args.run, args.device)
        folder = args.images or args.file.parent
        print(json.dumps(retrieval(embedder, args.file, folder), indent=1))


if __name__ == "__main__":
    main()
