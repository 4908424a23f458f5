"""What every system is given, and how it answers: the one file that all of these scripts share.

Imports torch only, never a package named llama: which one that is differs from script to script.
The surprising thing: results are printed again after every measurement, so that what a system did
before it was stopped is not lost; the last line counts.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

RAGGED, SHORTEST, LONGEST, NEW_TOKENS = 8, 10, 2000, 128
WARM = 4


def task() -> dict:
    """The task that compare.py gives: args (of the shape), vocab_size, device, rows, context,
    lengths, steps, longest (of the ragged prompts) and new_tokens."""
    return json.loads(sys.argv[1])


def ragged_prompts(vocab_size: int, longest: int = LONGEST) -> list[list[int]]:
    """Eight prompts of random ids and random lengths, the same in every system."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, longest + 1, (RAGGED,), generator=generator, device="cpu")
    return [prompt(n, vocab_size, seed) for seed, n in enumerate(lengths.tolist())]


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (length,), generator=generator, device="cpu")
    return ids.tolist()


def room(task: dict) -> int:
    """Tokens that a sequence may need in any part of the task."""
    decode = task["context"] + WARM + task["steps"]
    return max(decode, *task["lengths"], task["longest"] + task["new_tokens"]) + 8


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Of `repeats` runs, after one that is not counted."""
    return statistics.median([seconds(work, device) for _ in range(repeats + 1)][1:])


class Results:
    """Numbers by name; each new one is told at once."""

    def __init__(self, task: dict) -> None:
        self.task, self.numbers = task, {}

    def decode(self, rows: int, seconds: float) -> None:
        self._tell(f"decode {rows} at {self.task['context']}, ms a step", 1000 * seconds)

    def prefill(self, length: int, seconds: float) -> None:
        self._tell(f"prefill {length}, ms", 1000 * seconds)

    def ragged(self, seconds: float) -> None:
        self._tell(
            f"{RAGGED} ragged prompts, {self.task['new_tokens']} new tokens each, s", seconds
        )

    def start(self, seconds: float) -> None:
        self._tell("start to 16th token, s", seconds)

    def compiling(self, seconds: float) -> None:
        self._tell("compiling, s", seconds)

    def memory(self) -> None:
        if self.task["device"].startswith("cuda"):
            free, total = torch.cuda.mem_get_info()
            self._tell("memory at the end, GB", (total - free) / 1e9)

    def _tell(self, name: str, number: float) -> None:
        self.numbers[name] = number
        print(json.dumps(self.numbers), flush=True)
