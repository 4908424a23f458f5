"""`info`: what lies in a folder of weights, and what running it would take.

Refuses to run it. The surprising thing: `inspect` reads no weights and touches no GPU, so
it answers at once for any model, also for one that this machine could never hold.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from llama.args import RopeScaling
from llama.commands.common import say
from llama.loading import Prepared, prepare
from llama.loading.memory import UNKNOWN, free_memory
from llama.loading.plan import check, is_mapped, make_plan
from llama.loading.settings import CHUNK_ROWS, dtype_name
from llama.parallel import Ranks
from llama.quantization import check_ranks
from llama.quantization.packed import Format


def info(
    ckpt_dir: str,
    *,
    max_batch_size: int = 1,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    model_parallel_size: int = 1,
    quantize: str | None = None,
) -> None:
    """Say what lies in a folder of weights, and what running it would take.

    Reads no weights and touches no GPU. Ends with status 1 where main memory does not suffice.

        python -m llama info llama/demo --max_batch_size 4

    Args:
        model_parallel_size: processes that share the model.
    """
    report = inspect(ckpt_dir, max_batch_size, max_seq_len, dtype, model_parallel_size, quantize)
    say(report.rows)
    if not report.fits:
        sys.exit(1)


class Report(NamedTuple):
    """Words by title, and whether main memory suffices for what was asked."""

    rows: dict[str, str]
    fits: bool


def inspect(
    ckpt_dir: str,
    max_batch_size: int,
    max_seq_len: int | None,
    dtype: str | None,
    model_parallel_size: int,
    quantize: str | None,
) -> Report:
    """What `info` says; arguments as of Llama.build. ValueError where build would raise one for
    them, but for memory: that is a row."""
    prepared = prepare(
        ckpt_dir,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        device="cpu",
        dtype=dtype,
        quantize=quantize,
    )
    checkpoint, args = prepared.checkpoint, prepared.checkpoint.args
    if model_parallel_size not in args.rank_counts():
        raise ValueError(
            f"model_parallel_size={model_parallel_size}: these numbers of ranks can share this "
            f"model: {args.rank_counts()}"
        )
    check_ranks(prepared.formats, args, model_parallel_size)
    memory = _memory(prepared, model_parallel_size)
    rows = {
        "family": checkpoint.family,
        "parameters": f"{checkpoint.parameters:,}",
        "on disk": f"{checkpoint.shards} shard{'s' * (checkpoint.shards > 1)}, "
        f"{checkpoint.stored or dtype_name(checkpoint.dtype)}",
        "context": f"{args.context_length} tokens",
        "rope scaling": _scaling(args.rope_scaling),
        "ranks that work": ", ".join(map(str, args.rank_counts())),
    }
    return Report(rows | memory.rows, memory.fits)


def _memory(prepared: Prepared, size: int) -> Report:
    """Rows on the memory of each of `size` ranks, on a GPU and on a CPU."""
    args, cpu = prepared.checkpoint.args, torch.device("cpu")
    formats, dtype = prepared.formats, prepared.dtype
    limits = f"max_batch_size {args.max_batch_size}, max_seq_len {args.max_seq_len}"
    plans = [
        make_plan(
            args,
            dtype=dtype,
            ranks=size,
            max_batch_size=args.max_batch_size,
            max_seq_len=args.max_seq_len,
            chunk=CHUNK_ROWS,
            device=device.type,
            formats=formats,
        )
        for device in (torch.device("cuda"), cpu)
    ]
    mapped = is_mapped(prepared.checkpoint, Ranks(0, size), cpu, dtype, formats)
    on_cpu = replace(plans[1], mapped=mapped)
    free = free_memory(cpu, size)
    try:
        check(on_cpu, free, cpu)
        verdict, fits = "fits", True
    except ValueError as error:
        verdict, fits = str(error), False
    known = f"{free / 2**30:.2f} GiB free for each rank: {verdict}"
    rows = {
        "each rank": f"{_kinds(formats, dtype)}, {limits}, ranks {size}",
        "  on a GPU": str(plans[0]),
        "  on a CPU": str(on_cpu),
        "main memory": "how much is free is not known here" if free * size >= UNKNOWN else known,
    }
    return Report(rows, fits)


def _kinds(formats: Mapping[str, Format], dtype: torch.dtype) -> str:
    """What the weights will be held as."""
    return ", ".join([*sorted({str(format) for format in formats.values()}), dtype_name(dtype)])


def _scaling(scaling: RopeScaling | None) -> str:
    if scaling is None:
        return "none"
    if scaling.factors is not None:
        return f"a factor for each pair, {min(scaling.factors):g} to {max(scaling.factors):g}"
    return (
        f"factor {scaling.factor:g}, low {scaling.low_freq_factor:g}, "
        f"high {scaling.high_freq_factor:g}, original context {scaling.original_context}"
    )
