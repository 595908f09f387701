"""Pictures read where they stand in tar shards, beside loose files: 20,000 of them.

    python -m benchmarks.shards

Index: formats.captions.convert on two shards as img2dataset writes them (jpg, txt, json). Reading:
the same random pictures through CaptionDataset, from the shards and from a folder, in pairs of
alternating order. Memory: what is resident after the index and after all reading, above what was
there before (Linux only: it reads /proc).
"""

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.loading import memory
from data import CaptionDataset, ImageProcessor, Layout, TextTokenizer
from eval import TOY_MODEL
from formats.captions import convert


def noise_jpeg() -> bytes:
    """Noise hardly compresses, so a small picture takes some kilobytes, as a photograph does."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_both(folder: Path, count: int) -> None:
    """Two shards, and the same pictures as loose files with their lines."""
    shards = folder / "shards"
    loose = folder / "loose"
    shards.mkdir()
    loose.mkdir()
    lines = []
    half = (count + 1) // 2
    for first in range(0, count, half):
        with tarfile.open(shards / f"{first // half:05d}.tar", "w") as tar:
            for number in range(first, min(first + half, count)):
                key = f"{number:09d}"
                caption = f"noise number {number}"
                picture = noise_jpeg()
                (loose / f"{key}.jpg").write_bytes(picture)
                lines.append(json.dumps({"image": f"loose/{key}.jpg", "captions": [caption]}))
                add(tar, f"{key}.jpg", picture)
                add(tar, f"{key}.txt", caption.encode())
                add(tar, f"{key}.json", json.dumps({"key": key}).encode())
    (folder / "loose.jsonl").write_text("\n".join(lines) + "\n")


def seconds_to_read(dataset: CaptionDataset, chosen: list[int]) -> float:
    started = time.perf_counter()
    for index in chosen:
        dataset[index, 0]
    return time.perf_counter() - started


def compare(shards: CaptionDataset, loose: CaptionDataset, rounds: int, reads: int) -> list[float]:
    """Each round's time from loose files as a multiple of the time from shards."""
    ratios = []
    for number in range(rounds):
        chosen = random.Random(number).sample(range(len(loose)), reads)
        # Whichever reads second has it warmer, so they take turns.
        if number % 2:
            from_shards = seconds_to_read(shards, chosen)
            from_loose = seconds_to_read(loose, chosen)
        else:
            from_loose = seconds_to_read(loose, chosen)
            from_shards = seconds_to_read(shards, chosen)
        ratios.append(from_loose / from_shards)
    return ratios


def same_pixels(shards: CaptionDataset, loose: CaptionDataset) -> bool:
    """Do both give the same pictures? Every 997th is looked at."""
    for index in range(0, len(loose), 997):
        ours = shards[index, 0].pixel_values
        theirs = loose[index, 0].pixel_values
        if not ours.equal(theirs):
            return False
    return True


def measure(folder: Path, count: int, rounds: int, reads: int) -> dict:
    layout = Layout(TextTokenizer(TOY_MODEL), num_image_tokens=16)
    processor = ImageProcessor.from_pretrained(TOY_MODEL)
    write_both(folder, count)
    result = {}
    before = memory("VmRSS")

    started = time.perf_counter()
    counts = convert(folder / "shards", folder / "shards.jsonl", folder / "shards")
    result["indexed"] = counts["written"]
    result["seconds"] = time.perf_counter() - started
    result["MB_after_index"] = (memory("VmRSS") - before) / 1e6

    shards = CaptionDataset(folder / "shards.jsonl", layout, processor, folder / "shards")
    loose = CaptionDataset(folder / "loose.jsonl", layout, processor)
    result["same_pixels"] = same_pixels(shards, loose)
    result["MB_after_opening"] = (memory("VmRSS") - before) / 1e6

    ratios = compare(shards, loose, rounds, reads)
    low, median, high = statistics.quantiles(ratios, n=4)
    result["loose_time_over_shards_time"] = median
    result["low"] = low
    result["high"] = high
    result["MB_after_reading"] = (memory("VmRSS") - before) / 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000, help="pictures")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reads", type=int, default=2_000, help="pictures a round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.count, args.rounds, args.reads)
    for key, value in result.items():
        if isinstance(value, float):
            result[key] = round(value, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
