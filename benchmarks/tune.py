"""Measures what llama/cuda/tuning.py holds: every kernel with every block that could be good.

    python benchmarks/tune.py --rows 1,32 --shape 8B

Each product runs in a chain of launches over copies of its weight that are larger together than
the L2 cache, captured as a graph, as it does in a step. Prints GB/s of weights (of keys and values
for attention), the best first, beside torch's own product. Needs one NVIDIA GPU; candidates are
compiled by as many processes as there are cores, which need none.
"""

import itertools
import multiprocessing
import os
import statistics
import time

import fire
import torch

from llama.bench import SHAPES
from llama.cuda import attention, launch, products, tuning
from llama.model import ModelArgs

L2 = 3 * 10**8  # bytes that a chain of launches reads before it comes back to the first weight
DTYPE = torch.bfloat16


def weights_of(args: ModelArgs) -> dict[str, tuple[int, int, int, bool]]:
    """Of each product outputs, inputs, epilogue, and whether a norm comes before."""
    size = args.head_dim
    queries, keys = args.n_heads * size, args.n_kv_heads * size
    return {
        "qkv": (queries + 2 * keys, args.dim, products.ROTATE.value, True),
        "wo": (args.dim, queries, products.ADD.value, False),
        "w13": (2 * args.hidden_dim, args.dim, products.GATE.value, True),
        "w2": (args.dim, args.hidden_dim, products.ADD.value, False),
        "output": (args.vocab_size, args.dim, products.STORE.value, True),
    }


