"""Work that is started before its result is needed, beside what the caller does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Lookahead:
    """A thread, and on a GPU a stream of its own, that does one piece of work after another.

    A context: leaving it waits until the thread is done with what it was at, and drops the rest.

    The work may read the tensors that exist when it is started, as long as nobody changes or frees
    them before its result is taken. It must not exchange anything with other processes: their
    order would be chance.

    Args:
        device: on which the work is done.
        role: those of one role share a stream, and with it the memory that is kept for it; only
            one of them may be at work at a time.
    """

    def __init__(self, device: torch.device, role: str) -> None:
        self._device = device
        self._stream = _stream(device, role) if device.type == "cuda" else None
        # A thread starts on the first GPU, and torch goes back there when it leaves a stream.
        home = None if self._stream is None else lambda: torch.cuda.set_device(device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=home)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(
        self, work: Callable[[], T], tensors_of: Callable[[T], Iterable[Tensor]]
    ) -> Callable[[], T]:
        """Start `work`, after all that the caller has asked of the device.

        Args:
            work: done without gradients.
            tensors_of: all tensors of its result, which the caller will use on its own stream.

        Returns:
            What waits for the work and returns its result, or raises what it raised.
        """
        stream = self._stream
        if stream is None:
            return self._pool.submit(torch.no_grad()(work)).result
        started = torch.cuda.current_stream(self._device).record_event()

        def on_stream() -> tuple[T, torch.cuda.Event]:
            with torch.no_grad(), torch.cuda.stream(stream):
                stream.wait_event(started)
                return work(), stream.record_event()

        future = self._pool.submit(on_stream)

        def take() -> T:
            result, done = future.result()
            mine = torch.cuda.current_stream(self._device)
            mine.wait_event(done)
            for tensor in tensors_of(result):
                if tensor.is_cuda:
                    # Its memory is the other stream's, which must not have it back while this one
                    # still reads it.
                    tensor.record_stream(mine)
            return result

        return take


@lru_cache
def _stream(device: torch.device, role: str) -> torch.cuda.Stream:
    """One for the whole process: torch keeps freed memory for each stream apart."""
    return torch.cuda.Stream(device)
