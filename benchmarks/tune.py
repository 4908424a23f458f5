"""Measures what llama/cuda/tuning.py holds: blocks for each kernel, by the time of a whole step.

    python benchmarks/tune.py --shape 8B --rows 1
    python benchmarks/tune.py --shape 8B --rows 8,32,64 --only attention --contexts 128,8000
    python benchmarks/tune.py --shape 8B --rows 1,8 --quantize int4 --only qkv,wo,w13,w2

Why in the step: a launch in a chain of its own kind misleads. There its code stays in caches from
which the kernels of a layer drive each other, and it never waits for, or begins before, the kernel
that comes before it in a layer. So this captures CapturedStep on a model of 8 layers with random
weights, tries each candidate of one kernel while all others stay as they are, times replays of the
graph, and keeps the best before it goes on to the next kernel. Everything else of the step stays
at its place in memory. Prints microseconds a step, the best first, with what the table says now;
at the end our products beside torch's, which begin above tuning.MOST_ROWS. `--quantize` int8, fp8
or int4 packs the weights; a product's kind is that of its weight, so int4 has an int8 output.

Needs one NVIDIA GPU. Triton compiles each candidate once, about a second, into its cache on disk:
`--only` and `--rows` divide a long run.
"""

import itertools
from collections.abc import Sequence

import fire
import torch

from llama.bench import SHAPES, VOCAB
from llama.checkpoint import random_checkpoint
from llama.cuda import attention, launch, products, step, tuning
from llama.cuda.weights import kind_of
from llama.model import ModelArgs
from llama.parallel import ONE
from llama.quantization import formats_of, load
from llama.sampling import SamplingParams

LAYERS = 8
WINDOWS, STEPS = 5, 10  # the best of so many windows of so many steps
KEYS = 400_000  # of all rows in one layer's cache; more is left out
PRODUCTS = ("qkv", "wo", "w13", "w2", "output")
NAMES = (*PRODUCTS, "attention")
GREEDY = SamplingParams(temperature=0)

Product = tuple[int, int, str]  # outputs, inputs, kind of the weight
Blocks = tuning.Blocks | tuning.DecodeAttention


def product_candidates(rows: int, outputs: int, inputs: int, kind: str) -> list[Blocks]:
    if kind:
        return packed_candidates(rows, outputs, inputs, kind)
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


def packed_candidates(rows: int, outputs: int, inputs: int, kind: str) -> list[Blocks]:
    padded = max(8, tuning.power_of_two(rows))
    single: list[Blocks] = []
    some: list[tuning.SomeRows | tuning.ByWords]
    if rows == 1 and kind != "int4":
        single = [
            tuning.OneRow(*tile)
            for tile in ((2, 2048, 4), (4, 2048, 4), (4, 1024, 2), (8, 1024, 2), (2, 1024, 2),
                         (4, 1024, 4))
        ]  # fmt: skip
    if rows > 32:
        tiles = [(64, 128, 4), (128, 64, 4), (128, 128, 8)]
        some = [
            tuning.SomeRows(padded, n, k, split, stages, warps)
            for (n, k, warps), split, stages in itertools.product(tiles, (1, 2, 4), (2, 3, 4))
        ]
    else:
        run = 128 if kind == "int4" else 64  # inputs of four threads
        some = [
            tuning.ByWords(padded, n, run * runs * (1 if apart else warps), split, warps, apart)
            for (n, warps, runs, apart), split in itertools.product(*words_of(rows))
        ]
    return single + [blocks for blocks in some if fits(blocks, outputs, inputs)]


def words_of(rows: int) -> tuple[list[tuple[int, int, int, bool]], tuple[int, ...]]:
    """Tiles of ByWords to try, as outputs, warps, runs of a warp, whether apart; and splits."""
    if rows == 1:
        tiles, splits = [(16, 4, 1), (16, 4, 2), (16, 2, 2), (32, 4, 1), (64, 2, 1)], (1, 2)
    elif rows <= 8:
        tiles = [(16, 4, 2), (16, 2, 2), (16, 8, 1), (32, 4, 1), (32, 4, 2), (32, 2, 1), (64, 4, 1)]
        splits = (1, 2, 4)
    else:
        tiles, splits = [(32, 4, 1), (64, 4, 1)], (1, 2, 4, 8)
    apart = [(128, 4, 2), (64, 4, 2), (128, 4, 1), (256, 8, 2)] if rows > 8 else []
    return [(*t, True) for t in apart] + [(*t, False) for t in tiles], splits


