"""The memory that a model will need on each rank, added up before anything is allocated.

Knows shapes and arithmetic, and how much each kind of device says is free; allocates nothing. The
surprising thing: weights on a CPU may be the mapped files, and then they are not counted as needed:
the system can drop those pages and read them again, which is slow but never fails.

Letters: N rows of a chunk, D dim, H query and K key/value heads of this rank, E head size, F hidden
size of this rank, V vocabulary, L keys, b bytes of a number.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch

from llama.args import ModelArgs
from llama.checkpoint.source import Checkpoint
from llama.loading.memory import free_memory
from llama.loading.place import mapped_parts
from llama.loading.settings import CHUNK_ROWS
from llama.names import groups, local_shape, shapes
from llama.parallel import Ranks, float32_block
from llama.quantization.packed import Format, local_format
from llama.quantization.recipe import recipes_for
from llama.sampling import AT_ONCE, BYTES_AT_ONCE, SHIFTED_ROWS

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes on one rank, by part, and what they were computed from."""

    args: ModelArgs
    dtype: torch.dtype
    ranks: int
    max_batch_size: int
    max_seq_len: int
    chunk: int
    logits_rows: int
    cache_dtype: torch.dtype
    mapped: bool  # the weights are mapped files
    device: str  # its type
    kernels: bool = True  # those of llama.cuda, where they can run
    flash: bool = True  # torch has its kernel for grouped heads on this GPU
    formats: Mapping[str, Format] = field(default_factory=dict, repr=False)

    @property
    def weights(self) -> int:
        names = set(shapes(self.args)) - ({"output.weight"} if self.args.tied else set())
        return sum(self._bytes(name) for name in names)

    def _bytes(self, name: str) -> int:
        """Of a rank's part of one tensor."""
        shape, format = local_shape(name, self.args, self.ranks), self.formats.get(name)
        if format is None:
            return prod(shape) * self.dtype.itemsize
        local = local_format(name, format, self.args, self.ranks)
        assert local is not None, (name, format, self.ranks)
        return local.nbytes(shape[0], shape[1])

    @property
    def cache_per_token(self) -> int:
        """Keys and values of one position of one sequence, in all layers."""
        kv_heads = max(1, self.args.n_kv_heads // self.ranks)
        return 2 * self.args.n_layers * kv_heads * self.args.head_dim * self.cache_dtype.itemsize

    @property
    def cache(self) -> int:
        return self.cache_per_token * self.max_batch_size * self.max_seq_len

    @property
    def workspace_per_key(self) -> int:
        """What attention of a chunk holds for each key of the longest sequence.

        Keys and values repeated for the heads that share them, 2 H E b, and a mask, N (b + 1),
        where no kernel does without: torch's flash attention does, in half precision.
        """
        queries = self.args.n_heads // self.ranks * self.args.head_dim
        repeated, mask = 2 * queries * self.dtype.itemsize, self.rows * (self.dtype.itemsize + 1)
        if self.device != "cuda":
            return repeated + mask
        if self.captured and self.dtype == torch.float32:
            return repeated  # of head sizes that kernels do not take
        half = self.dtype != torch.float32 and self.args.head_dim <= 256
        return 0 if half and self.flash and self.args.head_dim % 8 == 0 else repeated + mask

    @property
    def captured(self) -> bool:
        """Whether steps are captured, with tensors that stay for as long as the engine does."""
        return self.kernels and self.device == "cuda" and self.ranks == 1

    @property
    def choosing(self) -> int:
        """What the choice of a token for every row holds for as long as it takes.

        R rows V of logits, 4 bytes each, and what a few rows of them take while they are chosen
        from, see `llama.sampling.sample`.
        """
        every = self.max_batch_size * self.args.vocab_size
        return 4 * every + BYTES_AT_ONCE * min(every, max(AT_ONCE, self.args.vocab_size))

    @property
    def kept(self) -> int:
        """What captured steps keep: logits, counts and biases of all rows, and what the choice for
        some of them takes, see llama/cuda/sampling/full.py."""
        vocab = self.args.vocab_size
        slices = BYTES_AT_ONCE * min(SHIFTED_ROWS, self.max_batch_size) * vocab
        return 12 * self.max_batch_size * vocab + slices if self.captured else 0

    @property
    def rows(self) -> int:
        return min(self.chunk, self.max_seq_len * self.max_batch_size)

    @property
    def workspace(self) -> int:
        """An upper estimate of what a step of N rows holds beside weights and cache.

        What captured steps keep, and the largest of what comes one after the other: attention N (2
        D b + 8 D + 3 (H + 2 K) E b + 12 H E) + workspace_per_key L, feed-forward N (2 D b + 8 D + 3
        F b), and beside N D b of states M V (b + 8) for a slice of M logits, or the choice of
        tokens. Float32 copies of states and queries are the terms without b.
        """
        args, b = self.args, self.dtype.itemsize
        queries = args.n_heads // self.ranks * args.head_dim
        keys = max(1, args.n_kv_heads // self.ranks) * args.head_dim
        states = args.dim * (2 * b + 8)
        attention = self.rows * (states + 3 * b * (queries + 2 * keys) + 12 * queries)
        feed_forward = self.rows * (states + 3 * b * (args.hidden_dim // self.ranks))
        logits = min(self.logits_rows, self.rows) * args.vocab_size * (b + 8)
        after = 2 * self.rows * args.dim * b + max(logits, self.choosing) + 4 * self.blocks
        return self.kept + max(
            attention + self.workspace_per_key * self.max_seq_len, feed_forward, after
        )

    @property
    def blocks(self) -> int:
        """Numbers of the output matrix that are made float32 at a time, where products of half
        precision cannot sum into it."""
        if self.device == "cuda" or self.dtype == torch.float32:
            return 0
        return min(float32_block(self.device), self.args.vocab_size * self.args.dim)

    @property
    def unpacked(self) -> int:
        """What a GPU's products of many rows unpack at once: at most 2^25 numbers of a matrix with
        kernels, 2^24 without, which are float32 and bytes before they are of the weights' dtype.
        """
        if self.device != "cuda" or not self.formats:
            return 0
        if not self.captured:
            largest = max(prod(local_shape(n, self.args, self.ranks)) for n in self.formats)
            return min(largest, 2**24) * (self.dtype.itemsize + 9)
        every = shapes(self.args)
        sizes = []
        for group in groups(self.args):
            if group[0] in self.formats and group[0] != "tok_embeddings.weight":
                columns = every[group[0]][1]
                rows = sum(every[name][0] for name in group)
                sizes.append(columns * min(rows, max(1, 2**25 // columns)))
        return max(sizes, default=0) * self.dtype.itemsize

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace + self.unpacked

    @property
    def needed(self) -> int:
        """The total without mapped weights: what must be free."""
        return self.total - (self.weights if self.mapped else 0)

    def __str__(self) -> str:
        held = "weights (mapped)" if self.mapped else "weights"
        return (
            f"{_gib(self.weights)} {held} + {_gib(self.cache)} cache + "
            f"{_gib(self.workspace + self.unpacked)} workspace = {_gib(self.total)}"
        )

    def longest(self, free: int) -> int:
        """The largest max_seq_len, up to the model's context, that fits at this max_batch_size."""
        return _largest(
            lambda n: replace(self, max_seq_len=n).needed <= free, self.args.context_length
        )

    def widest(self, free: int) -> int:
        """The largest max_batch_size that fits at this max_seq_len."""
        return _largest(lambda n: replace(self, max_batch_size=n).needed <= free, 2**16)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` that fits, 0 where not even 1 does; what fits is a beginning."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _gib(size: int) -> str:
    if size < GIB:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"


def make_plan(
    args: ModelArgs,
    *,
    dtype: torch.dtype,
    ranks: Ranks | int = 1,
    max_batch_size: int = 1,
    max_seq_len: int | None = None,
    chunk: int = 512,
    logits_rows: int = 256,
    cache_dtype: torch.dtype | None = None,
    mapped: bool = False,
    device: str = "cpu",
    kernels: bool = True,
    flash: bool = True,
    formats: Mapping[str, Format] | None = None,
) -> Plan:
    """The plan of one of `ranks`; max_seq_len=None is the model's context.

    chunk: the most rows of one forward pass; logits_rows: the most logits computed at once; mapped:
    the weights stay in their files; device: its type; kernels: whether those of llama.cuda run
    where they can; flash: whether torch has its flash attention on this GPU; formats: of the
    matrices that are quantized. Raises ValueError where the model cannot be cut so.
    """
    size = ranks if isinstance(ranks, int) else ranks.size
    if size not in args.rank_counts():
        raise ValueError(
            f"{size} ranks cannot share this model, these numbers can: {args.rank_counts()}"
        )
    length = args.context_length if max_seq_len is None else max_seq_len
    for name, value in (("max_batch_size", max_batch_size), ("max_seq_len", length)):
        if value < 1:
            raise ValueError(f"{name}={value}: needs to be at least 1")
    return Plan(
        args=args,
        dtype=dtype,
        ranks=size,
        max_batch_size=max_batch_size,
        max_seq_len=length,
        chunk=chunk,
        logits_rows=logits_rows,
        cache_dtype=cache_dtype or dtype,
        mapped=mapped,
        device=device,
        kernels=kernels,
        flash=flash,
        formats=formats or {},
    )


def check(plan: Plan, free: int, device: torch.device | str) -> None:
    """Raise ValueError where `plan` needs more than the `free` bytes of `device`, naming what fits.

    Warns where mapped weights will not stay in memory, and where a device's weights pass through a
    host that has hardly any left.
    """
    device = torch.device(device)
    if plan.needed > free:
        raise ValueError(
            f"not enough memory on {device}: max_batch_size={plan.max_batch_size} x max_seq_len="
            f"{plan.max_seq_len} needs {plan}, and {_gib(free)} are free; {_advice(plan, free)}"
            f"{_quantized(plan, free)}"
        )
    if plan.total > free:
        logger.warning(
            "the weights (%s) stay in their files and do not fit beside the rest in %s of free "
            "memory: they will be read from disk again and again",
            _gib(plan.weights),
            _gib(free),
        )
    if device.type != "cpu" and (host := free_memory("cpu")) < GIB:
        logger.warning("only %s of host memory are free for loading weights", _gib(host))


def check_memory(
    checkpoint: Checkpoint,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    formats: Mapping[str, Format] | None = None,
    kernels: bool = True,
    chunk: int = CHUNK_ROWS,
) -> Plan:
    """`check` for a checkpoint whose args hold the limits of the run, against what is free now.

    `formats` of matrices that will be packed; None: those that are stored so. `kernels` as in
    `Llama.build`. The ranks of a CPU run are taken to share this machine's memory. Returns the
    plan.
    """
    args = checkpoint.args
    chosen = checkpoint.formats if formats is None else formats
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    plan = make_plan(
        args,
        dtype=dtype,
        ranks=ranks,
        max_batch_size=args.max_batch_size,
        max_seq_len=args.max_seq_len,
        chunk=chunk,
        mapped=is_mapped(checkpoint, ranks, device, dtype, chosen),
        device=device.type,
        kernels=kernels and not old,
        flash=not old,
        formats=chosen,
    )
    check(plan, free_memory(device, ranks.size if device.type == "cpu" else 1), device)
    return plan


def is_mapped(
    checkpoint: Checkpoint,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    formats: Mapping[str, Format],
) -> bool:
    """Whether all weights can stay in their files, as they lie there."""
    packed = [name for name, format in formats.items() if checkpoint.formats.get(name) == format]
    if len(packed) < len(formats) or (packed and ranks.size > 1):
        return False
    names = [name for name in checkpoint.tensors if name not in formats]
    return mapped_parts(checkpoint, names, ranks, device, dtype) is not None


def _quantized(plan: Plan, free: int) -> str:
    """What would fit as it was asked for, in other words: the finest recipe with which it would."""
    for name, formats in recipes_for(plan.args).items():
        fits = all(local_format(n, f, plan.args, plan.ranks) for n, f in formats.items())
        smaller = replace(plan, formats=formats, mapped=False) if fits else plan
        if smaller.needed < plan.needed and smaller.needed <= free:
            return f"; quantize={name!r} would fit, at {_gib(smaller.needed)}"
    return ""


def _advice(plan: Plan, free: int) -> str:
    """What would fit instead, longest sequence and largest batch first."""
    choices = []
    if length := plan.longest(free):
        choices.append(f"max_seq_len={length} at this max_batch_size")
    if batch := plan.widest(free):
        choices.append(f"max_batch_size={batch} at this max_seq_len")
    if not choices and (length := replace(plan, max_batch_size=1).longest(free)):
        choices.append(f"max_batch_size=1 with max_seq_len={length}")
    if choices:
        return "what fits: " + ", or ".join(choices)
    least = replace(plan, max_batch_size=1, max_seq_len=min(512, plan.max_seq_len))
    for ranks in plan.args.rank_counts():
        if ranks > plan.ranks and replace(least, ranks=ranks).needed <= free:
            return f"{ranks} ranks with as much memory each would hold the weights"
    smallest = _gib(least.needed)
    return f"no size fits: at least {smallest} must be free, or a smaller model is needed"
