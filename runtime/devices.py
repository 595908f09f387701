"""Where the model is computed, and in which precision.

device, dtype = pick_device()      # or pick_device("cuda:1")
"""

import torch

from formats.files import InputError


def pick_device(name: str | None = None) -> tuple[torch.device, torch.dtype]:
    """The best device here, or the one asked for, with the fastest dtype it computes well in.

    On CUDA that is bf16 where the GPU has it, else fp16; on MPS and the CPU it is fp32.
    Raises InputError for a device that cannot be used."""
    if name is None and torch.cuda.is_available():
        name = "cuda"
    elif name is None and torch.backends.mps.is_available():
        name = "mps"
    elif name is None:
        name = "cpu"
    try:
        device = torch.empty(0, device=name).device  # with its number, and usable
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used here ({reason})") from None
    if device.type != "cuda":
        return device, torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return device, torch.bfloat16
    return device, torch.float16
