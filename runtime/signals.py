"""Ctrl-C and SIGTERM end a training run between two steps, never inside of one."""

import signal

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Inside of it, SIGINT and SIGTERM are noted in `received` (0: none); they interrupt nothing.

    with StopRequests() as stop:
        for batch in batches:
            ...
            if stop.received: ..."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopRequests":
        for number in STOPPING:
            signal.signal(number, self.note)
        return self

    def note(self, number: int, frame) -> None:
        self.received = number

    def __exit__(self, *error) -> None:
        interrupt_at_once()


def interrupt_at_once() -> None:
    """From now on both raise KeyboardInterrupt, wherever the program is."""
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler)


def ignore(worker: int) -> None:
    """For processes that read data: the step that they serve is to be finished."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
