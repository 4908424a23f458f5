"""One engine for several callers: one of their threads steps it for all, the others wait for it.

Knows requests and their events; refuses to know ids, text and how a step is run. The surprising
thing: no caller can hold the others up. Whoever was interrupted, or waits for long, steps itself.
"""

import threading
from collections.abc import Collection, Generator

from llama.engine.engine import Engine
from llama.engine.request import Event, Request

PATIENCE = 1.0  # seconds that a thread waits for another one's step before it steps itself


class Owner:
    """What callers of an engine share. `ranks` is over how many the model is cut."""

    def __init__(self, engine: Engine, ranks: int) -> None:
        self.engine, self.ranks = engine, ranks
        # who steps the engine now, for everybody: a thread, and what it holds until that is done
        self._stepping: dict[str, tuple[int, threading.Lock]] = {}
        self._lock = threading.Lock()
        self._caller: int | None = None  # of several ranks: the one thread that calls

    def run(
        self, requests: list[Request], over: Collection[int] = ()
    ) -> Generator[tuple[int, Event], None, None]:
        """Queue requests, have the engine step until all are done, and yield each event with the
        index of its request. Raises what one of them failed with, unless its index is `over`: it
        went on behind an end that its caller found in the text.

        Several of these may be under way, in one thread or in several. A finalizer may close one
        at any moment, so what is done at the end must neither wait nor lock.
        """
        self._claim()
        left = dict(enumerate(requests))
        seen = [0] * len(requests)
        try:
            for request in requests:
                self.engine.queue(request)
            while left:
                news = [(at, event) for at, r in left.items() for event in r.news(seen[at])]
                for at, event in news:
                    error = event.request.error
                    if event.finish_reason == "error" and error is not None and at not in over:
                        raise error
                    seen[at] += 1
                    if event.finish_reason is not None:
                        del left[at]
                    yield at, event
                if not news:
                    self._step()
        finally:
            for request in requests:
                self.engine.cancel(request, "cancelled")

    def _step(self) -> None:
        """Have the engine take a step: by this thread, or by another one that is at it already.

        A thread that finds itself named was interrupted in here, and steps on. One that waits for
        long does as well, since the other may be gone; the engine has its own lock.
        """
        me, mine = threading.get_ident(), threading.Lock()
        mine.acquire()
        who, done = self._stepping.setdefault("now", (me, mine))  # one operation
        if who != me and done.acquire(timeout=PATIENCE):
            done.release()  # for the next one that waits
            return
        try:
            self.engine.step()
        finally:
            self._stepping.pop("now", None)
            mine.release()

    def _claim(self) -> None:
        """With several ranks all calls come from one thread, or ranks would see them in different
        orders: RuntimeError for another one."""
        me = threading.get_ident()
        if self.ranks > 1:
            with self._lock:
                if self._caller not in (None, me) and not self.engine.idle:
                    raise RuntimeError(
                        f"this model is cut over {self.ranks} ranks and another thread is using "
                        "it: make all calls from one thread, so that every rank sees them in the "
                        "same order"
                    )
                self._caller = me
