"""What this machine can do, and what a step must do: the two sides of "share of the limit".

Reading memory, multiplying matrices, memory in use, the age of this process. Refuses to know the
engine. The surprising thing: on a CPU no one way of reading is the fastest everywhere, so several
are tried and the best counts.

Letters: S tokens of a prompt, H query heads, E head size.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch

from llama.args import ModelArgs
from llama.names import shapes
from llama.quantization.packed import Format

# ---- what must be done


def decode_bytes(
    args: ModelArgs,
    dtype: torch.dtype,
    rows: int,
    length: float,
    formats: Mapping[str, Format] | None = None,
) -> float:
    """Bytes that a step of `rows` must read: all weights but the embedding table (the output matrix
    counts also where it is tied), and keys and values of `length` tokens a row. `formats`: of the
    matrices that are quantized."""
    packed = dict(formats or {})
    if args.tied and "tok_embeddings.weight" in packed:
        packed["output.weight"] = packed["tok_embeddings.weight"]
    weights = sum(
        packed[name].nbytes(*shape) if name in packed else prod(shape) * dtype.itemsize
        for name, shape in shapes(args).items()
        if name != "tok_embeddings.weight"
    )
    cache = rows * length * 2 * args.n_layers * args.n_kv_heads * args.head_dim
    return weights + cache * dtype.itemsize


def prefill_operations(args: ModelArgs, length: int) -> float:
    """Operations of a causal prompt of S tokens: 2 S for each number of the layers' matrices, and
    4 H E S^2 / 2 a layer for attention."""
    matrices = sum(
        prod(shape)
        for name, shape in shapes(args).items()
        if name.startswith("layers.") and len(shape) == 2
    )
    attention = args.n_layers * 4 * args.n_heads * args.head_dim * length**2 / 2
    return 2.0 * matrices * length + attention


# ---- what can be done


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second at which `device` reads about `size` bytes."""
    if device.type == "cuda":
        from llama.cuda.bandwidth import read_bandwidth as measure

        return measure(size, device)
    numbers = torch.empty(max(1, size // 8), dtype=torch.int64, device=device).fill_(1)
    floats = numbers.view(torch.float32)
    if device.type == "mps":
        return floats.nbytes / min(times(floats.sum, device, 4))
    ways: tuple[Callable[[], object], ...] = (
        numbers.amax, numbers.sum, floats.amax, floats.sum, lambda: torch.dot(floats, floats),
    )  # fmt: skip
    return numbers.nbytes / min(min(times(way, device, 3)) for way in ways)


def product_speed(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> float:
    """Operations per second of a matrix product of random numbers, n x k times k x m."""
    n, k, m = sizes
    a = torch.randn(n, k, device=device).to(dtype)
    b = torch.randn(k, m, device=device).to(dtype)
    c = torch.empty(n, m, device=device, dtype=dtype)
    at_once = 16 if device.type == "cuda" else 1

    def products() -> None:
        for _ in range(at_once):
            torch.mm(a, b, out=c)

    repeats = 9 if device.type == "cuda" else 3
    return 2.0 * n * k * m * at_once / statistics.median(times(products, device, repeats))


def times(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---- this process


def process_age() -> float | None:
    """Seconds since this process began, to about 10 ms; None where the system does not say."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2]
        ticks = int(after_name.split()[19])  # starttime, of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None


def release(device: torch.device) -> None:
    """Give back what the last engine held, so that the next one's memory is its own."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def memory_in_use(device: torch.device) -> int | None:
    """Bytes in use: of the device as its driver says, of this process on a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
