"""Memory and time of loading a checkpoint, beside transformers (Linux only: it reads /proc).

    python benchmarks/loading.py                           # a random fp32 checkpoint of 1 GB, loaded as fp32
    python benchmarks/loading.py --stored float16 --loaded bfloat16
    python benchmarks/loading.py --peak-only --bytes 2e8   # ours alone, as JSON: what tests/test_model.py reads

Peak memory: each loader in a process of its own that has loaded a tiny checkpoint first, so that what the libraries
take once does not count; the rise is the high-water mark after every weight was touched minus what was resident before.
Time: both loaders in one process, in pairs of alternating order, on a file that the system has in memory already; a
load ends when every weight was touched.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Llava, LlavaConfig, TextConfig, VisionConfig  # noqa: E402


def write_checkpoint(folder: Path, size: float, dtype: torch.dtype) -> None:
    """Random weights of about `size` bytes; the vision tower is small, the layers are as many as it takes."""
    vision = VisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    text = TextConfig(vocab_size=1000, hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    text.num_hidden_layers = max(1, round(size / dtype.itemsize / (4 * 512 * 512 + 3 * 512 * 2048)))
    with torch.device("meta"):
        model = Llava(LlavaConfig(vision=vision, text=text, image_token_id=7)).to(dtype)
    with torch.no_grad():
        for parameter in model.to_empty(device="cpu").parameters():
            parameter.uniform_(-0.05, 0.05)
    model.save_pretrained(folder)


def load(loader: str, folder: Path, dtype: torch.dtype) -> int:
    """Load, touch every weight -> their bytes."""
    if loader == "ours":
        model = Llava.from_pretrained(folder, dtype=dtype)
    else:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    return sum(parameter.nbytes for parameter in model.parameters())


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is resident now, VmHWM the highest it has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_in_new_process(loader: str, tiny: Path, folder: Path, loaded: str) -> dict:
    command = [sys.executable, __file__, "--loaded", loaded, "--measure", loader, str(tiny), str(folder)]
    return json.loads(subprocess.check_output(command, text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9, help="size of the checkpoint")
    parser.add_argument("--stored", default="float32", help="precision of the file")
    parser.add_argument("--loaded", default="float32", help="precision asked for")
    parser.add_argument("--pairs", type=int, default=7, help="how often both loaders are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-only", action="store_true", help="print our peak as JSON and stop")
    parser.add_argument("--measure", nargs=3, metavar=("LOADER", "TINY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    stored, loaded = getattr(torch, arguments.stored), getattr(torch, arguments.loaded)

    if arguments.measure:
        loader, tiny, folder = arguments.measure
        load(loader, Path(tiny), loaded)
        before = memory("VmRSS")
        weights = load(loader, Path(folder), loaded)
        print(json.dumps({"weights": weights, "rise": memory("VmHWM") - before}))
        return

    with tempfile.TemporaryDirectory() as temporary:
        tiny, folder = Path(temporary) / "tiny", Path(temporary) / "large"
        write_checkpoint(tiny, 0, stored)
        write_checkpoint(folder, arguments.bytes, stored)
        gc.collect()
        if arguments.peak_only:
            print(json.dumps(peak_in_new_process("ours", tiny, folder, arguments.loaded)))
            return

        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB of {arguments.stored}, loaded as {arguments.loaded}, {arguments.threads} thread(s)")
        for loader in ("ours", "transformers"):
            peak = peak_in_new_process(loader, tiny, folder, arguments.loaded)
            ratios = f"{peak['rise'] / peak['weights']:.3f} of the weights, {peak['rise'] / size:.3f} of the file"
            print(f"  peak memory of {loader:12}: {peak['rise'] / 1e9:.3f} GB, {ratios}")

        seconds = {"ours": [], "transformers": []}
        for loader in seconds:
            load(loader, folder, loaded)  # warm up: imports, and the file into the system's cache
        for pair in range(arguments.pairs):
            for loader in list(seconds)[:: 1 if pair % 2 else -1]:
                gc.collect()
                start = time.perf_counter()
                load(loader, folder, loaded)
                seconds[loader].append(time.perf_counter() - start)
        ratios = [ours / theirs for ours, theirs in zip(*seconds.values())]
        for name, values in {**seconds, "ratio": ratios}.items():
            low, median, high = statistics.quantiles(values, n=4)
            unit = "" if name == "ratio" else " s"
            print(f"  time of {name:12}: median {median:.3f}{unit}, quartiles {low:.3f} to {high:.3f}, n {len(values)}")


if __name__ == "__main__":
    main()
