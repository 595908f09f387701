"""A run of train.py, or a base model, in LAION's CLIP_benchmark: the three things that its tasks ask of a model.

    python -m examples.clip_benchmark_model runs/toy toy/data/test/karpathy.json --images toy/data/images

In Python, with any of its tasks:

    model, transform, tokenizer = load_model("runs/toy")
    zeroshot_classification.evaluate(model, loader, tokenizer, classnames, templates, device="cpu", amp=False)

Its recalls are eval.py's but for equal scores: there whichever comes first in torch.topk wins, here a tie never counts
as a success. With amp=True it computes in autocast, which is another precision than ours.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from data import open_image, read_retrieval
from eval import Run, encode, load_run


class ClipModel(nn.Module):
    """What CLIP_benchmark calls a model: pixels or the tokenizer's ids in, embeddings out."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    @torch.no_grad()
    def encode_image(self, pixel_values):
        """(B, 3, height, width) -> (B, D), unit length."""
        model = self.run.model
        ids = torch.tensor([self.run.layout.image_side()] * len(pixel_values), device=model.device)
        hidden = model(ids, pixel_values.to(model.device, model.dtype))
        return F.normalize(hidden[:, -1].float(), dim=-1)

    def encode_text(self, ids):
        """(B, T), padded with -1 -> (B, D), unit length."""
        return encode(self.run, [row[row >= 0].tolist() for row in ids], None, 256).to(ids.device)


def load_model(folder: str | Path, device: str | None = None) -> tuple:
    """(model, transform, tokenizer), as CLIP_benchmark's own loading functions return them."""
    run = load_run(folder, device)

    def tokenizer(texts: list[str]) -> torch.Tensor:
        rows = [torch.tensor(run.layout.text_side(text)) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    return ClipModel(run), run.processor, tokenizer


def retrieval(folder: str | Path, file: Path, images: Path, device: str | None = None) -> dict[str, float]:
    """CLIP_benchmark's zeroshot_retrieval on a Karpathy file's test split: shares, not percent."""
    from clip_benchmark.metrics import zeroshot_retrieval

    model, transform, tokenizer = load_model(folder, device)
    items = [(transform(open_image(path)), captions) for path, captions in read_retrieval(file, images)]
    lay_out = lambda batch: (torch.stack([pixels for pixels, _ in batch]), [captions for _, captions in batch])  # noqa: E731
    loader = DataLoader(items, batch_size=64, collate_fn=lay_out)
    where = model.run.model.device.type
    return zeroshot_retrieval.evaluate(model, loader, tokenizer, where, amp=False, recall_k_list=[1, 5, 10])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run of train.py or LLaVA folder")
    parser.add_argument("file", type=Path, metavar="JSON", help="Karpathy's JSON")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the pictures are (default: beside the file)")
    parser.add_argument("--device")
    args = parser.parse_args()
    print(json.dumps(retrieval(args.run, args.file, args.images or args.file.parent, args.device), indent=1))


if __name__ == "__main__":
    main()
