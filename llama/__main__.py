"""`python -m llama COMMAND ...`: one function a command, through fire.

Refuses to know how anything is done: a command asks the rooms below and prints what they say. The
surprising thing: `info` reads no weights and touches no GPU, so it answers at once for any model,
also for one that this machine could never hold.
"""

import sys
from dataclasses import replace

import torch

from llama import cli
from llama.checkpoint import Checkpoint, check, free_memory, make_plan, open_checkpoint
from llama.checkpoint.source import mapped_parts
from llama.generation import as_dtype, chunk_rows, with_limits
from llama.model import RopeScaling
from llama.parallel import Ranks


def info(
    ckpt_dir: str,
    max_batch_size: int = 1,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    model_parallel_size: int = 1,
) -> None:
    """Say what lies in a folder of weights, and what running it would take.

    Args:
        ckpt_dir: folder with params.json and consolidated.NN.pth.
        max_batch_size: sequences that run at one time.
        max_seq_len: tokens of a sequence, prompt and answer; what Llama.build takes by default.
        dtype: float32, bfloat16 or float16; the checkpoint's own by default.
        model_parallel_size: processes that share the model.
    """
    checkpoint = open_checkpoint(ckpt_dir)
    kind = as_dtype(dtype) or checkpoint.dtype
    args = with_limits(checkpoint.args, max_batch_size, max_seq_len)
    if model_parallel_size not in args.rank_counts():
        raise ValueError(
            f"model_parallel_size={model_parallel_size}: these numbers of ranks can share this "
            f"model: {args.rank_counts()}"
        )
    rows = {
        "family": checkpoint.family,
        "parameters": f"{checkpoint.parameters:,}",
        "on disk": f"{checkpoint.shards} shard{'s' * (checkpoint.shards > 1)}, "
        f"{_name(checkpoint.dtype)}",
        "context": f"{args.context_length} tokens",
        "rope scaling": _scaling(args.rope_scaling),
        "ranks that work": ", ".join(map(str, args.rank_counts())),
    } | _memory(replace(checkpoint, args=args), kind, model_parallel_size)
    for title, text in rows.items():
        print(f"{title:15}  {text}")


def _memory(checkpoint: Checkpoint, dtype: torch.dtype, size: int) -> dict[str, str]:
    """Rows on the memory of each of `size` ranks, on a GPU and on a CPU."""
    args, cpu = checkpoint.args, torch.device("cpu")
    limits = f"max_batch_size {args.max_batch_size}, max_seq_len {args.max_seq_len}"
    plans = [
        make_plan(
            args,
            dtype=dtype,
            ranks=size,
            max_batch_size=args.max_batch_size,
            max_seq_len=args.max_seq_len,
            chunk=chunk_rows(device),
            device=device.type,
        )
        for device in (torch.device("cuda"), cpu)
    ]
    names = list(checkpoint.tensors)
    mapped = mapped_parts(checkpoint, names, Ranks(0, size), cpu, dtype) is not None
    on_cpu = replace(plans[1], mapped=mapped)
    free = free_memory(cpu, size)
    try:
        check(on_cpu, free, cpu)
        verdict = "fits"
    except ValueError as error:
        verdict = str(error)
    return {
        "each rank": f"{_name(dtype)}, {limits}, ranks {size}",
        "  on a GPU": str(plans[0]),
        "  on a CPU": str(on_cpu),
        "main memory": f"{free / 2**30:.2f} GiB free for each rank: {verdict}",
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scaling(scaling: RopeScaling | None) -> str:
    if scaling is None:
        return "none"
    return (
        f"factor {scaling.factor:g}, low {scaling.low_freq_factor:g}, "
        f"high {scaling.high_freq_factor:g}, original context {scaling.original_context}"
    )


COMMANDS = {"info": info}


def main() -> None:
    if len(sys.argv) > 1:
        return cli.run(COMMANDS, "python -m llama")
    print("python -m llama COMMAND ...   (COMMAND --help says more; --debug shows tracebacks)")
    for name, command in COMMANDS.items():
        print(f"  {name:8}  {(command.__doc__ or '').splitlines()[0]}")


if __name__ == "__main__":
    main()
