"""The runner of a GPU: steps of decodes alone by the captured step, one step ahead of the engine;
all others by the plain runner over FlatForward.

Knows requests, and what the captured step must be told of them; refuses to know kernels. The
surprising thing: outcomes are handed over while the next step runs already, so the host's work
costs no time, and whoever arrives or is cancelled waits for that one step.
"""

import logging
from collections.abc import Sequence

from llama.cache import KVCache
from llama.cuda.launch import use_less
from llama.cuda.step import CapturedStep, Row
from llama.engine.request import Outcome, Request, Share
from llama.engine.runner import PlainRunner
from llama.model import Transformer

logger = logging.getLogger(__name__)


class CapturedRunner(PlainRunner):
    """A `Runner` for one GPU that llama.cuda supports; arguments as of PlainRunner."""

    captured: CapturedStep | None

    def __init__(self, model: Transformer, cache: KVCache, n_words: int | None = None) -> None:
        super().__init__(model, cache, n_words)
        self._rows: list[Request] = []  # of the captured step
        self._last: Outcome | None = None  # the last that was handed over
        self._failures = self._pause = 0  # of the captured step in a row; steps to do without it
        self.capture()

    def capture(self) -> None:
        """Make the captured step, and have its forward run whatever is not captured."""
        self.captured = CapturedStep(self.model, self.cache, self.n_slots, self.n_words)
        self.forward = self.captured.forward

    def step(self, share: Share) -> Sequence[Outcome]:
        if self.captured is None or self._pause:
            self._pause = max(0, self._pause - 1)
            return self.run(share)
        outcomes = None
        try:
            outcomes = self._run_ahead(self.captured, [request for request, _ in share])
        except Exception as error:
            if not self._without_kernels(error):
                if not self._failures:
                    logger.warning("the captured step failed, this one runs without: %s", error)
                self._failures = min(self._failures + 1, 10)
                self._pause = 2**self._failures - 2  # it may go on failing
        except BaseException:
            self._land()
            raise
        return self.run(share) if outcomes is None else outcomes

    def _run_ahead(self, captured: CapturedStep, asked: list[Request]) -> list[Outcome] | None:
        """Launch the next step, if all it needs is on the device; the outcomes of the one before.

        None where nothing is in flight, and those who are asked for want more than one token each.
        """
        going = [r for r in self._rows if r.finish_reason is None]
        if not going or self._missed():
            self._land()
        if not captured.flight:
            if not all(request.decoding for request in asked):
                return None
            self._load(captured, asked)
            captured.launch()
            going = asked
        alone = going == asked and 2 * len(going) > len(self._rows)
        some_go_on = any(len(r.choices) + 1 < r.limit for r in going)
        seen = captured.knows_stops  # of ends, those by a stop id or the limit alone
        unseen = any(r.ends and not (seen and r.stop is not None) for r in self._rows)
        if alone and some_go_on and not unseen:
            captured.launch()
        found = zip(self._rows, captured.read(), strict=False)  # there may be rows behind ours
        outcomes = [Outcome(r, r.cached + 1, (c,)) for r, c in found if r.finish_reason is None]
        self._last = outcomes[-1] if outcomes else None
        self._failures = 0
        return outcomes

    def _missed(self) -> bool:
        """Whether the engine has not written down what it was handed, of which the last is the last
        to be written: it was interrupted, and its requests are behind the device."""
        return self._last is not None and self._last.request.cached != self._last.cached

    def _load(self, captured: CapturedStep, requests: list[Request]) -> None:
        """Make requests the rows of the captured step."""
        self._rows = list(requests)
        captured.load(
            [
                Row(
                    token=request.following(1)[0],
                    position=request.cached,
                    slot=request.slot,
                    generated=request.tokens,
                    limit=request.limit,
                    seed=request.seed,
                    params=request.params,
                    stops=request.stops,
                )
                for request in requests
            ]
        )

    def _land(self) -> None:
        """What is in flight never happened; the next captured step starts from the requests."""
        if self.captured is not None:
            self.captured.drop()
        self._rows, self._last = [], None

    def run(self, share: Share) -> Sequence[Outcome]:
        self._land()
        while True:
            try:
                return super().run(share)
            except Exception as error:
                if not self._without_kernels(error):
                    raise

    def _without_kernels(self, error: Exception) -> bool:
        """After a failure: whether it was one of loading kernels. Smaller ones are made then, or,
        if there are none, the plain model goes on."""
        self._land()
        if self.captured is None or not type(error).__module__.startswith("triton"):
            return False
        self.captured, self.forward = None, self.model
        if type(error).__name__ == "OutOfResources" and use_less(self.device):
            logger.info("a kernel needs too much here, smaller ones are made: %s", error)
            self.capture()
        else:
            logger.warning("a kernel cannot be used here, running without: %s", error)
        return True

    def drop(self) -> None:
        self._land()
        super().drop()