def candidates(rows: int, outputs: int, inputs: int) -> list[tuple]:
    """Blocks to try for a product."""
    if rows == 1:
        tiles = [(2, 1024, 4), (4, 1024, 4), (2, 2048, 4), (4, 2048, 8), (2, 2048, 8), (4, 512, 4),
                 (4, 1024, 8)]  # fmt: skip
        return [
            tuning.OneRow(*tile, each, ahead, fetch)
            for tile, each, ahead, fetch in itertools.product(tiles, (1, 2, 3, 4), (2, 4), (0, 1))
            if ahead * tile[1] <= inputs
        ]
    padded = max(16, tuning.power_of_two(rows))
    tiles = [(64, 64), (64, 128), (64, 256), (128, 128)]
    found = []
    for (n, k), split, stages in itertools.product(tiles, (1, 2, 4, 8), (3, 4, 6)):
        programs = -(-outputs // n) * split
        memory = stages * (n + padded) * k * 2
        if 100 <= programs <= (1200 if outputs < 10**5 else 10**5) and 49152 <= memory <= 220000:
            if split == 1 or inputs // split >= 4 * k:
                for fetch in (0, 2048):
                    warps = 8 if n == 128 else 4
                    found += [tuning.SomeRows(padded, n, k, split, stages, warps, fetch)]
    return found


class Case:
    """One product of a shape at a number of rows, with all that its launch needs."""

    def __init__(self, args: ModelArgs, name: str, rows: int, device: str) -> None:
        outputs, inputs, self.epilogue, norm = weights_of(args)[name]
        like = dict(dtype=DTYPE, device=device)
        copies = 1 if device == "meta" else max(2, -(-L2 // (2 * outputs * inputs)))
        self.size = 2 * outputs * inputs
        make = torch.empty if device == "meta" else torch.randn
        scale = inputs**-0.5
        self.weights = [make((outputs, inputs), **like).mul_(scale) for _ in range(copies)]
        self.x = make((rows, inputs), **like)
        self.norm = (torch.ones(inputs, **like), 1e-5) if norm and rows == 1 else None
        self.rotation = None
        width = outputs // (2 if self.epilogue == products.GATE.value else 1)
        self.out = torch.zeros(
            (rows, width), device=device,
            dtype=torch.float32 if self.epilogue == products.STORE.value else DTYPE,
        )  # fmt: skip
        if self.epilogue == products.ROTATE.value:
            heads, kv, size = args.n_heads, args.n_kv_heads, args.head_dim
            turn = torch.randn((rows, size // 2), device=device)
            slots = torch.arange(rows, dtype=torch.int32, device=device)
            cache = torch.zeros((rows, 64, kv, size), **like)
            self.rotation = products.Rotation(turn, turn, slots, slots % 64, cache, cache)
            self.out = torch.zeros((rows, heads, size), **like)
        self.launch = products.Products(torch.device(device))

    def run(self, blocks: tuple) -> None:
        for weight in self.weights:
            self.launch(
                self.x, weight, self.out, self.epilogue, norm=self.norm, rotation=self.rotation,
                blocks=blocks,
            )  # fmt: skip

    def library(self) -> None:
        for weight in self.weights:
            torch.mm(self.x, weight.t())


def captured_seconds(run, launches: int) -> float:
    """Median seconds of one launch of `run`, which makes so many, as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            run()
    times = []
    for turn in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times += [start.elapsed_time(stop) / 1e3] if turn > 1 else []
    return statistics.median(times) / (4 * launches)


class NoGpu:
    """A driver that compiles for a GPU which is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", *TARGET)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


TARGET = (90, 32)


def compile_one(job: tuple) -> str | None:
    """Compile one candidate into Triton's cache, in a process that never touches the GPU."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    shape, name, rows, blocks = job
    driver.set_active(NoGpu())
    products.processors = lambda device: 132
    products.overlap = attention.overlap = lambda device: {"OVERLAP": True, "launch_pdl": True}
    run = JITFunction.run
    if run.__name__ == "run":

        def only(self, *args, grid, warmup, **kwargs):
            return run(self, *args, grid=grid, warmup=True, **kwargs)

        JITFunction.run = only
    try:
        if name == "attention":
            attend(shape, rows, 64, blocks, "meta")[0]()
        else:
            Case(ModelArgs(**SHAPES[shape], vocab_size=128256), name, rows, "meta").run(blocks)
    except Exception as error:
        return f"{name} {rows} {blocks}: {type(error).__name__} {str(error)[:100]}"
    return None


def attend(shape: str, rows: int, context: int, blocks: tuple, device: str):
    """A function that attends once in each of some layers, its layers and its bytes a layer."""
    args = ModelArgs(**SHAPES[shape], vocab_size=128256)
    tuning_of = tuning.DecodeAttention(*blocks)
    attention.decode_attention_blocks = lambda *_: tuning_of
    h, kv, e = args.n_heads, args.n_kv_heads, args.head_dim
    bytes_ = 2 * rows * context * kv * e * 2
    layers = 1 if device == "meta" else max(1, min(32, -(-L2 // bytes_)))
    like = dict(dtype=DTYPE, device=device)
    make = torch.empty if device == "meta" else torch.randn
    k, v = (make((layers, rows, context, kv, e), **like) for _ in range(2))
    q, out = make((rows, h, e), **like), torch.zeros((rows, h, e), **like)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    lengths = torch.full_like(slots, context)
    kernel = attention.DecodeAttention(rows, h, kv, e, torch.device(device))

    def run() -> None:
        for layer in range(layers):
            kernel(q, k[layer], v[layer], slots, lengths, out)

    return run, layers, bytes_


def attention_candidates(rows: int, kv_heads: int) -> list[tuple]:
    every = itertools.product(
        (128, 256, 512, 2048) if rows < 64 else (512, 2048, 4096), (64, 128, 256), (2, 3), (4, 8),
        (128, 512),
    )  # fmt: skip
    found = [tuning.DecodeAttention(p // kv_heads, *rest) for p, *rest in every]
    return [f for f in found if f.block * f.stages <= 400]


def main(
    shape: str = "8B",
    rows: tuple = (1, 8, 32, 64, 128),
    only: tuple = ("qkv", "wo", "w13", "w2", "output", "attention"),
    contexts: tuple = (128, 1024, 8000),
    best: int = 6,
    processes: int | None = None,
) -> None:
    """Print a table; see the top of the file."""
    args = ModelArgs(**SHAPES[shape], vocab_size=128256)
    rows, only, contexts = ((x,) if isinstance(x, int | str) else x for x in (rows, only, contexts))
    jobs = []
    for count, name in itertools.product(rows, only):
        if name == "attention":
            every = attention_candidates(count, args.n_kv_heads)
            jobs += [(shape, name, count, f) for f in every]
        else:
            outputs, inputs = weights_of(args)[name][:2]
            jobs += [(shape, name, count, b) for b in candidates(count, outputs, inputs)]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        problems = [p for p in pool.imap_unordered(compile_one, jobs, 4) if p]
    print(f"{len(jobs)} candidates compiled in {time.perf_counter() - began:.0f} s", *problems[:9],
          sep="\n")  # fmt: skip
    if not torch.cuda.is_available():
        return
    for count, name in itertools.product(rows, only):
        if name == "attention":
            for context in contexts:
                if count * context > 300_000:
                    continue
                results = []
                for blocks in attention_candidates(count, args.n_kv_heads):
                    run, layers, size = attend(shape, count, context, blocks, "cuda")
                    results.append((size / captured_seconds(run, layers) / 1e9, tuple(blocks)))
                show(f"attention, {count} rows x {context}", results, best)
            continue
        case = Case(args, name, count, "cuda")
        results = []
        for blocks in candidates(count, *weights_of(args)[name][:2]):
            try:
                seconds = captured_seconds(lambda b=blocks: case.run(b), len(case.weights))
            except Exception as error:
                print(name, count, blocks, type(error).__name__, str(error)[:80])
                torch.cuda.synchronize()
                continue
            results.append((case.size / seconds / 1e9, tuple(blocks)))
        seconds = captured_seconds(case.library, len(case.weights))
        results.append((case.size / seconds / 1e9, "torch"))
        show(f"{name}, {count} rows", results, best)
        del case


def show(title: str, results: list, best: int) -> None:
    results.sort(key=lambda r: -r[0])
    print(title)
    for rank, (speed, blocks) in enumerate(results):
        if rank < best or blocks == "torch":
            print(f"    {speed:7.0f} GB/s  {blocks}")


if __name__ == "__main__":
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    fire.Fire(main)
