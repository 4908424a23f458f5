"""What slots still hold after a request has left, and which prompt goes on with it.

Token ids by slot, no keys and no tensor. The surprising thing: a prompt takes a slot over only if
it uses more than half of what is there, so that a short beginning which all prompts have in common
costs no conversation its slot.
"""

from llama.engine.request import Request


class Kept:
    """The tokens whose keys each slot held at the last end there, the oldest end first."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def known(self, slot: int, request: Request) -> int:
        """How many tokens of a prompt have their keys in a slot; one is always left to run."""
        if request.params.prompt_logprobs is not None:
            return 0
        held = self.tokens.get(slot, [])
        return min(common(held, request.prompt), len(request.prompt) - 1)

    def goes_on(self, slot: int, known: int) -> bool:
        """Whether a request that knows so much of a slot uses most of what is there."""
        return 2 * known > len(self.tokens.get(slot, ()))

    def choose(self, request: Request, free: list[int]) -> tuple[int, int]:
        """The slot for a request, and how many of its tokens are known there: the one of which it
        goes on with the most, or else the least recently used."""
        known = {slot: self.known(slot, request) for slot in free}
        best = max(free, key=lambda slot: known[slot])
        if not self.goes_on(best, known[best]):
            age = {slot: at for at, slot in enumerate(self.tokens)}
            best = min(free, key=lambda slot: age.get(slot, -1))
        return best, known[best]


def common(left: list[int], right: list[int]) -> int:
    """How many tokens two lists begin with alike; halves are compared at the speed of C."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
