"""Memory and time of loading a checkpoint, beside transformers (Linux only: it reads /proc).

    python -m benchmarks.loading                        # a random fp32 checkpoint of 1 GB, as fp32
    python -m benchmarks.loading --stored float16 --loaded bfloat16
    python -m benchmarks.loading --peak-only --bytes 2e8    # ours alone, as JSON: what
                                                            # tests/test_model.py reads

Peak memory: each loader in a process of its own that has loaded a tiny checkpoint first, so that
what the libraries take once does not count; the rise is the high-water mark after every weight was
touched minus what was resident before.
Time: both loaders in one process, in pairs of alternating order, on a file that the system has in
memory already; a load ends when every weight was touched.
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

from model import Llava, LlavaConfig, TextConfig, VisionConfig

PROJECT = Path(__file__).resolve().parents[1]
LOADERS = ("ours", "transformers")


def write_checkpoint(folder: Path, size: float, dtype: torch.dtype) -> None:
    """Random weights of about `size` bytes: a small vision tower, as many layers as it takes."""
    vision = VisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    D = 512
    intermediate_size = 2048
    layer_bytes = dtype.itemsize * (4 * D * D + 3 * D * intermediate_size)
    text = TextConfig(
        vocab_size=1000,
        hidden_size=D,
        intermediate_size=intermediate_size,
        num_attention_heads=8,
        num_hidden_layers=max(1, round(size / layer_bytes)),
    )
    config = LlavaConfig(vision=vision, text=text, image_token_id=7)
    # On the meta device first: the default initialisation would take longer than all the rest.
    with torch.device("meta"):
        model = Llava(config).to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    model.save_pretrained(folder)


def load(loader: str, folder: Path, dtype: torch.dtype) -> int:
    """Load, touch every weight -> their bytes."""
    if loader == "ours":
        model = Llava.from_pretrained(folder, dtype=dtype)
    else:
        # Not at the top of the file: where only we are measured, it must not take memory.
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    return sum(parameter.nbytes for parameter in model.parameters())


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is resident now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            kilobytes = int(line.split()[1])
            return kilobytes * 1024
    raise KeyError(key)


def measure_peak(loader: str, tiny: Path, folder: Path, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights, and by how many memory rose at most while they were loaded."""
    load(loader, tiny, dtype)
    before = memory("VmRSS")
    weights = load(loader, folder, dtype)
    return {"weights": weights, "rise": memory("VmHWM") - before}


def peak_in_new_process(loader: str, tiny: Path, folder: Path, loaded: str) -> dict[str, int]:
    """`measure_peak` in a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks.loading", "--loaded", loaded]
    command += ["--measure", loader, str(tiny), str(folder)]
    return json.loads(subprocess.check_output(command, text=True, cwd=PROJECT))


def time_pairs(folder: Path, dtype: torch.dtype, pairs: int) -> dict[str, list[float]]:
    """Seconds of each load, by loader."""
    seconds = {loader: [] for loader in LOADERS}
    # The first loads import the libraries, and bring the file into the system's memory.
    for loader in LOADERS:
        load(loader, folder, dtype)
    for pair in range(pairs):
        # Who goes second may find a warmer machine, so they take turns.
        order = LOADERS if pair % 2 else LOADERS[::-1]
        for loader in order:
            gc.collect()
            start = time.perf_counter()
            load(loader, folder, dtype)
            seconds[loader].append(time.perf_counter() - start)
    return seconds


def print_quartiles(name: str, values: list[float], unit: str) -> None:
    low, median, high = statistics.quantiles(values, n=4)
    print(
        f"  time of {name:12}: median {median:.3f}{unit}, "
        f"quartiles {low:.3f} to {high:.3f}, n {len(values)}"
    )


def compare(arguments: argparse.Namespace, tiny: Path, folder: Path) -> None:
    """Print peak memory and time of both loaders."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(
        f"{size / 1e9:.2f} GB of {arguments.stored}, loaded as {arguments.loaded}, "
        f"{arguments.threads} thread(s)"
    )
    for loader in LOADERS:
        peak = peak_in_new_process(loader, tiny, folder, arguments.loaded)
        rise = peak["rise"]
        print(
            f"  peak memory of {loader:12}: {rise / 1e9:.3f} GB, "
            f"{rise / peak['weights']:.3f} of the weights, {rise / size:.3f} of the file"
        )
    seconds = time_pairs(folder, getattr(torch, arguments.loaded), arguments.pairs)
    for loader in LOADERS:
        print_quartiles(loader, seconds[loader], " s")
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["transformers"])]
    print_quartiles("ratio", ratios, "")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=float, default=1e9, help="size of the checkpoint")
    parser.add_argument("--stored", default="float32", help="precision of the file")
    parser.add_argument("--loaded", default="float32", help="precision asked for")
    parser.add_argument("--pairs", type=int, default=7, help="how often both loaders are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-only", action="store_true", help="print our peak as JSON and stop")
    parser.add_argument(
        "--measure", nargs=3, metavar=("LOADER", "TINY", "FOLDER"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.measure:  # this is the new process of `peak_in_new_process`
        loader, tiny, folder = arguments.measure
        loaded = getattr(torch, arguments.loaded)
        print(json.dumps(measure_peak(loader, Path(tiny), Path(folder), loaded)))
        return

    with tempfile.TemporaryDirectory() as temporary:
        tiny = Path(temporary) / "tiny"
        folder = Path(temporary) / "large"
        stored = getattr(torch, arguments.stored)
        write_checkpoint(tiny, 0, stored)
        write_checkpoint(folder, arguments.bytes, stored)
        gc.collect()
        if arguments.peak_only:
            print(json.dumps(peak_in_new_process("ours", tiny, folder, arguments.loaded)))
            return
        compare(arguments, tiny, folder)


if __name__ == "__main__":
    main()
