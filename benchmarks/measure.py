"""What the benchmarks share: paired times, peak memory, saved bytes, FLOPs."""

import ctypes
import gc
import json
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )


def seconds(function: Callable) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def times(functions: list[Callable], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round. They take turns, in changing order, so that a busy
    moment hits all.
    """
    for function in functions:  # warm up
        function()
    taken = [[0.0] * rounds for _ in functions]
    for number in tqdm(range(rounds), leave=False):
        order = range(len(functions)) if number % 2 == 0 else reversed(range(len(functions)))
        for index in order:
            taken[index][number] = seconds(functions[index])
    return taken


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"ratio": median, "low": low, "high": high}


def paired_ratio(first: Callable, second: Callable, rounds: int = 9) -> dict[str, float]:
    """Time of `second` over time of `first`: median and quartiles of the pairs."""
    ours, theirs = times([first, second], rounds)
    return quartiles([b / a for a, b in zip(ours, theirs)]) | {
        "seconds_of_first": statistics.median(ours)
    }


def peak_memory(function: Callable) -> int:
    """Bytes above what was there before: the allocator's on CUDA, resident ones on Linux."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS:")
    function()
    return memory("VmHWM:") - before


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is resident now, VmHWM the highest it has
    been.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def saved_bytes(function: Callable, parameters: list[torch.Tensor]) -> int:
    """The most bytes that autograd keeps at one time while `function` runs, each storage counted
    once, weights left out.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    users = Counter()  # how often each storage is kept now, by its address
    now = 0
    most = 0

    def pack(tensor):
        nonlocal now, most
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in weights:
            return tensor
        if not users[address]:
            now += storage.nbytes()
            most = max(most, now)
        users[address] += 1
        kept = Kept(tensor)
        # The graph lets go of it in the backward pass.
        weakref.finalize(kept, let_go, address, storage.nbytes())
        return kept

    def let_go(address: int, size: int) -> None:
        nonlocal now
        users[address] -= 1
        if not users[address]:
            now -= size

    def unpack(kept):
        return kept.tensor if isinstance(kept, Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        function()
    return most


class Kept:
    """A tensor that autograd keeps. As long as it lives, no other storage gets its address."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def in_place_product(_, a, b, **ignored) -> int:
    """addmm_ of shapes (M, K), (K, N), which torch's counter leaves out."""
    return 2 * a[0] * a[1] * b[1]


def attention_formula(operation) -> Callable:
    """Counts one of CUDA's fused attentions, forward or backward, from the shapes of its arguments.

    torch's own formulas refuse grouped queries in some versions, and count what causality leaves
    out as well as what a kernel computes twice."""
    names = [argument.name for argument in operation.default._schema.arguments]
    is_backward = any("grad_out" in name for name in names)

    def formula(*arguments, out_shape=None, **named) -> int:
        given = dict(zip(names, arguments)) | named
        batch, heads, T, head_dim = given["query"]
        flops = 4 * batch * heads * T * given["key"][2] * head_dim
        if given.get("is_causal"):
            flops //= 2
        return 2 * flops if is_backward else flops

    return formula


ATTENTIONS = (
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward,
)


def count_flops(function: Callable) -> int:
    """Of matrix products; on CUDA of attention, too (the CPU's is not known to the counter)."""
    formulas = {operation: attention_formula(operation) for operation in ATTENTIONS}
    formulas[torch.ops.aten.addmm_] = in_place_product
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return counter.get_total_flops()


def free_memory() -> None:
    """Give back what the allocator keeps for later; after a failure, what its frames held."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def write_json(path: Path | None, content) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


def roof(dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product on random data."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(times([lambda: a @ b], 10)[0])
