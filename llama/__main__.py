"""`python -m llama COMMAND ...`: one function a command, through fire.

Refuses to know how anything is done: a command asks the rooms below and prints what they say. The
surprising thing: `info` reads no weights and touches no GPU, so it answers at once for any model,
also for one that this machine could never hold.
"""

import sys
from dataclasses import replace

import torch

from llama import cli
from llama.checkpoint import (
    Checkpoint,
    check,
    free_memory,
    make_plan,
    merge_adapter,
    open_checkpoint,
    write_hf,
    write_meta,
)
from llama.checkpoint.source import mapped_parts
from llama.generation import as_dtype, chunk_rows, open_tokenizer, with_limits
from llama.model import RopeScaling
from llama.parallel import Ranks
from llama.templates import choose_format
from llama.tokenizer import ChatFormat
from llama.tokenizer_json import ranks_file


def info(
    ckpt_dir: str,
    max_batch_size: int = 1,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    model_parallel_size: int = 1,
) -> None:
    """Say what lies in a folder of weights, and what running it would take.

    Args:
        ckpt_dir: folder of weights, Meta's files or Hugging Face's.
        max_batch_size: sequences that run at one time.
        max_seq_len: tokens of a sequence, prompt and answer; what Llama.build takes by default.
        dtype: float32, bfloat16 or float16; the checkpoint's own by default.
        model_parallel_size: processes that share the model.
    """
    checkpoint = open_checkpoint(ckpt_dir)
    kind = as_dtype(dtype) or checkpoint.dtype
    args = with_limits(checkpoint.args, max_batch_size, max_seq_len)
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


def convert(
    src: str,
    dst: str,
    format: str,
    shards: int = 1,
    dtype: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write a model in another format.

    Args:
        src: folder of weights in any format that is read.
        dst: folder to write to, without weights.
        format: meta (params.json and consolidated.NN.pth) or hf (Hugging Face's).
        shards: number of files of weights; of format meta only.
        dtype: bf16, f16 or f32; the checkpoint's own by default.
        adapter: folder of a LoRA adapter, which is added.
    """
    if format not in _WRITERS:
        raise ValueError(f"format {format!r}: use one of {', '.join(_WRITERS)}")
    if shards != 1 and format != "meta":
        raise ValueError(f"shards={shards}: files of format {format} are not cut in that way")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: use one of {', '.join(_DTYPES)}")
    checkpoint = open_checkpoint(src)
    if adapter is not None:
        checkpoint = merge_adapter(checkpoint, adapter)
    if checkpoint.tokenizer_path is None:
        print(f"{src} has no tokenizer: none is written", file=sys.stderr)
    _WRITERS[format](checkpoint, dst, shards, _DTYPES.get(dtype or ""))
    print(f"{dst}: {checkpoint.parameters:,} parameters")


def _write_meta(checkpoint: Checkpoint, dst: str, shards: int, dtype: torch.dtype | None) -> None:
    path, ranks = checkpoint.tokenizer_path, None
    if path is not None:
        tokenizer = open_tokenizer(path, checkpoint)
        ranks = path.read_bytes() if path.suffix == ".model" else ranks_file(tokenizer)
        ours = isinstance(choose_format(tokenizer, checkpoint.chat_template), ChatFormat)
        if not ours or set(checkpoint.stop_token_ids) - tokenizer.stop_tokens:
            print("Meta's files do not hold chat template and stop tokens", file=sys.stderr)
    write_meta(checkpoint, dst, shards=shards, dtype=dtype, tokenizer=ranks, show_progress=True)


def _write_hf(checkpoint: Checkpoint, dst: str, shards: int, dtype: torch.dtype | None) -> None:
    path = checkpoint.tokenizer_path
    tokenizer = None if path is None else open_tokenizer(path, checkpoint)
    write_hf(checkpoint, dst, dtype=dtype, tokenizer=tokenizer, show_progress=True)


_WRITERS = {"meta": _write_meta, "hf": _write_hf}
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


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


COMMANDS: dict[str, cli.Command] = {"info": info, "convert": convert}


def main() -> None:
    if len(sys.argv) > 1:
        return cli.run(COMMANDS, "python -m llama")
    print("python -m llama COMMAND ...   (COMMAND --help says more)")
    for name, command in COMMANDS.items():
        print(f"  {name:8}  {(command.__doc__ or '').splitlines()[0]}")


if __name__ == "__main__":
    main()
