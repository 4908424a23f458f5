"""Measures what llama/cuda/tuning.py holds: blocks for each kernel, by the time of a whole step.

    python benchmarks/tune.py --shape 8B --rows 1
    python benchmarks/tune.py --shape 8B --rows 8,32,64 --only attention --contexts 128,8000

Why in the step: a launch in a chain of its own kind misleads. There its code stays in caches from
which the kernels of a layer drive each other, and it never waits for, or begins before, the kernel
that comes before it in a layer. So this captures CapturedStep on a model of 8 layers with random
weights, tries each candidate of one kernel while all others stay as they are, times replays of the
graph, and keeps the best before it goes on to the next kernel. Everything else of the step stays
at its place in memory. Prints microseconds a step, the best first, with what the table says now;
at the end our products beside torch's, which begin above tuning.MOST_ROWS.

Needs one NVIDIA GPU. Triton compiles each candidate once, about a second, into its cache on disk:
`--only` and `--rows` divide a long run.
"""

import itertools
from collections.abc import Sequence

import fire
import torch

from llama.bench import SHAPES, VOCAB
from llama.checkpoint import load, random_checkpoint
from llama.cuda import attention, launch, products, step, tuning
from llama.model import ModelArgs
from llama.parallel import ONE
from llama.sampling import SamplingParams

LAYERS = 8
WINDOWS, STEPS = 5, 10  # the best of so many windows of so many steps
KEYS = 400_000  # of all rows in one layer's cache; more is left out
NAMES = ("qkv", "wo", "w13", "w2", "output", "attention")
GREEDY = SamplingParams(temperature=0)

Shape = tuple[int, int]  # outputs, inputs
Blocks = tuning.OneRow | tuning.SomeRows | tuning.DecodeAttention


def product_shapes(args: ModelArgs) -> dict[str, Shape]:
    queries, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    return {
        "qkv": (queries + 2 * keys, args.dim),
        "wo": (args.dim, queries),
        "w13": (2 * args.hidden_dim, args.dim),
        "w2": (args.dim, args.hidden_dim),
        "output": (args.vocab_size, args.dim),
    }


def product_blocks(rows: int, shape: Shape) -> Blocks:
    """What the table says now."""
    return tuning.one_row_blocks(*shape) if rows == 1 else tuning.some_rows_blocks(rows, *shape)


