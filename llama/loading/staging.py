"""Copies from mapped files to a GPU, read and sent by several threads at once.

It knows tensors, not names. The surprising thing: a copy straight from a mapped file reads a page
at a time and sends it through a buffer of the driver's, one after the other. Here each thread has
a pinned block of its own, so that some read while others send.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

BLOCK = 2**25  # bytes a thread reads before it sends them
THREADS = 8


class Stager:
    """A context in which `copy` does not wait for its end; leaving it waits for all copies.

    `advance` is told the bytes of each block when it has arrived.
    """

    def __init__(self, advance: Callable[[int], object]) -> None:
        self.advance = advance
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="llama-load")
        self._own = threading.local()
        self._jobs: list[Future[None]] = []
        self._room = threading.Semaphore(2 * THREADS)  # blocks unpacked on the way wait in memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` to `target` (on a GPU), of the same shape; dtypes may differ."""
        if source.device.type != "cpu":
            target.copy_(source)
            self.advance(target.nbytes)
            return
        rows = max(1, BLOCK // (source[:1].nbytes or 1))
        for pair in zip(torch.split(target, rows), torch.split(source, rows), strict=True):
            self._room.acquire()
            self._jobs.append(self._pool.submit(self._try, *pair))

    def _try(self, target: Tensor, source: Tensor) -> None:
        try:
            self._send(target, source)
        finally:
            self._room.release()

    def _send(self, target: Tensor, source: Tensor) -> None:
        own = self._own
        if getattr(own, "block", torch.empty(0)).nbytes < source.nbytes:
            size = max(BLOCK, source.nbytes)
            own.block = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            own.stream = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]
        block = own.block[: source.nbytes].view(source.dtype).view(source.shape)
        # numpy copies in this thread; torch would start a team of threads in each of them
        block.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
        with torch.cuda.stream(own.stream), torch.inference_mode():
            direct = target.is_contiguous() and target.dtype == source.dtype
            target.copy_(block if direct else block.to(target.device, non_blocking=True), True)
        own.stream.synchronize()
        self.advance(target.nbytes)

    def __enter__(self) -> "Stager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for job in self._jobs:
                job.result()
