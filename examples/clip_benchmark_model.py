"""A run of train.py, or a base model, in LAION's CLIP_benchmark: the three things its tasks need.

    python -m examples.clip_benchmark_model runs/toy toy/data/test/karpathy.json \\
        --images toy/data/images

In Python, with any of its tasks:

    model, transform, tokenizer = load_model("runs/toy")
    zeroshot_classification.evaluate(
        model, loader, tokenizer, classnames, templates, device="cpu", amp=False
    )

Its recalls are eval.py's but for equal scores: there whichever comes first in torch.topk wins, here
a tie never counts as a success. With amp=True it computes in autocast, which is another precision
than ours.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from data import open_image
from eval import Embedder, encode, load_embedder
from formats.testsets import read_retrieval
from runtime.terminal import errors_in_one_line

PADDING = -1  # no token has this id


class ClipModel(nn.Module):
    """What CLIP_benchmark calls a model: pixels or the tokenizer's ids in, embeddings out."""

    def __init__(self, embedder: Embedder):
        super().__init__()
        self.embedder = embedder

    @torch.no_grad()
    def encode_image(self, pixel_values):
        """(B, 3, height, width) -> (B, D), unit length."""
        model = self.embedder.model
        layout = self.embedder.layout
        rows = [layout.image_side(image=image) for image in pixel_values]
        ids = torch.tensor(rows, device=model.device)
        hidden = model(ids, pixel_values.to(model.device, model.dtype))  # (B, T, D)
        # All rows are of one length, so that the last position is the summary's.
        return F.normalize(hidden[:, -1].float(), dim=-1)

    def encode_text(self, ids):
        """(B, T), padded -> (B, D), unit length."""
        rows = [row[row != PADDING].tolist() for row in ids]
        return encode(self.embedder, rows, None, 256).to(ids.device)


def load_model(folder: str | Path, device: str | None = None) -> tuple:
    """(model, transform, tokenizer), as CLIP_benchmark's own loading functions return them."""
    embedder = load_embedder(folder, device)

    def tokenizer(texts: list[str]) -> torch.Tensor:
        rows = [torch.tensor(embedder.layout.text_side(text)) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)

    return ClipModel(embedder), embedder.processor, tokenizer


def stack_pixels(batch: list[tuple]) -> tuple[torch.Tensor, list[list[str]]]:
    """Items (pixels, captions) -> (B, 3, height, width) and a list of captions for each."""
    pixels = torch.stack([each for each, _ in batch])
    captions = [texts for _, texts in batch]
    return pixels, captions


def retrieval(
    folder: str | Path, file: Path, images: Path, device: str | None = None
) -> dict[str, float]:
    """CLIP_benchmark's zeroshot_retrieval on a Karpathy file's test split: shares, not percent."""
    from clip_benchmark.metrics import zeroshot_retrieval

    model, transform, tokenizer = load_model(folder, device)
    items = []
    for path, captions in read_retrieval(file, images):
        items.append((transform(open_image(path)), captions))
    loader = DataLoader(items, batch_size=64, collate_fn=stack_pixels)
    where = model.embedder.model.device.type
    return zeroshot_retrieval.evaluate(
        model, loader, tokenizer, where, amp=False, recall_k_list=[1, 5, 10]
    )


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
        folder = args.images or args.file.parent
        print(json.dumps(retrieval(args.run, args.file, folder, args.device), indent=1))


if __name__ == "__main__":
    main()
