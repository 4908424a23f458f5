"""Measures what llama/cuda/tuning.py holds: blocks for each kernel, by the time of a whole step.

    python benchmarks/tune.py --shape 8B --rows 1
    python benchmarks/tune.py --shape 8B --rows 8,32,64 --only attention --contexts 128,8000
    python benchmarks/tune.py --shape 8B --rows 1,8,128 --quantize int4 --only qkv,wo,w13,w2

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

from llama.checkpoint import random_checkpoint
from llama.commands.bench import SHAPES, VOCAB
from llama.cuda import launch, layers, step, tuning
from llama.cuda.attention import decode as attention
from llama.cuda.products.dispatch import Products
from llama.cuda.products.gemv_layouts import block_k_of, shared_memory
from llama.cuda.weights import Weight, kind_of, source
from llama.loading import load
from llama.model import ModelArgs
from llama.parallel import ONE
from llama.quantization import formats_of
from llama.sampling import SamplingParams

LAYERS = 8
WINDOWS, STEPS = 5, 10  # the best of so many windows of so many steps
KEYS = 400_000  # of all rows in one layer's cache; more is left out
PRODUCTS = ("qkv", "wo", "w13", "w2", "output")
NAMES = (*PRODUCTS, "attention")
GREEDY = SamplingParams(temperature=0)

Product = tuple[int, int, str]  # outputs, inputs, kind of the weight
Blocks = tuning.Blocks | tuning.DecodeAttention
TABLE = Products.blocks


def product_of(weight: Weight) -> Product:
    return (*weight.shape, kind_of(weight))


def product_candidates(name: str, weight: Weight, rows: int, products: Products) -> list[Blocks]:
    """Blocks for the kernel that the product of that name has."""
    now = products.blocks(rows, weight)
    outputs, inputs = weight.shape
    if isinstance(now, tuning.Gemv):
        return gemv_candidates(weight, products)
    padded = now.padded
    if isinstance(now, tuning.GemmSm90):
        found: list[Blocks] = []
        read, plain = source(weight).weight, isinstance(weight, torch.Tensor)
        splits = (1,) if name in ("w13", "output") else (1, 2, 4, 8)  # these can't be partials
        for n, k, split in itertools.product((64, 128), (64,) if plain else (64, 128), splits):
            stage = 2 * n * k * read.shape[1] * read.itemsize // inputs + 2 * padded * k
            if inputs % (k * split) or (plain and name == "w13" and n == 64):
                continue
            for programs in (1, 2) if padded <= 32 else (1,):
                stages = min(12, 205_000 // programs // stage)
                if stages > 2:
                    found.append(tuning.GemmSm90(padded, n, k, split, stages, programs))
    else:
        tiles = [(64, 64, 4), (64, 128, 4), (64, 256, 4), (128, 64, 8), (128, 128, 8)]
        found = [
            tuning.Gemm(padded, n, k, split, stages, warps)
            for (n, k, warps), split, stages in itertools.product(tiles, (1, 2, 4, 8), (3, 4, 6))
            if 48 * 1024 <= stages * (n + padded) * k * 2 <= 220_000
        ]
    return [blocks for blocks in found if worth(blocks, outputs, inputs)]


def worth(blocks: tuning.GemmSm90 | tuning.Gemm, outputs: int, inputs: int) -> bool:
    """Whether there are programs for nearly every multiprocessor, but not, by being split, many
    more, and enough inputs for each."""
    tile = blocks.block_n * (2 if isinstance(blocks, tuning.GemmSm90) else 1)
    programs = -(-outputs // tile) * blocks.split
    most, least = (270, 40) if isinstance(blocks, tuning.GemmSm90) else (1200, 100)
    enough = programs <= most and inputs >= 4 * blocks.block_k * blocks.split
    return programs >= least and (blocks.split == 1 or enough)


def gemv_candidates(weight: Weight, products: Products) -> list[Blocks]:
    read, inputs = source(weight), weight.shape[1]
    found: list[Blocks] = []
    tiles = [(16, 4, 8), (16, 2, 8), (16, 1, 8), (16, 2, 16), (32, 2, 8), (32, 1, 8), (32, 1, 16),
             (64, 1, 8)]  # fmt: skip
    for tile, split, memory in itertools.product(tiles, (1, 2, 4), (106, 150, 200)):
        for programs in (1, 2):
            n, slices, warps = (*tile[:2], tile[2] // programs)
            blocks = tuning.Gemv(n, slices, warps, 2, programs, split)
            if inputs % (block_k_of(read, blocks) * split):
                continue
            while shared_memory(read, inputs, blocks) * programs < memory * 1024:
                blocks = blocks._replace(stages=blocks.stages + 1)
            if blocks.stages > 3:
                found.append(blocks._replace(stages=blocks.stages - 1))
    return list(dict.fromkeys(found))


def attention_candidates(rows: int, kv_heads: int) -> list[tuning.DecodeAttention]:
    shares = (8, 16, 32, 64) if rows <= 16 else (32, 64, 128, 256)
    each = itertools.product(shares, ((32, 2), (64, 2), (64, 3), (64, 4), (128, 2), (128, 3)))
    return [
        tuning.DecodeAttention(programs * 8 // kv_heads or 1, block, stages, warps)
        for (programs, (block, stages)), warps in itertools.product(each, (4, 8))
    ]


class Step:
    """The captured step of `rows` rows. `blocks` is what its kernels get: those of a product by
    what it is, those of attention by that name. `weights` are a layer's and the output's."""

    def __init__(self, args: ModelArgs, rows: int, quantize: str | None, device: str) -> None:
        self.rows = rows
        # scratch is made for the most programs that attention will be given
        every = attention_candidates(rows, args.n_kv_heads)
        self.blocks: dict[Product | str, Blocks] = {
            "attention": max(every, key=lambda blocks: blocks.programs)
        }
        Products.blocks = lambda own, rows, weight, sm90=False, gated=False: (
            self.blocks.get(product_of(weight)) or TABLE(own, rows, weight, sm90, gated)
        )
        attention.decode_attention_blocks = lambda *_: self.blocks["attention"]
        layers.MOST_ROWS = dict.fromkeys(tuning.MOST_ROWS, rows)
        layers.MOST_ROWS_SM90 = rows
        source = random_checkpoint(args, dtype=torch.bfloat16, device=device)
        formats = formats_of(quantize, args) if quantize else None
        model = load(source, ranks=ONE, device=device, formats=formats)
        cache = model.new_cache(rows, args.max_seq_len)
        cache.k.normal_()
        cache.v.normal_()
        self.step = step.CapturedStep(model, cache, rows)
        forward = self.step.forward
        weights = (*forward.blocks[0].products(), forward.output)
        self.weights = dict(zip(PRODUCTS, weights, strict=True))
        products = self.step.products
        for weight in weights:  # what the table says, at first
            output = weight is forward.output
            sm90 = products.can_use_sm90(weight, True) if output else self.step.layers.sm90[0]
            sm90 = sm90 and rows >= tuning.LEAST_ROWS_SM90[kind_of(weight)]
            gated = weight is forward.blocks[0].w13
            self.blocks[product_of(weight)] = TABLE(products, rows, weight, sm90, gated)

    def use_ours(self, ours: bool) -> None:
        """Our products, or torch's: a layer knows which since it was built, the output asks."""
        most = self.rows if ours else 0
        layers.MOST_ROWS = dict.fromkeys(tuning.MOST_ROWS, most)
        layers.MOST_ROWS_SM90 = most
        self.step.layers.most_rows = [most] * len(self.step.layers.most_rows)

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
    for name, weight in tried.weights.items():
        if name in only:
            title, product = f"{name} {kind_of(weight)}".rstrip(), product_of(weight)
            some = product_candidates(name, weight, rows, tried.step.products)
            tried.sweep(title, product, some, contexts[0], best)
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