def fits(blocks: tuning.SomeRows | tuning.ByWords, outputs: int, inputs: int) -> bool:
    """Whether a packed product has whole tiles, some in each part, and programs for every
    multiprocessor but not, by being split, many more."""
    split, turns = blocks.split, inputs // blocks.block_k
    programs = -(-outputs // blocks.block_n) * split
    full = -(-turns // split) * (split - 1) < turns  # an empty part would read past the weight
    worth = split == 1 or (programs < 600 and turns >= 2 * split and full)
    return inputs % blocks.block_k == 0 and programs >= 120 and worth


def attention_candidates(rows: int, kv_heads: int) -> list[tuning.DecodeAttention]:
    shares = (8, 16, 32, 64) if rows <= 16 else (32, 64, 128, 256)
    each = itertools.product(shares, ((32, 2), (64, 2), (64, 3), (64, 4), (128, 2), (128, 3)))
    return [
        tuning.DecodeAttention(programs * 8 // kv_heads or 1, block, stages, warps)
        for (programs, (block, stages)), warps in itertools.product(each, (4, 8))
    ]


class Step:
    """The captured step of `rows` rows. `blocks` is what its kernels get: those of a product by
    what it is, those of attention by that name. `products` are a layer's and the output's."""

    def __init__(self, args: ModelArgs, rows: int, quantize: str | None, device: str) -> None:
        self.rows = rows
        # scratch is made for the most programs that attention will be given
        every = attention_candidates(rows, args.n_kv_heads)
        self.blocks: dict[Product | str, Blocks] = {
            "attention": max(every, key=lambda blocks: blocks.programs)
        }
        for module in (products, step):  # at first, what the table says
            module.product_blocks = lambda _, *product: self.blocks.setdefault(
                product, tuning.product_blocks(rows, *product)
            )
        attention.decode_attention_blocks = lambda *_: self.blocks["attention"]
        step.MOST_ROWS = dict.fromkeys(tuning.MOST_ROWS, rows)
        source = random_checkpoint(args, dtype=torch.bfloat16, device=device)
        formats = formats_of(quantize, args) if quantize else None
        model = load(source, ranks=ONE, device=device, formats=formats)
        cache = model.new_cache(rows, args.max_seq_len)
        cache.k.normal_()
        cache.v.normal_()
        self.step = step.CapturedStep(model, cache, rows)
        forward = self.step.forward
        weights = (*forward.blocks[0].products(), forward.output)
        self.products: dict[str, Product] = {
            name: (*weight.shape, kind_of(weight))
            for name, weight in zip(PRODUCTS, weights, strict=True)
        }

    def use_ours(self, ours: bool) -> None:
        """Our products, or torch's: a layer knows which since it was built, the output asks."""
        most = self.rows if ours else 0
        step.MOST_ROWS = dict.fromkeys(tuning.MOST_ROWS, most)
        self.step.most_rows = [most] * len(self.step.most_rows)

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
        self, title: str, key: Product | str, candidates: Sequence[Blocks], context: int, best: int
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
                print(f"    {said(blocks)}: {error!s:.80}")
        found.sort()
        print(f"{title}, context {context}, {len(found)} candidates")
        for rank, (time, blocks) in enumerate(found):
            if rank < best or blocks == now:
                note = "  now" if blocks == now else ""
                print(f"    {time:8.1f} us  {said(blocks)}{note}", flush=True)
        self.blocks[key] = found[0][1]


def said(blocks: Blocks) -> str:
    return f"{type(blocks).__name__}{tuple(blocks)}"


def tune(
    args: ModelArgs,
    rows: int,
    only: Sequence[str],
    contexts: Sequence[int],
    best: int,
    quantize: str | None = None,
    device: str = "cuda",
) -> None:
    """Every kernel of the step of so many rows, products at the first context."""
    tried = Step(args, rows, quantize, device)
    print(f"{rows} rows, {args.n_layers} layers, {quantize or 'not quantized'}", flush=True)

    def table_of_attention(context: int) -> None:
        now = tuning.decode_attention_blocks(rows, args.n_kv_heads, context >= tuning.LONG)
        tried.blocks["attention"] = now

    table_of_attention(contexts[0])
    for name, product in tried.products.items():
        if name in only:
            title = f"{name} {product[2]}".rstrip()
            tried.sweep(title, product, product_candidates(rows, *product), contexts[0], best)
    for context in contexts:
        table_of_attention(context)
        if "attention" in only:
            every = attention_candidates(rows, args.n_kv_heads)
            tried.sweep("attention", "attention", every, context, best)
        print(f"all the best, context {context}: {tried.microseconds(context):.1f} us")
        if rows > 1:
            tried.use_ours(False)
            print(f"  but torch's products: {tried.microseconds(context):.1f} us", flush=True)
            tried.use_ours(True)


def main(
    shape: str = "8B",
    rows: int | tuple[int, ...] = (1, 8, 32, 64),
    only: str | tuple[str, ...] = NAMES,
    contexts: int | tuple[int, ...] = (128, 8000),
    best: int = 6,
    quantize: str | None = None,
) -> None:
    """Print the times of the best candidates; see the top of the file."""
    counts = (rows,) if isinstance(rows, int) else rows
    names = (only,) if isinstance(only, str) else only
    lengths = (contexts,) if isinstance(contexts, int) else contexts
    for count in counts:
        some = [length for length in lengths if length * count <= KEYS] or [min(lengths)]
        changes = dict(n_layers=LAYERS, max_seq_len=max(some) + 4 * STEPS, max_batch_size=count)
        args = ModelArgs(vocab_size=VOCAB, **SHAPES[shape] | changes)
        tune(args, count, names, some, best, quantize)


if __name__ == "__main__":
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    fire.Fire(main)
