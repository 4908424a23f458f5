"""The one table of names: every tensor of a Llama, its shape, and where shards and ranks cut it.

The canonical names are those in Meta's files, which are the module names in Transformer. Knows no
file, no dtype and no tensor. The surprising thing: shards on disk and ranks in memory cut the same
dimension, but not always at the same rows: a rank never gets a part of a key/value head, and the
vocabulary's last part may be short.

Letters: V vocabulary, D dim, Q query heads x head size, K key/value heads x head size, F hidden.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from llama.args import ModelArgs


class _Entry(NamedTuple):
    letters: str  # of the dimensions, see the legend above
    cut: int | None  # the dimension that shards and ranks cut; None: whole everywhere


_MODEL = {
    "tok_embeddings.weight": _Entry("VD", 0),
    "norm.weight": _Entry("D", None),
    "output.weight": _Entry("VD", 0),
}
_LAYER = {
    "attention.wq.weight": _Entry("QD", 0),
    "attention.wk.weight": _Entry("KD", 0),
    "attention.wv.weight": _Entry("KD", 0),
    "attention.wo.weight": _Entry("DQ", 1),
    "feed_forward.w1.weight": _Entry("FD", 0),
    "feed_forward.w3.weight": _Entry("FD", 0),
    "feed_forward.w2.weight": _Entry("DF", 1),
    "attention_norm.weight": _Entry("D", None),
    "ffn_norm.weight": _Entry("D", None),
}
# Rows of these lie one below the other in one storage, so that one product can compute them all.
_FUSED = (
    ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    ("feed_forward.w1.weight", "feed_forward.w3.weight"),
)


def ignored(name: str) -> str | None:
    """The reason why a tensor of Meta's files is not read; None where it is read."""
    if re.fullmatch(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs", name):
        return "derived from rope_theta"
    return None


def _entry(name: str) -> _Entry:
    part = name.split(".", 2)[2] if name.startswith("layers.") else name
    return _LAYER[part] if name.startswith("layers.") else _MODEL[part]


def _sizes(args: ModelArgs) -> dict[str, int]:
    return {
        "V": args.vocab_size,
        "D": args.dim,
        "Q": args.n_heads * args.head_dim,
        "K": args.n_kv_heads * args.head_dim,
        "F": args.hidden_dim,
    }


def shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The full shape of every tensor, in the model's order; output.weight also where it is tied."""
    sizes = _sizes(args)
    names = ["tok_embeddings.weight"]
    names += [f"layers.{i}.{part}" for i in range(args.n_layers) for part in _LAYER]
    names += ["norm.weight", "output.weight"]
    return {name: tuple(sizes[letter] for letter in _entry(name).letters) for name in names}


def groups(args: ModelArgs) -> Iterator[tuple[str, ...]]:
    """Yield every name once, in the model's order; names that share one storage come together."""
    follower = {part: fused[0] for fused in _FUSED for part in fused}
    fused = {parts[0]: parts for parts in _FUSED}
    for name in shapes(args):
        if not name.startswith("layers."):
            yield (name,)
            continue
        layer, part = name[: -len(name.split(".", 2)[2])], name.split(".", 2)[2]
        if follower.get(part, part) == part:
            yield tuple(layer + each for each in fused.get(part, (part,)))


def shard_dim(name: str) -> int | None:
    """The dimension that Meta's shards and our ranks cut; None for norms, which are whole."""
    return _entry(name).cut


def local_slice(name: str, args: ModelArgs, rank: int, size: int) -> tuple[int, int, int] | None:
    """(dimension, start, stop) of the part that rank `rank` of `size` holds; None means the whole.

    Where there are more ranks than key/value heads, neighbours hold the same head. The vocabulary
    is cut in parts of ceil(V / size) rows, of which the last may be short or even empty.
    """
    letters, cut = _entry(name)
    if cut is None:
        return None
    letter, total = letters[cut], _sizes(args)[letters[cut]]
    if letter == "K":
        head = rank * args.n_kv_heads // size
        heads = max(1, args.n_kv_heads // size)
        return cut, head * args.head_dim, (head + heads) * args.head_dim
    part = -(-total // size)
    assert letter == "V" or part * size == total, (name, total, size)
    return cut, min(rank * part, total), min((rank + 1) * part, total)


def local_shape(name: str, args: ModelArgs, size: int) -> tuple[int, ...]:
    """The shape of a rank's parameter, the same on each of `size` ranks: padding included."""
    letters, cut = _entry(name)
    shape = [_sizes(args)[letter] for letter in letters]
    if cut is not None and letters[cut] == "K":
        shape[cut] = max(1, args.n_kv_heads // size) * args.head_dim
    elif cut is not None:
        shape[cut] = -(-shape[cut] // size)
    return tuple(shape)
