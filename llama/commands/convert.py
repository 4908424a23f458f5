"""`convert`, `reshard` and `quantize`: a model written anew. The last two are short names of uses.

Ties the writers of formats to what was asked for; refuses to know how any of them writes.
"""

import torch

from llama.checkpoint import convert as write_format
from llama.checkpoint import merge_adapter, open_checkpoint, write_quantized
from llama.checkpoint import reshard as write_shards
from llama.checkpoint.convert import TYPES
from llama.checkpoint.source import Checkpoint
from llama.loading.settings import as_dtype, dtype_name
from llama.parallel import local_device


def convert(
    ckpt_dir: str,
    dst: str,
    to: str,
    *,
    shards: int = 1,
    quantize: str | None = None,
    dtype: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
) -> None:
    """Write a model, and its tokenizer, in another format.

    With --shards it does what reshard does, and with --quantize what quantize does. An interrupted
    run leaves nothing that looks finished.

        python -m llama convert llama/demo demo-hf --to hf
        python -m llama convert demo-hf demo-meta --to meta --shards 2 --dtype bfloat16
        python -m llama convert llama/demo demo-int4 --to meta --quantize int4
        python -m llama convert llama/demo demo.gguf --to gguf --quantize q8_0

    Args:
        dst: a new folder, which appears when everything in it is whole; for gguf, a new file.
        to: meta (params.json and consolidated.NN.pth), hf (Hugging Face's) or gguf.
        shards: how many files, in Meta's format.
        quantize: for meta int8, fp8, int4, mixed, or formats by part of the model, as JSON: the
            folder then has quantized.safetensors in place of consolidated.NN.pth; for gguf q8_0 or
            q4_0. By default nothing is quantized.
        adapter: folder of a LoRA adapter, which is added to the weights.
        device: what quantizes to int8, fp8, int4 or mixed, as for quantize.
    """
    kind = as_dtype(dtype)
    packs = to == "meta" and quantize is not None
    _check(to, quantize, packs, shards, dtype, device)
    checkpoint = open_checkpoint(ckpt_dir)
    if adapter is not None:
        checkpoint = merge_adapter(checkpoint, adapter)
    if packs:
        assert quantize is not None
        _write_quantized(checkpoint, dst, quantize, device)
        return
    write_format(checkpoint, dst, to, shards=shards, dtype=kind, type=quantize, show_progress=True)
    what = quantize or dtype_name(kind or checkpoint.dtype)
    print(f"{dst}: {checkpoint.parameters:,} parameters, {what}")


def _check(
    to: str,
    quantize: str | None,
    packs: bool,
    shards: int,
    dtype: str | None,
    device: str | None,
) -> None:
    """ValueError for options that do not go together, before anything is opened."""
    if to not in ("meta", "hf", "gguf"):
        raise ValueError(f"format {to!r}: use one of meta, hf, gguf")
    if to == "hf" and quantize is not None:
        raise ValueError(f"quantize={quantize!r}: hf is written unquantized; use meta or gguf")
    if to == "gguf" and quantize is not None and quantize not in TYPES:
        raise ValueError(f"quantize={quantize!r}: for gguf use one of {', '.join(TYPES)}")
    if packs and shards != 1:
        raise ValueError(
            f"shards={shards}: quantized weights are one file, which any number of processes share"
        )
    if packs and dtype is not None:
        raise ValueError(f"dtype={dtype!r}: beside quantized weights the checkpoint's own is kept")
    if not packs and device is not None:
        raise ValueError(f"device={device!r}: only --to meta with --quantize computes on one")


def reshard(ckpt_dir: str, dst: str, shards: int, *, dtype: str | None = None) -> None:
    """Write a model in another number of files, in Meta's format.

    The short name of `convert CKPT_DIR DST --to meta --shards N`.

        python -m llama reshard llama/demo demo-2 --shards 2
    """
    checkpoint = open_checkpoint(ckpt_dir)
    kind: torch.dtype | None = as_dtype(dtype)
    folder = write_shards(checkpoint, dst, shards=shards, dtype=kind, show_progress=True)
    size = sum(file.stat().st_size for file in folder.glob("consolidated.*.pth"))
    print(f"{folder}: {shards} shard{'s' * (shards > 1)}, {size:,} bytes")


def quantize(ckpt_dir: str, dst: str, quantize: str, *, device: str | None = None) -> None:
    """Write a model with quantized weights, which then load as they are.

    The short name of `convert CKPT_DIR DST --to meta --quantize RECIPE`. The tokenizer goes along.

        python -m llama quantize llama/demo demo-int4 --quantize int4

    Args:
        quantize: int8, fp8, int4, mixed, or formats by part of the model, as JSON.
    """
    _write_quantized(open_checkpoint(ckpt_dir), dst, quantize, device)


def _write_quantized(checkpoint: Checkpoint, dst: str, recipe: str, device: str | None) -> None:
    folder = write_quantized(
        checkpoint, dst, recipe, device=local_device(device), show_progress=True
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {checkpoint.parameters:,} parameters, {size:,} bytes")
