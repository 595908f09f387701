"""What several processes cost and save: python -m benchmarks.scaling

One global batch on one and on two processes of this machine (gloo): seconds a step, and the bytes
that a process sends for it, by collective, beside what no scheme can go below: its own embeddings
of both sides to everyone, and the gradients of what is trained. With --shard a base of random
weights that dominates everything else, and the memory of a process at its peak, whole and sharded.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from data import Batch, CaptionDataset, Chunk, ResumableSampler, collate  # noqa: E402
from eval import TOY_MODEL, load_base  # noqa: E402
from lora import trainable_parameters  # noqa: E402
from model import Llava, LlavaConfig, TextConfig, VisionConfig  # noqa: E402
from runtime import processes  # noqa: E402
from toy import world as toy  # noqa: E402

SENT = {"all_reduce": 0, "all_gather": 0}


def count_bytes() -> None:
    """Have the collectives count what each process hands to them."""
    for name, place in (("all_reduce", 0), ("all_gather", 1)):

        def counted(*args, whole, name, place):
            SENT[name] += args[place].nbytes
            return whole(*args)

        setattr(dist, name, partial(counted, whole=getattr(dist, name), name=name, place=place))


def join(rank: int, world: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    processes.start(torch.device("cpu"))


def timed(
    rank: int, world: int, port: int, data: str, batch_size: int, steps: int, result: str
) -> None:
    join(rank, world, port)
    count_bytes()
    config = train.TrainConfig(batch_size=batch_size, micro_batch=16)
    embedder = load_base(TOY_MODEL, "cpu")
    train.add_adapters(embedder, config)
    embedder.model.train()
    dataset = CaptionDataset(data, embedder.layout, embedder.processor)
    places = range(rank, batch_size, world)
    seconds = []
    for keys in ResumableSampler(dataset.units, batch_size, steps, places=places):
        batch = collate(
            [dataset[key] for key in keys],
            embedder.layout,
            config.micro_batch,
            config.caption_share,
            1,
            places,
        )
        processes.everyone("start")
        SENT.update(dict.fromkeys(SENT, 0))
        began = time.perf_counter()
        train.training_step(embedder.model, batch, config)
        processes.everyone("end")
        seconds.append(time.perf_counter() - began)
        embedder.model.zero_grad()
    if rank == 0:
        trained = 4 * sum(p.numel() for p in trainable_parameters(embedder.model).values())
        embeddings = 2 * batch.num_pairs * embedder.model.config.text.hidden_size * 4
        found = {
            "seconds": statistics.median(seconds[2:]),
            **SENT,
            "trained": trained,
            "embeddings": embeddings,
        }
        Path(result).write_text(json.dumps(found))


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def big_config() -> LlavaConfig:
    """A tall, narrow one: its layers are nearly all of it."""
    text = TextConfig(
        vocab_size=2000, hidden_size=768, intermediate_size=3072, num_hidden_layers=80
    )
    text.num_attention_heads = text.num_key_value_heads = 12
    text.head_dim = 64
    vision = VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    vision.image_size, vision.patch_size = 32, 8
    return LlavaConfig(vision, text, image_token_id=1999)


def held(rank: int, world: int, port: int, folder: str, result: str) -> None:
    """Load, train one step, and note the most that was resident, beyond what there was before."""
    join(rank, world, port)
    samples, stop, start = [], threading.Event(), resident()

    def watch():
        while not stop.wait(0.005):
            samples.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    config = train.TrainConfig(lora_rank=4, soft_prompts=False)
    model = Llava.from_pretrained(folder, *((None, "cpu") if world > 1 else (torch.float32, "cpu")))
    train.add_adapters(
        SimpleNamespace(model=model, layout=SimpleNamespace(image_prompt=[], text_prompt=[])),
        config,
    )
    if world > 1:
        processes.shard(model, torch.device("cpu"), torch.float32)
    gc.collect()
    after_loading = resident() - start
    model.train()
    ids = torch.randint(1, 1900, (2, 24))
    images = ids.clone()
    images[:, :16] = 1999
    labels = images.roll(-1, 1).masked_fill(torch.arange(24) < 16, -100)
    last, pair = torch.tensor([23, 23]), torch.arange(2)
    chunks = (
        Chunk(images, torch.tensor([16, 16]), pair, labels, torch.randn(2, 3, 32, 32)),
        Chunk(ids, last, pair),
    )
    train.training_step(model, Batch([chunks[0]], [chunks[1]], 2, 14, []), config)
    stop.set()
    thread.join()
    found = {"loaded": after_loading, "peak": max(samples) - start}
    Path(f"{result}-{rank}").write_text(json.dumps(found))


def spawn(function, world: int, *args) -> None:
    torch.multiprocessing.spawn(function, (world, 29640 + world, *args), nprocs=world)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--shard", action="store_true", help="memory of a large base instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.shard:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = (
                "65536"  # else glibc keeps for itself what is freed
            )
            torch.manual_seed(0)
            Llava(big_config()).save_pretrained(f"{folder}/base")
            size = (
                sum(path.stat().st_size for path in Path(f"{folder}/base").glob("*.safetensors"))
                / 1e9
            )
            print(f"a base of {size:.2f} GB in fp32, LoRA of rank 4; resident beyond the start, GB")
            peaks = {}
            for world in (1, 2):
                spawn(held, world, f"{folder}/base", f"{folder}/held")
                found = [
                    json.loads(Path(f"{folder}/held-{rank}").read_text()) for rank in range(world)
                ]
                peaks[world] = max(each["peak"] for each in found)
                loaded = max(each["loaded"] for each in found)
                print(
                    f"  {world} process(es): {loaded:.2f} when loaded, "
                    f"{peaks[world]:.2f} at the peak"
                )
            print(f"  ratio of the peaks {peaks[2] / peaks[1]:.2f}")
            return
        data = toy.build(Path(folder) / "world", train_scenes=256, test_scenes=4) / "train.jsonl"
        found = {}
        for world in (1, 2):
            spawn(timed, world, str(data), args.batch_size, args.steps, f"{folder}/timed")
            found[world] = json.loads(Path(f"{folder}/timed").read_text())
        one, two = found[1], found[2]
        print(f"TinyLLaVA, a global batch of {args.batch_size}, median of {args.steps - 2} steps")
        ratio = one["seconds"] / two["seconds"]
        print(
            f"  1 process {one['seconds']:.3f} s, 2 processes {two['seconds']:.3f} s a step: "
            f"{ratio:.2f} times as fast"
        )
        least, sent = two["embeddings"] + two["trained"], two["all_gather"] + two["all_reduce"]
        print(
            f"  a process hands over {two['all_gather']:,} bytes to gather "
            f"and {two['all_reduce']:,} to sum"
        )
        print(
            f"  least: {two['embeddings']:,} (embeddings) and {two['trained']:,} (gradients): "
            f"{sent / least:.4f} times"
        )


if __name__ == "__main__":
    main()
