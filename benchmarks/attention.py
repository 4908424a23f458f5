"""How fast prefill's attention and its row kernels are, and which tiling of attention is best.

    python benchmarks/attention.py                 # heads of 128, as in the 8B
    python benchmarks/attention.py --head_dim 64

Needs one NVIDIA GPU. Prints causal TFLOP/s of `attend_prefill` for each tiling, with torch's own
attention beside it, then the time of each piece of a layer of the 8B shape. A tiling that does not
fit the GPU is named with its error. Put the best into LARGE in llama/cuda/attention/prefill.py.
"""

import statistics
from collections.abc import Callable

import fire
import torch
import torch.nn.functional as F

from llama.cache import Batch
from llama.cuda.attention.prefill import Tiling, attend_prefill, tile_table
from llama.cuda.norm_rope_gate import rms_norm, rotate_and_store, silu_multiply

HEADS, KV_HEADS, DIM, HIDDEN = 32, 8, 4096, 14336
TILINGS = [
    Tiling(rows, keys, warps, stages)
    for rows, keys, warps, stages in (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 32, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3),
    )
]  # fmt: skip
CASES = {
    "one of 2048": ([2048], [2048]),
    "one of 8192": ([8192], [8192]),
    "2048 more after 6144": ([2048], [8192]),
    "32 of 64..2048": ([64 * i for i in range(1, 33)],) * 2,
}


def milliseconds(function: Callable[[], object], repeats: int = 10) -> float:
    """The median time of a call on the GPU, whose caches are as the call before left them."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # so that launching is not what is measured
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def attention(head_dim: int) -> None:
    for name, (counts, lengths) in CASES.items():
        batch = Batch(counts, lengths, range(len(counts)), "cuda")
        shape = (len(counts), 8192, KV_HEADS, head_dim)
        k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        q = torch.randn(sum(counts), HEADS, head_dim, dtype=torch.bfloat16, device="cuda")
        out = torch.empty_like(q)
        pairs = sum(c * n - c * (c - 1) / 2 for c, n in zip(counts, lengths, strict=True))
        flops = 4 * HEADS * head_dim * pairs / 1e9
        if counts == lengths and len(counts) == 1:
            once = [t[None].transpose(1, 2) for t in (q, k[0, : len(q)], v[0, : len(q)])]
            time = milliseconds(
                lambda once=once: F.scaled_dot_product_attention(
                    *once, is_causal=True, enable_gqa=True
                )
            )
            print(f"{name}, torch: {time:.3f} ms, {flops / time:.0f} TFLOP/s", flush=True)
        for cut in TILINGS:
            tiles = tile_table(batch, HEADS // KV_HEADS, cut.rows)
            assert tiles is not None
            call = (q, k, v, tiles, out, cut)
            try:
                time = milliseconds(lambda call=call: attend_prefill(*call))
            except Exception as error:  # one that does not fit says so in many ways
                print(f"{name}, {tuple(cut)}: {error!s:.80}", flush=True)
                continue
            print(f"{name}, {tuple(cut)}: {time:.3f} ms, {flops / time:.0f} TFLOP/s", flush=True)


def pieces(rows: int) -> None:
    """The row kernels and the products of one layer, one by one."""
    new = {"dtype": torch.bfloat16, "device": "cuda"}
    x, weight = torch.randn(rows, DIM, **new), torch.ones(DIM, **new)
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * 128, **new)
    both = torch.randn(rows, 2 * HIDDEN, **new)
    cos = torch.ones(rows, 64, device="cuda")
    cache_index = torch.arange(rows, device="cuda")
    k, v = (torch.zeros(1, rows, KV_HEADS, 128, **new) for _ in range(2))
    h = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {
        "norm": lambda: rms_norm(x, weight, 1e-5, h),
        "rotate and store": lambda: rotate_and_store(
            qkv, cos, cos, cache_index, k, v, HEADS, KV_HEADS
        ),
        "gate": lambda: silu_multiply(both, both[:, :HIDDEN]),
    }
    for name, wide, given in (("wqkv", qkv.shape[1], x), ("wo", DIM, x), ("w13", 2 * HIDDEN, x),
                              ("w2", DIM, both[:, :HIDDEN])):  # fmt: skip
        w = 0.02 * torch.randn(wide, given.shape[1], **new)
        if wide == DIM:
            time = milliseconds(lambda given=given, w=w: h.addmm_(given, w.t()))
        else:
            time = milliseconds(lambda given=given, w=w: torch.mm(given, w.t()))
        flops = 2 * w.numel() * rows / 1e9
        print(f"{rows} rows, {name}: {time * 1e3:.0f} us, {flops / time:.0f} TFLOP/s", flush=True)
    for name, call in calls.items():
        print(f"{rows} rows, {name}: {milliseconds(call) * 1e3:.0f} us", flush=True)


def main(head_dim: int = 128) -> None:
    with torch.inference_mode():
        for rows in (2048, 8192):
            pieces(rows)
        attention(head_dim)


if __name__ == "__main__":
    fire.Fire(main)
