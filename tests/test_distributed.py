"""Several processes on the CPU (gloo) are one process with the same global batch, also with sharded
layers.
"""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import log, signal_at, state

import eval
import train
from data import CaptionDataset, ResumableSampler, collate, open_image
from eval import TOY_MODEL, encode_image, load_base
from lora import trainable_parameters
from runtime import processes
from runtime.processes import everyone
from train import TrainConfig, add_adapters, training_step

CASES = {
    "whole": {},
    "cached": {"gradient_cache": True},
    "contrast alone": {"autoregressive_weight": 0.0, "micro_batch": 2},
    "captions alone": {"contrastive_weight": 0.0, "caption_share": 1.0},
    "captions alone, cached": {"contrastive_weight": 0.0, "gradient_cache": True},
    "no soft prompts, checkpointed": {"soft_prompts": False, "checkpoint_layers": 2},
}
SHARDED = {2: ["cached", "captions alone", "no soft prompts, checkpointed"], 4: ["whole"]}


def one_step(path, case, rank=0, world=1, sharded=False):
    """Losses and gradients of one batch of 13, shared out over `world` processes."""
    config = TrainConfig(**{"micro_batch": 3, "caption_share": 0.5, "batch_size": 13} | CASES[case])
    embedder = load_base(TOY_MODEL, "cpu")
    model = embedder.model
    add_adapters(embedder, config)
    for name, parameter in trainable_parameters(model).items():
        if name != "log_scale":
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.log_scale.data.fill_(2.0)
    if sharded:
        processes.shard(model, torch.device("cpu"), torch.float32)
    dataset = CaptionDataset(path, embedder.layout, embedder.processor)
    places = range(rank, 13, world)
    keys = next(iter(ResumableSampler(range(13), 13, 1, places=places)))
    share = config.caption_share if config.autoregressive_weight else 0.0
    batch = collate(
        [dataset[key] for key in keys], embedder.layout, config.micro_batch, share, places=places
    )
    model.train().language_model.checkpoint_layers = config.checkpoint_layers
    losses = training_step(model, batch, config)
    named = trainable_parameters(model)
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    return {name: torch.tensor(value) for name, value in losses.items()} | grads


def meet(rank, world, port):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def steps_of_one_process(rank, world, port, folder):
    meet(rank, world, port)
    processes.start(torch.device("cpu"))
    assert everyone({"rank": rank, "ü\n": [0.1]}) == [
        {"rank": r, "ü\n": [0.1]} for r in range(world)
    ]
    for case in CASES if world == 2 else ["whole", "cached", "captions alone"]:
        expected = load_file(f"{folder}/{case}.safetensors")
        for sharded in (False, True) if case in SHARDED[world] else (False,):
            found = one_step(f"{folder}/world/uneven.jsonl", case, rank, world, sharded)
            found = {
                name: value for name, value in found.items() if name in expected or value.any()
            }
            assert found.keys() == expected.keys(), (case, found.keys() ^ expected.keys())
            for name, value in expected.items():
                difference = (
                    found[name].double() - value.double()
                ).norm() / value.double().norm().clamp(min=1e-30)
                assert difference <= 1e-5, (case, sharded, name, difference)
    toy, pictures = load_base(TOY_MODEL, "cpu"), sorted(Path(folder, "world").rglob("*.png"))[:7]
    wanted, shares = encode_image(toy, [open_image(picture) for picture in pictures]), []
    eval.encode_image = lambda run, part: shares.append(len(part)) or encode_image(run, part)
    torch.testing.assert_close(eval.Embeddings(toy).images(pictures), wanted)
    assert shares == [-(-7 // world)]  # each has embedded its part
    torch.distributed.destroy_process_group()


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.parametrize("world", [2, 4])
def test_processes_are_one_process(small_world, tmp_path, world):
    """Losses and every gradient to 1e-5, for a batch of 13 in which some records have one kind of
    captions, and all three records of the last of four processes cannot be read. So every process
    has another number of pairs."""
    (tmp_path / "world").symlink_to(small_world)
    order = [record for record, _ in next(iter(ResumableSampler(range(13), 13, 1)))]
    records = [
        json.loads(line) for line in (small_world / "train.jsonl").read_text().splitlines()[:13]
    ]
    for place, change in (
        (0, {"short": []}),
        (5, {"long": []}),
        (6, {"long": []}),
        (8, {"short": []}),
    ):
        records[order[place]] |= change
    for place in (3, 7, 11):
        records[order[place]]["image"] = "missing.png"
    (small_world / "uneven.jsonl").write_text("\n".join(map(json.dumps, records)))
    for case in CASES:
        torch.manual_seed(0)
        save_file(
            {k: v.clone() for k, v in one_step(small_world / "uneven.jsonl", case).items()},
            tmp_path / f"{case}.safetensors",
        )
    torch.multiprocessing.spawn(
        steps_of_one_process, (world, free_ports(1)[0], str(tmp_path)), nprocs=world
    )


def runs_of_one_process(rank, world, ports, data, folder):
    """A run undisturbed, and one that two of the processes are asked to stop at different steps."""
    flags = [
        "--data",
        data,
        "--steps",
        "4",
        "--batch_size",
        "8",
        "--lora_dropout",
        "0.2",
        "--device",
        "cpu",
    ]
    meet(rank, world, ports[0])
    train.main([*flags, "--out", f"{folder}/whole"])
    meet(rank, world, ports[1])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_at(patch, (1,) if rank == 1 else (), signal.SIGTERM)
        train.main([*flags, "--out", f"{folder}/stopped", "--shard", "--workers", "1"])
    assert stop.value.code == 143 and os.path.exists(f"{folder}/stopped/checkpoints/step-2")
    meet(rank, world, ports[2])
    train.main(["--resume", "--out", f"{folder}/stopped"])
    meet(rank, world, ports[3])  # machines with disks of their own
    with pytest.raises(SystemExit, match="not every process finds the same checkpoint"):
        train.main(
            [*flags, "--resume", "--out", f"{folder}/whole" if rank == 0 else f"{folder}/elsewhere"]
        )


def test_two_processes_stop_together_and_go_on_exactly(small_world, tmp_path):
    """A signal to one of them stops both behind the same step; resumed, they end bit for bit where
    an undisturbed run of two ends, though they had sharded layers and processes that read; one
    process goes on with the same data."""
    data = str(small_world / "train.jsonl")
    torch.multiprocessing.spawn(
        runs_of_one_process, (2, free_ports(4), data, str(tmp_path)), nprocs=2
    )
    assert state(tmp_path / "stopped", 4) == state(tmp_path / "whole", 4)
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    rng = load_file(tmp_path / "whole/checkpoints/step-4/training_state.safetensors")["rng"]
    assert len(rng) == 2 and not torch.equal(rng[0], rng[1])

    train.main(["--resume", "--out", str(tmp_path / "stopped"), "--steps", "6"])
    alone = log(tmp_path / "stopped")
    assert alone[:4] == log(tmp_path / "whole") and [line["step"] for line in alone[4:]] == [4, 5]
