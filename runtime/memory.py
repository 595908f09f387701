"""How much memory training will take, and how much there is: said before the first step.

The estimate counts what autograd keeps. It is within 3 % of what was measured for that; temporary
tensors and the libraries themselves come on top.
"""

import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

MANY = 2048  # sequences: where as many fit, nobody asks how many


def held_and_free(device: torch.device) -> tuple[float, float]:
    """GB that this process holds on a device, and GB that are free there.

    0 and infinity where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.memory_allocated(device) / 1e9, free / 1e9
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return 0.0, free / 1e9
    try:  # Linux, in kB
        held = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return int(held[1]) * 1024 / 1e9, int(free[1]) * 1024 / 1e9
    except (OSError, TypeError):
        return 0.0, math.inf


def numbers_a_layer(text, config, is_cpu: bool, itemsize: int) -> float:
    """How many numbers a decoder layer keeps of each token, in units of the model's precision."""
    D = text.hidden_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    hidden = text.intermediate_size
    # The inputs of both norms; queries and what attention returned; keys and values; gate and up.
    numbers = 2 * D + 2 * queries + 2 * keys + 2 * hidden
    numbers += 7 * config.lora_rank  # A x of the seven LoRAs
    if not config.fast:
        numbers += hidden  # silu(gate), which the lean layers make again
    if not config.fast and config.lora_rank and not config.lora_dropout:
        numbers += 2 * D + hidden  # what went into LoRA: the norms' outputs, silu(gate) * up
    if config.lora_rank and config.lora_dropout:
        # What went into each LoRA, and a mask: of bytes on a GPU, of whole numbers on a CPU.
        inputs = 5 * D + queries + hidden
        numbers += inputs * (2 if is_cpu else 1 + 1 / itemsize)
    return numbers


def estimate(config, model, batch) -> dict[str, float]:
    """GB that steps with batches such as this take beyond the model, by part.

    "a sequence" is what one more sequence in a micro-batch takes; it is no part of the sum."""
    text = model.config.text
    D = text.hidden_size
    itemsize = model.dtype.itemsize
    layer = numbers_a_layer(text, config, model.device.type == "cpu", itemsize)
    # A checkpointed layer keeps its input; one at a time is computed again and kept whole.
    checkpointed = min(config.checkpoint_layers, text.num_hidden_layers)
    token = layer * (text.num_hidden_layers - checkpointed)
    token += D * (checkpointed + 2)
    if checkpointed:
        token += layer
    chunks = [chunk.input_ids for chunk in batch.images + batch.texts]
    sizes = [chunk.numel() for chunk in chunks]
    tokens = max(sizes) if config.gradient_cache else sum(sizes)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    image_token = model.config.image_token_id
    image_tokens = sum(int((chunk.input_ids == image_token).sum()) for chunk in batch.images)
    rows_of_logits = min(max(256, 2**27 // (4 * text.vocab_size)), batch.num_tokens)
    parts = {
        "gradients and AdamW": 12 * learning,  # bytes: three numbers in fp32
        "activations": tokens * token * itemsize,
        "image features": image_tokens * D * itemsize,
        "logits": rows_of_logits * text.vocab_size * 8,
        "a sequence": max(chunk.shape[1] for chunk in chunks) * token * itemsize,
    }
    return {name: size / 1e9 for name, size in parts.items()}


def report(parts: dict[str, float], free: float) -> None:
    """Print an estimate beside what is free (both in GB), and what would fit."""
    parts = dict(parts)
    sequence = parts.pop("a sequence")
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size:.2g}" for name, size in parts.items())
    tqdm.write(f"memory for training: about {total:.2g} GB of {free:.3g} GB free ({listed})")
    if math.isfinite(free):
        fitting = max(0, int((free - total + parts["activations"]) / sequence))
        if fitting < MANY:
            found = f"--micro_batch of up to {fitting:,} sequences fits"
            tqdm.write(f"  with --gradient_cache a {found}")
    if total > free:
        tqdm.write(
            "  AS SET, IT IS LIKELY TO RUN OUT OF MEMORY; "
            "--checkpoint_layers saves more, at more computation"
        )
