"""Saving beside the training, which waits for a copy in memory and not for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor


def copy(tree: Any) -> Any:
    """Nested dicts and lists with all their tensors copied to CPU memory, shards as shards."""
    if isinstance(tree, dict):
        return {name: copy(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy(value) for value in tree]
    return tree.detach().to("cpu", copy=True) if isinstance(tree, Tensor) else tree


class Saver:
    """One save at a time, in a thread of its own, on all ranks.

    What it writes must be copies, or it would be of several steps. Its messages between ranks have
    a group of their own, as training sends others at the same time. A kill leaves what was there.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.group = None
        if dist.is_available() and dist.is_initialized():  # a slow disk is no reason to give up
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def start(self, work: Callable[[dist.ProcessGroup | None], None]) -> None:
        """Begin work(group), which every rank begins, once the work before is done."""
        self.wait()

        def run() -> None:
            try:
                work(self.group)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the save under way is done. Raises what went wrong in it."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error:
            raise error

    close = wait
