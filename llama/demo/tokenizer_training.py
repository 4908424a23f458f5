"""Byte-level BPE trained on the demo's own text, written as a ranks file in tiktoken's format.

It refuses to know what the text says. The surprising thing: it learns less than it could.
No token holds two digits, so that sums are done digit by digit, and no token reaches across what
Llama 3's split pattern separates, since the tokenizer would never use it.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path

import regex

from llama.demo.world.corpus import training_documents
from llama.tokenizer import Tokenizer

Pair = tuple[bytes, bytes]


def train_ranks(texts: Iterable[str], n_ranks: int) -> list[bytes]:
    """The tokens in the order of their ranks: the 256 bytes, then one merge after the other.

    Each merge joins the most frequent pair of neighbours (Sennrich et al. 2016, arXiv 1508.07909);
    of equally frequent ones the smaller pair, so that the result depends on the text alone.
    """
    split = regex.compile(Tokenizer.pat_str)
    counts = Counter(piece for text in texts for piece in split.findall(text))
    pieces = [
        ([bytes([byte]) for byte in piece.encode()], count)
        for piece, count in counts.items()
        if not piece.isdigit()
    ]
    frequency: Counter[Pair] = Counter()
    pieces_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (tokens, count) in enumerate(pieces):
        for pair in pairwise(tokens):
            frequency[pair] += count
            pieces_with[pair].add(i)
    ranks = [bytes([byte]) for byte in range(256)]
    while len(ranks) < n_ranks:
        if not frequency:
            raise ValueError(f"the text yields {len(ranks)} ranks, {n_ranks} were asked for")
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        ranks.append(best[0] + best[1])
        for i in pieces_with.pop(best):
            _merge(pieces[i][0], best, pieces[i][1], i, frequency, pieces_with)
        del frequency[best]
    return ranks


def _merge(
    tokens: list[bytes],
    pair: Pair,
    count: int,
    index: int,
    frequency: Counter[Pair],
    pieces_with: defaultdict[Pair, set[int]],
) -> None:
    """Join `pair` wherever it stands in one piece, and keep the table of pairs true."""
    for old in pairwise(tokens):
        if old != pair:
            frequency[old] -= count
            if frequency[old] <= 0:
                del frequency[old]
    merged: list[bytes] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    tokens[:] = merged
    for new in pairwise(tokens):
        frequency[new] += count
        pieces_with[new].add(index)


def train_tokenizer(path: Path, n_ranks: int, documents: int) -> None:
    """Train on that many training documents, the names of the roles among them."""
    texts: list[str] = []
    for document in islice(training_documents("tokenizer"), documents):
        if isinstance(document, str):
            texts.append(document)
        else:
            texts += [text for m in document for text in (m["role"], "\n\n", m["content"])]
    write_ranks(train_ranks(texts, n_ranks), path)


def write_ranks(ranks: Iterable[bytes], path: Path) -> None:
    """A line is base64 of the bytes, a space, the rank."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    path.write_text("".join(lines), encoding="ascii")
