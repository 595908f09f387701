"""log.jsonl: a line a step, which goes on where a run goes on."""

import json
import os
import time
from pathlib import Path

from formats.files import InputError, write_whole
from runtime.processes import rank


class RunLog:
    """Writes the log of a run; process 0 alone does. Use it in a `with` statement.

    Args:
        out: the run's folder.
        steps: how many lines of an earlier process to keep; later ones are dropped.
    Raises: InputError where the lines that should be there cannot be read."""

    def __init__(self, out: Path, steps: int):
        self.path = out / "log.jsonl"
        lines = read_log(self.path, steps) if steps else []
        self.skipped: list[str] = []  # of all steps: why records could not be used
        for line in lines:
            self.skipped += line["skipped"]
        if rank() == 0:
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        seconds_before = lines[-1]["seconds"] if lines else 0.0
        self.now = time.perf_counter()
        self.began = self.now - seconds_before

    def __enter__(self) -> "RunLog":
        path = self.path if rank() == 0 else os.devnull
        self.file = open(path, "a", buffering=1)  # a line at a time, so that a kill tears none
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, line: dict) -> None:
        """Write a step's line, which has "pairs", "tokens" and "skipped", and its speed."""
        before = self.now
        self.now = time.perf_counter()
        line["pairs_per_second"] = line["pairs"] / (self.now - before)
        line["tokens_per_second"] = line.pop("tokens") / (self.now - before)
        line["seconds"] = self.now - self.began
        self.file.write(json.dumps(line) + "\n")
        self.skipped += line["skipped"]

    def refuse_too_many_skipped(self, read: int) -> None:
        """A few unreadable files are life; more are a wrong --image_root.

        Raises InputError where more than ten, and more than 1 % of the records `read`, could not be
        used."""
        if len(self.skipped) > max(10, 0.01 * read):
            found = f"{len(self.skipped)} times a record could not be used"
            raise InputError(f"{found}, the last one: {self.skipped[-1]}")


def read_log(path: Path, steps: int) -> list[dict]:
    """The first `steps` lines of a log. Raises InputError."""
    try:
        lines = path.read_text().splitlines()[:steps]
        log = [json.loads(line) for line in lines]
        for line in log:
            line["skipped"] = list(line["skipped"])
            line["seconds"] = float(line["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot go on from it ({error})") from None
    return log
