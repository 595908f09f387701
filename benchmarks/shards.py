"""Pictures read where they stand in tar shards, beside loose files: 20,000 of them.

    python benchmarks/shards.py

Index: `data.py convert` on two shards as img2dataset writes them (jpg, txt, json). Reading: the same random pictures
through CaptionDataset, from the shards and from a folder, in pairs of alternating order. Memory: what is resident
after the index and after all reading, above what was there before (Linux only: it reads /proc).
"""

import argparse
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.loading import memory  # noqa: E402
from data import CaptionDataset, ImageProcessor, Layout, TextTokenizer  # noqa: E402
from eval import TOY_MODEL  # noqa: E402
from examples.prepare import convert  # noqa: E402


def write_both(folder: Path, count: int) -> None:
    """Two shards, and the same pictures as loose files with their lines."""
    (folder / "shards").mkdir()
    (folder / "loose").mkdir()
    lines, half = [], (count + 1) // 2
    for first in range(0, count, half):
        with tarfile.open(folder / "shards" / f"{first // half:05d}.tar", "w") as tar:
            for number in range(first, min(first + half, count)):
                file, key = io.BytesIO(), f"{number:09d}"
                color = tuple(random.Random(number).randrange(256) for _ in range(3))
                Image.effect_noise((64, 64), 60).convert("RGB").save(file, "JPEG")
                (folder / "loose" / f"{key}.jpg").write_bytes(file.getvalue())
                caption = f"noise number {number} of {color}"
                lines.append(json.dumps({"image": f"loose/{key}.jpg", "captions": [caption]}))
                parts = {"jpg": file.getvalue(), "txt": caption.encode(), "json": json.dumps({"key": key}).encode()}
                for kind, content in parts.items():
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "loose.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reads", type=int, default=2_000, help="pictures a round")
    args = parser.parse_args()
    layout, processor = Layout(TextTokenizer(TOY_MODEL), 16), ImageProcessor.from_pretrained(TOY_MODEL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_both(folder, args.count)
        before = memory("VmRSS")
        started = time.perf_counter()
        counts = convert(folder / "shards", folder / "shards.jsonl", folder / "shards")
        result = {"indexed": counts["written"], "seconds": time.perf_counter() - started}
        result["MB_after_index"] = (memory("VmRSS") - before) / 1e6
        shards = CaptionDataset(folder / "shards.jsonl", layout, processor, folder / "shards")
        loose = CaptionDataset(folder / "loose.jsonl", layout, processor)
        same = all((shards[i, 0].pixel_values == loose[i, 0].pixel_values).all() for i in range(0, args.count, 997))
        result |= {"same_pixels": same, "MB_after_opening": (memory("VmRSS") - before) / 1e6}
        ratios = []
        for number in range(args.rounds):
            chosen, taken = random.Random(number).sample(range(args.count), args.reads), {}
            for dataset in (shards, loose) if number % 2 else (loose, shards):
                started = time.perf_counter()
                for index in chosen:
                    dataset[index, 0]
                taken[dataset] = time.perf_counter() - started
            ratios.append(taken[loose] / taken[shards])
        low, median, high = statistics.quantiles(ratios, n=4)
        result |= {"loose_time_over_shards_time": median, "low": low, "high": high}
        result["MB_after_reading"] = (memory("VmRSS") - before) / 1e6
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
