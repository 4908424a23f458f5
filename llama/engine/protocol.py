"""What the engine asks of whoever computes: the protocol `Runner`.

A runner holds the model and the keys and values of every slot. It reads the requests that it is
handed and writes to none of them: what became of them it returns as outcomes. The plain runner is
in runner.py; one for an accelerator lies in that accelerator's room. No torch here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from llama.engine.request import Outcome, Share


class Line(Protocol):
    """What ranks say to each other beside the model's own sums; see `Ranks` in parallel.py."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def exchange(self, values: Sequence[int]) -> list[list[int]]: ...

    def spread(self, message: bytes, size: int) -> bytes: ...

    def fail(self) -> None: ...


class Runner(Protocol):
    """Runs the model on `n_slots` slots of `max_seq_len` tokens, over `vocab_size` tokens of which
    the first `n_words` may be chosen.

    An outcome says how many tokens of its request have their keys in the slot now, and which tokens
    follow. The engine writes outcomes down in their order. Where it was interrupted before the last
    one, none of them counts as seen: the next share begins where the requests stand.
    """

    n_slots: int
    max_seq_len: int
    vocab_size: int
    n_words: int
    dtype_name: str  # of weights, keys and values

    @property
    def ranks(self) -> Line: ...

    def surroundings(self) -> AbstractContextManager[None]:
        """What a step needs of its thread, whatever the caller has set there: entered before
        anything else is asked for a step."""
        ...

    def step(self, share: Share) -> Sequence[Outcome]:
        """Run what can be run of a share now; the outcomes are of it or of an earlier one.

        A runner may be ahead of its outcomes, and need not take in everybody at once: what brings
        no outcome is in the next share again. After an error nothing has happened.
        """
        ...

    def run(self, share: Share) -> Sequence[Outcome]:
        """Run all of a share, now and nothing ahead: for parts of one that failed in `step`."""
        ...

    def ran_out_of_memory(self, error: Exception) -> bool:
        """Whether that is what an error says; what can be given back has been, then."""
        ...

    def moved(self) -> ValueError | None:
        """What to say where the model has another dtype or device than its cache was made for."""
        ...

    def is_finite(self, slot: int, length: int) -> bool:
        """Whether the first `length` keys and values of a slot are all numbers."""
        ...

    def forget(self, slot: int) -> None:
        """Make sure that nothing of what is in a slot reaches anybody."""
        ...

    def drop(self) -> None:
        """Keep no request: nobody wants a step for now."""
        ...