def product_candidates(rows: int, shape: Shape) -> list[Blocks]:
    outputs, inputs = shape
    if rows == 1:
        tiles = [(4, 512, 4), (2, 1024, 4), (4, 1024, 4), (8, 512, 4), (2, 512, 2), (8, 256, 4),
                 (2, 2048, 4), (4, 512, 2), (4, 256, 2)]  # fmt: skip
        return [
            tuning.OneRow(*tile, ahead, late)
            for tile, ahead, late in itertools.product(tiles, (1, 2), (False, True))
            if ahead * tile[1] <= inputs
        ]
    padded = max(16, tuning.power_of_two(rows))
    found: list[Blocks] = []
    tiles = [(64, 64, 4), (64, 128, 4), (64, 256, 4), (128, 64, 8), (128, 128, 8)]
    for (n, k, warps), split, stages in itertools.product(tiles, (1, 2, 4, 8), (3, 4, 6)):
        programs = -(-outputs // n) * split
        memory = stages * (n + padded) * k * 2
        enough = split == 1 or (programs <= 1200 and inputs >= 4 * k * split)
        if programs >= 100 and enough and 48 * 1024 <= memory <= 220_000:
            found += [
                tuning.SomeRows(padded, n, k, split, stages, warps, late) for late in (False, True)
            ]
    return found


def attention_candidates(rows: int, kv_heads: int) -> list[tuning.DecodeAttention]:
    shares = (8, 16, 32, 64) if rows <= 16 else (32, 64, 128, 256)
    each = itertools.product(shares, ((32, 2), (64, 2), (64, 3), (64, 4), (128, 2), (128, 3)))
    return [
        tuning.DecodeAttention(programs * 8 // kv_heads or 1, block, stages, warps)
        for (programs, (block, stages)), warps in itertools.product(each, (4, 8))
    ]


class Step:
    """The captured step of `rows` rows. `blocks` is what its kernels get: those of a product by its
    shape, those of attention by that name."""

    def __init__(self, args: ModelArgs, rows: int, device: str) -> None:
        self.rows = rows
        self.blocks: dict[Shape | str, Blocks] = {
            shape: product_blocks(rows, shape) for shape in product_shapes(args).values()
        }
        # scratch is made for the most programs that attention will be given
        every = attention_candidates(rows, args.n_kv_heads)
        self.blocks["attention"] = max(every, key=lambda blocks: blocks.programs)
        products.one_row_blocks = lambda outputs, inputs, *_: self.blocks[outputs, inputs]
        for module in (products, step):
            module.some_rows_blocks = lambda _, *shape: self.blocks[shape[:2]]
        attention.decode_attention_blocks = lambda *_: self.blocks["attention"]
        step.MOST_ROWS = rows
        source = random_checkpoint(args, dtype=torch.bfloat16, device=device)
        model = load(source, ranks=ONE, device=device)
        cache = model.new_cache(rows, args.max_seq_len)
        cache.k.normal_()
        cache.v.normal_()
        self.step = step.CapturedStep(model, cache, rows)

    def microseconds(self, context: int) -> float:
        """Of a step whose rows have `context` keys each."""
        self.step.graphs.clear()
        self.load(context)
        self.step.launch()
        self.step.read()
        (graph,) = self.step.graphs.values()
        times = []
        for _ in range(WINDOWS):
            self.load(context)
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(STEPS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / STEPS)
        return min(times)

    def load(self, context: int) -> None:
        limit = context + 2 * STEPS
        rows = [step.Row(5, context, i, (), limit, 0, GREEDY, ()) for i in range(self.rows)]
        self.step.load(rows)

    def sweep(
        self, title: str, key: Shape | str, candidates: Sequence[Blocks], context: int, best: int
    ) -> None:
        """Give the kernels of `key` the fastest of the candidates and of what they have; print the
        `best` of them."""
        now = self.blocks[key]
        found: list[tuple[float, Blocks]] = []
        for blocks in dict.fromkeys([now, *candidates]):
            self.blocks[key] = blocks
            try:
                found.append((self.microseconds(context), blocks))
            except Exception as error:  # one that does not fit the GPU says so in many ways
                print(f"    {tuple(blocks)}: {error!s:.80}")
        found.sort()
        print(f"{title}, context {context}, {len(found)} candidates")
        for rank, (time, blocks) in enumerate(found):
            if rank < best or blocks == now:
                note = "  now" if blocks == now else ""
                print(f"    {time:8.1f} us  {tuple(blocks)}{note}", flush=True)
        self.blocks[key] = found[0][1]


def tune(
    args: ModelArgs,
    rows: int,
    only: Sequence[str],
    contexts: Sequence[int],
    best: int,
    device: str = "cuda",
) -> None:
    """Every kernel of the step of so many rows, products at the first context."""
    tried = Step(args, rows, device)
    print(f"{rows} rows, {args.n_layers} layers", flush=True)

    def table_of_attention(context: int) -> None:
        now = tuning.decode_attention_blocks(rows, args.n_kv_heads, context >= tuning.LONG)
        tried.blocks["attention"] = now

    table_of_attention(contexts[0])
    for name, shape in product_shapes(args).items():
        if name in only:
            tried.sweep(name, shape, product_candidates(rows, shape), contexts[0], best)
    for context in contexts:
        table_of_attention(context)
        if "attention" in only:
            every = attention_candidates(rows, args.n_kv_heads)
            tried.sweep("attention", "attention", every, context, best)
        print(f"all the best, context {context}: {tried.microseconds(context):.1f} us")
        if rows > 1:
            step.MOST_ROWS = 0
            print(f"  but torch's products: {tried.microseconds(context):.1f} us", flush=True)
            step.MOST_ROWS = rows


def main(
    shape: str = "8B",
    rows: int | tuple[int, ...] = (1, 8, 32, 64),
    only: str | tuple[str, ...] = NAMES,
    contexts: int | tuple[int, ...] = (128, 8000),
    best: int = 6,
) -> None:
    """Print the times of the best candidates; see the top of the file."""
    counts = (rows,) if isinstance(rows, int) else rows
    names = (only,) if isinstance(only, str) else only
    lengths = (contexts,) if isinstance(contexts, int) else contexts
    for count in counts:
        some = [length for length in lengths if length * count <= KEYS] or [min(lengths)]
        changes = dict(n_layers=LAYERS, max_seq_len=max(some) + 4 * STEPS, max_batch_size=count)
        args = ModelArgs(vocab_size=VOCAB, **SHAPES[shape] | changes)
        tune(args, count, names, some, best)


if __name__ == "__main__":
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    fire.Fire(main)
