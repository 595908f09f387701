"""Several processes that train one model, each its share of every batch.

    torchrun --nproc_per_node=8 train.py ...      starts one for each GPU; without it there is one

Each process computes the contrastive loss of the WHOLE batch, on embeddings gathered from all. So
nothing is exchanged in the backward pass; afterwards the gradients are added up, in one message.

Axes: B rows of all processes, b of one, D hidden.
"""

import io
import os
import sys
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


def rank() -> int:
    """The number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun started some. `device` is of the kind to use.

    Returns this process's own device. Only process 0 goes on printing: one report is enough."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # A process may wait long for the others: evaluations take long.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = io.StringIO()
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def everyone(message) -> list:
    """What every process says, in order of rank. None goes on before all have spoken."""
    if not dist.is_initialized():
        return [message]
    messages = [None] * world_size()
    dist.all_gather_object(messages, message)
    return messages


def wait_for_all() -> None:
    """Come back when every process has come here."""
    everyone(None)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows (b, D) of all processes, in order of rank, (B, D). Ranks may bring different b.

    The gradient of a process's own rows is complete as it is, for each process computes the loss
    of the whole batch."""
    return GatherRows.apply(rows) if dist.is_initialized() else rows


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(world_size())]
        dist.all_gather(counts, count)
        counts = torch.cat(counts).tolist()
        # All ranks must send tensors of one shape: the shorter ones are padded with zeros.
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        first = sum(counts[: rank()])
        ctx.own = slice(first, first + len(rows))
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.own]


def sum_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place and in one message."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split(sizes)):
        tensor.copy_(total.view_as(tensor))


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Spread the frozen layers over the processes (FSDP2): a layer is whole while it is computed.

    What learns is whole everywhere, and its gradients are added up as ever. The model comes on the
    CPU as a view of its file, of which only those pages are read that are needed."""
    from torch.distributed import device_mesh, fsdp, tensor  # take a second to import

    mesh = device_mesh.init_device_mesh(device.type, (world_size(),))
    learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
    vision_layers = []  # a tower keeps them in a list, wherever it is
    for module in model.vision_tower.modules():
        if isinstance(module, nn.ModuleList):
            vision_layers += module
    layers = [*vision_layers, *model.language_model.layers]
    for module in (*layers, model.vision_tower, model.language_model, model):
        # What an inner module has spread is spread: outer ones hold the rest.
        held = set()
        for parameter in module.parameters():
            if not isinstance(parameter, tensor.DTensor):
                held.add(parameter)
        for frozen in held - learning:
            frozen.data = frozen.data.to(device, dtype)
        module.to(device)
        if module in layers:
            fsdp.fully_shard(module, mesh=mesh, ignored_params=learning)
        elif module is not model:  # the two towers hold nothing of their own to spread
            fsdp.fully_shard(module, mesh=mesh, ignored_params=held)
