"""Work that is begun before its result is needed, beside what the caller goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ahead:
    """A thread, and on a GPU a stream of its own, that does one piece of work after another.

    A context: leaving it waits for what was begun.

    The work may read the tensors that exist when it is begun, as long as nobody changes or frees
    them before its result is taken. It must not exchange anything with other processes: their
    order would be chance.

    Args:
        device: on which the work is done.
        is_on: False does the work at once, in the caller's thread and stream.
    """

    def __init__(self, device: torch.device, *, is_on: bool = True) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead") if is_on else None
        has_stream = is_on and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if has_stream else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def is_on(self) -> bool:
        """Whether work really goes on beside the caller's."""
        return self._pool is not None

    def start(
        self, work: Callable[[], T], tensors_of: Callable[[T], Iterable[Tensor]]
    ) -> Callable[[], T]:
        """Begin `work`, behind all that the caller has asked of the device.

        Args:
            work: done without gradients.
            tensors_of: all tensors of its result, which the caller will use on its own stream.

        Returns:
            What waits for the work and returns its result, or raises what it raised.
        """
        if self._pool is None:
            return _at_once(work).result
        stream = self._stream
        if stream is None:
            return self._pool.submit(torch.no_grad()(work)).result
        begun = torch.cuda.current_stream(self._device).record_event()

        def on_stream() -> tuple[T, torch.cuda.Event]:
            with torch.no_grad(), torch.cuda.stream(stream):
                stream.wait_event(begun)
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


def _at_once(work: Callable[[], T]) -> Future[T]:
    """The work's result, or what it raised for the one who asks for it."""
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
