"""Ctrl-C and SIGTERM end a training run between two steps, never inside of one."""

import os
import shlex
import signal
from pathlib import Path

from tqdm import tqdm

from runtime.processes import everyone, world_size

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Inside of it, SIGINT and SIGTERM are noted in `received` (0: none); they interrupt nothing.

    with StopRequests() as stop:
        for batch in batches:
            ...
            if stop.received_anywhere(): ..."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopRequests":
        for number in STOPPING:
            signal.signal(number, self.note)
        return self

    def note(self, number: int, frame) -> None:
        self.received = number

    def received_anywhere(self) -> int:
        """The same answer in all processes: a signal may have reached one of them only."""
        return max(everyone(self.received))

    def __exit__(self, *error) -> None:
        interrupt_at_once()


def say_how_to_go_on(received: int, done: int, out: Path) -> None:
    """After a signal, `done` steps, and a checkpoint in the run folder `out`."""
    command = "python"
    if world_size() > 1:
        command = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    name = signal.Signals(received).name
    tqdm.write(f"{name}: stopped after step {done}, and saved. This goes on:")
    tqdm.write(f"  {command} train.py --resume --out {shlex.quote(str(out))}")


def interrupt_at_once() -> None:
    """From now on both raise KeyboardInterrupt, wherever the program is."""
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler)


def ignore(worker: int) -> None:
    """For processes that read data: the step that they serve is to be finished."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
