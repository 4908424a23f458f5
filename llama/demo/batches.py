"""Documents to the flat batches that the model is trained on.

It refuses to know the model. The surprising thing: a batch is a function of (seed, its number) and
of nothing else, so any number of processes may make batches and training stays the same; and no
batch is seen twice.
"""

from __future__ import annotations

import multiprocessing
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama.demo.world.corpus import training_documents
from llama.tokenizer import ChatFormat, Dialog, Tokenizer

LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
ANSWER, PASSAGE, QUESTION = 1.0, 0.6, 0.2  # how much a token counts in the loss, by whose it is


@dataclass(frozen=True)
class Rows:
    """Sequences one after the other, each padded to one of LENGTHS; equally long ones together."""

    inputs: NDArray[np.int32]  # (N,)
    targets: NDArray[np.int32]  # (N,)
    weights: NDArray[np.float32]  # (N,), 0 where padded
    counts: list[int]  # tokens of each sequence


class Encoder:
    """Whole documents to ids, as ChatFormat writes them, but each role's header is encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        chat = ChatFormat(tokenizer)
        self.tokenizer = tokenizer
        self.headers = {
            role: chat.encode_header({"role": role, "content": ""}) for role in chat.roles
        }
        self.eot = tokenizer.special_tokens["<|eot_id|>"]

    def __call__(self, document: Dialog | str) -> tuple[list[int], list[float]]:
        """Ids of a document, and the weight of each as something to be predicted."""
        if isinstance(document, str):
            ids = self.tokenizer.encode(document, bos=True, eos=True)
            return ids, [PASSAGE] * len(ids)
        ids, weights = [self.tokenizer.bos_id], [0.0]
        for message in document:
            header = self.headers[message["role"]]
            content = self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
            ids += [*header, *content, self.eot]
            said = ANSWER if message["role"] == "assistant" else QUESTION
            weights += [QUESTION] * len(header) + [said] * (len(content) + 1)
        return ids, weights


def rows(documents: Iterable[Dialog | str], encode: Encoder, tokens: int) -> Rows:
    """The first documents that fill about `tokens` tokens, cut where they exceed the context."""
    buckets: dict[int, list[tuple[list[int], list[float]]]] = {length: [] for length in LENGTHS}
    filled = 0
    for document in documents:
        ids, weights = encode(document)
        ids, weights = ids[: LENGTHS[-1] + 1], weights[: LENGTHS[-1] + 1]
        length = LENGTHS[bisect_left(LENGTHS, len(ids) - 1)]
        buckets[length].append((ids, weights))
        filled += length
        if filled >= tokens:
            break
    counts = [length for length, bucket in buckets.items() for _ in bucket]
    inputs, targets = np.zeros(filled, np.int32), np.zeros(filled, np.int32)
    weight, at = np.zeros(filled, np.float32), 0
    for length, bucket in buckets.items():
        for ids, weights in bucket:
            n = len(ids) - 1
            inputs[at : at + n], targets[at : at + n] = ids[:-1], ids[1:]
            weight[at : at + n] = weights[1:]
            at += length
    return Rows(inputs, targets, weight, counts)


class Maker:
    """Makes batch number i. It is a class, so that processes can be handed one."""

    def __init__(self, tokenizer_path: Path, seed: int, tokens: int) -> None:
        self.tokenizer_path, self.seed, self.tokens = tokenizer_path, seed, tokens
        self.encode: Encoder | None = None

    def __call__(self, number: int) -> Rows:
        self.encode = self.encode or Encoder(Tokenizer(self.tokenizer_path))
        return rows(training_documents(f"{self.seed} {number}"), self.encode, self.tokens)


_maker: Maker | None = None


def _start(maker: Maker) -> None:
    global _maker
    _maker = maker


def _make(number: int) -> Rows:
    assert _maker is not None
    return _maker(number)


def stream(maker: Maker, steps: int, processes: int) -> Iterator[Rows]:
    """Batches 0 .. steps - 1 in order, made by that many processes; 0 means by this one."""
    if processes == 0:
        yield from map(maker, range(steps))
        return
    ahead = 4 * processes
    with multiprocessing.get_context("spawn").Pool(processes, _start, (maker,)) as pool:
        waiting = [pool.apply_async(_make, (i,)) for i in range(min(ahead, steps))]
        for i in count(ahead):
            if not waiting:
                return
            yield waiting.pop(0).get()
            if i < steps:
                waiting.append(pool.apply_async(_make, (i,)))
