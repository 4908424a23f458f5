"""What kernels take of a GPU that is not here, beside what it has: compiled for it, not run.

    python benchmarks/targets.py                               # the table of all targets
    python benchmarks/targets.py --targets 8.6,9.0 --shapes 8B --kinds bf16,int4 --rows 1,8

The launches are those that the captured step and the forward of prompts make: their own code runs,
on tensors without memory, before a driver that says it has the GPU asked for, and what it would
launch is written down instead. The surprising thing: a kernel is compiled for one of all shapes
that differ only in sizes over which it has a loop, since these change neither shared memory nor,
but for a few, registers (`alike`).

Triton keeps what it compiled in its cache on disk. Needs no GPU, and no TRITON_INTERPRET.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any, NamedTuple

import fire
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llama.cache import Batch
from llama.commands.bench import SHAPES as RELEASED
from llama.cuda import forward, launch, step, weights
from llama.cuda import norm_rope_gate as rows
from llama.cuda.attention import decode as attention
from llama.cuda.attention import prefill
from llama.cuda.products import dispatch, unpack
from llama.cuda.products.gemv_layouts import shared_memory
from llama.cuda.sampling import full, lean
from llama.cuda.tuning import DecodeAttention, Gemm, Gemv, Tiling, direct, power_of_two
from llama.model import ModelArgs, Transformer
from llama.quantization import QuantizedEmbedding, QuantizedLinear, formats_of
from llama.quantization.packed import Packed


class Target(NamedTuple):
    """A GPU of that compute capability, bytes that a program may share, multiprocessors."""

    name: str
    capability: tuple[int, int]
    shared: int
    multiprocessors: int


TARGETS = {
    "8.0": Target("A100", (8, 0), 166912, 108),
    "8.6": Target("RTX 3090", (8, 6), 101376, 82),
    "8.9": Target("RTX 4090", (8, 9), 101376, 128),
    "9.0": Target("H200", (9, 0), 232448, 132),
    "10.0": Target("B200", (10, 0), 232448, 148),
    "12.0": Target("RTX 5090", (12, 0), 101376, 170),
}
_HEADS = dict(dim=1024, n_heads=8, n_kv_heads=2, multiple_of=256)
SHAPES: dict[str, dict[str, Any]] = {
    **RELEASED,
    "7B": dict(dim=4096, n_heads=32, n_kv_heads=32, multiple_of=256, vocab_size=32000),
    "13B": dict(dim=5120, n_heads=40, n_kv_heads=40, multiple_of=256, vocab_size=32000),
    "576": dict(dim=576, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152, tied=True),
    **{f"heads of {size}": dict(_HEADS, head_dim=size) for size in (64, 96, 100, 128, 256)},
}
KINDS = {
    "bf16": (torch.bfloat16, None), "fp16": (torch.float16, None), "fp32": (torch.float32, None),
    "int8": (torch.bfloat16, "int8"), "fp8": (torch.bfloat16, "fp8"),
    "int4": (torch.bfloat16, "int4"),
}  # fmt: skip
ROWS = (1, 2, 8, 32, 128)
LONGEST = 2048  # keys of a slot


class Launch(NamedTuple):
    """A kernel and what it is compiled for, as Triton has it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def named(self) -> dict[str, Any]:
        """Its constants, by name; those of a group by the names of the group's fields."""
        names = [p.name for p in self.kernel.params if p.is_constexpr]
        given = {self.kernel.arg_names[at[0]]: v for at, v in self.constants.items() if not at[1:]}
        found: dict[str, Any] = {}
        for name in names:
            value = getattr(given[name], "value", given[name])
            if is_dataclass(value):
                found |= vars(value)
            else:
                found |= value._asdict() if isinstance(value, tuple) else {name: value}
        return found

    @property
    def arguments(self) -> dict[tuple[int, ...], tuple[str, str]]:
        """The name and type of each argument, and of each field of a group, by its path."""
        found: dict[tuple[int, ...], tuple[str, str]] = {}

        def walk(path: tuple[int, ...], names: Iterable[str], types: Iterable[Any]) -> None:
            for at, (name, type) in enumerate(zip(names, types, strict=True)):
                if isinstance(type, tuple):
                    walk((*path, at), getattr(type, "_fields", map(str, range(len(type)))), type)
                else:
                    found[(*path, at)] = name, type

        walk((), self.signature, self.signature.values())
        return found

    def size_of(self, name: str) -> int:
        """Bytes of a number that the argument of that name points to."""
        return 4 if (name, "*fp32") in self.arguments.values() else 2

    def compiled(self, target: Target) -> Any:  # noqa: ANN401
        source = self.kernel.ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=gpu(target), options=self.options.__dict__)


def gpu(target: Target) -> GPUTarget:
    major, minor = target.capability
    return GPUTarget("cuda", 10 * major + minor, 32)


class _Driver:
    """Of a GPU that is not here."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return gpu(self.target)

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def pretended(target: Target) -> Iterator[list[Launch]]:
    """What is launched inside is not, but stands in the list, once for each that is to be
    compiled: the library sees that GPU."""
    found: list[Launch] = []
    answers = {
        "capability": lambda _: target.capability,
        "multiprocessors_and_memory": lambda _: (target.multiprocessors, target.shared),
        "overlap": lambda _: (
            {"OVERLAP": True, "launch_pdl": True}
            if target.capability >= (9, 0)
            else {"OVERLAP": False}
        ),
    }
    everywhere = (attention, dispatch, forward, full, launch, lean, prefill, rows, step, unpack)
    kept = [
        (module, name, getattr(module, name))
        for module in everywhere
        for name in answers
        if hasattr(module, name)
    ]
    compiling = JITFunction._do_compile
    JITFunction._do_compile = lambda kernel, key, signature, device, constants, options, at, _: (
        found.append(Launch(kernel, signature, constants, at, options))
    )
    before = driver._active
    driver.set_active(_Driver(target))
    for module, name, _ in kept:
        setattr(module, name, answers[name])
    try:
        yield found
    finally:
        for module, name, was in kept:
            setattr(module, name, was)
        JITFunction._do_compile = compiling
        driver.set_active(before)


# ---- what is launched


def model_of(shape: str, kind: str) -> Transformer:
    """A layer of that shape, and all around it, on tensors without memory."""
    dtype, recipe = KINDS[kind]
    args = ModelArgs(**{"vocab_size": 128256, **SHAPES[shape], "n_layers": 1})
    with torch.device("meta"):
        model = Transformer(args).to("meta", dtype).requires_grad_(False)
    for name, format in (formats_of(recipe, args) if recipe else {}).items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        held = model.get_parameter(name)
        layout = format.layout(*held.shape)
        tensors = {
            part: torch.empty(size, dtype=d, device="meta") for part, (size, d) in layout.items()
        }
        packed = Packed(**tensors)
        made = QuantizedEmbedding if leaf == "tok_embeddings" else QuantizedLinear
        setattr(model.get_submodule(path), leaf, made(packed, dtype))
        if args.tied and leaf == "tok_embeddings":
            model.output = QuantizedLinear(packed, dtype)
    return model


def launches(
    target: Target, shape: str, kind: str, counts: Sequence[int] = ROWS
) -> dict[int, list[Launch]]:
    """Those of steps of so many rows: greedy ones of few keys, sampled ones of many, masked or
    not. Those of a prompt beside a row that answers stand at 0."""
    with pretended(target) as found:
        model = model_of(shape, kind)
        device = torch.device("meta")
        cache = model.new_cache(max(counts), LONGEST)
        captured = step.CapturedStep(model, cache, max(counts))
        every: dict[int, list[Launch]] = {}
        for count in counts:
            for long, greedy, masked in ((0, 1, 0), (1, 0, 0), (1, 0, 1)):
                captured._step(step.Key(count, None, bool(long), bool(masked), bool(greedy)))
            every[count] = found.copy()
            found.clear()
        batch = Batch([1, 40], [7, 50], [0, 1], device)
        tokens = torch.zeros(41, dtype=torch.int64, device=device)
        captured.forward.hidden(tokens, tokens, batch, cache)
    return every | {0: found}


def can(target: Target, kind: str) -> bool:
    """What llama.cuda.supported says of fp8."""
    return kind != "fp8" or target.capability >= (8, 9)


# ---- what they take

# Sizes that kernels loop over, or compare numbers with: one stands for all of them.
_SIZES = {
    "K", "D", "F", "VOCAB", "HEADS", "KV_HEADS", "H", "G",
    "inputs", "k_blocks", "heads", "kv_heads",
}  # fmt: skip


def alike(one: Launch) -> tuple[object, ...]:
    """What launches have in common that take the same of a GPU."""
    c, other = one.named, ()
    if one.name == "gemm.gemm":
        other = (c["K"] % c["block_k"] == 0,)
    elif one.name == "gemm_sm90.gemm_sm90":
        other = (c["k_blocks"] % 2, min(c["k_blocks"], 3))
    elif one.name == "gemv.gemv":
        span = -(-c["inputs"] // c["split"])
        other = (power_of_two(span), span == power_of_two(span))
    elif one.name == "decode._attend":
        row = c["KV_HEADS"] * c["E"]
        other = (min(64, row & -row),)
    kept = tuple((name, str(value)) for name, value in c.items() if name not in _SIZES)
    arguments = [
        (name, type, str(one.attributes.get(path)))
        for path, (name, type) in one.arguments.items()
        if type not in ("i32", "i64", "constexpr")
    ]
    return one.name, tuple(arguments), kept, other, one.options.hash()


class Taken(NamedTuple):
    """By a compiled kernel: bytes that a program shares, registers of a thread, threads, bytes of
    a thread that found no register, and instructions that not every GPU has."""

    shared: int
    registers: int
    threads: int
    spilled: int
    instructions: frozenset[str]


WORDS = ("wgmma", "griddepcontrol", "cp.async.bulk.tensor", "mbarrier", "tcgen05", "cp.async")
TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def taken(kernel: Any) -> Taken:  # noqa: ANN401
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, spilled = (int(usage.split(f" {word}:")[1].split()[0]) for word in ("REG", "STACK"))
    words = frozenset(word for word in WORDS if word in ptx)
    threads = 32 * kernel.metadata.num_warps
    return Taken(kernel.metadata.shared, registers, threads, spilled, words)


MOST_SPILLED = 1088  # bytes of a thread
SLACK = 8192  # bytes that a kernel may take less than reckoned


def reckoned(target: Target, one: Launch) -> int | None:
    """Bytes that the library thinks a program of it shares; None where nothing depends on that."""
    c, warps, stages = one.named, one.options.num_warps, one.options.num_stages
    kinds = {value.value: kind for kind, value in weights._KINDS.items()}
    if one.name == "gemm.gemm":
        size = one.size_of("x")
        some = Gemm(**{field: c[field] for field in Gemm._fields})
        by_itself = direct(target.capability, size)
        return some.takes(kinds.get(c["KIND"], ""), c["GROUP"], size, by_itself)
    if one.name == "decode._attend":
        size = one.size_of("k")
        share = DecodeAttention(c["PROGRAMS"], c["BLOCK"], c["STAGES"], warps)
        return share.takes(c["G"], c["E"], size)
    if one.name == "prefill._attend":
        size = one.size_of("k")
        cut = Tiling(c["BLOCK_M"], c["BLOCK_N"], warps, stages)
        return cut.takes(c["E"], size, direct(target.capability, size))
    if one.name == "gemv.gemv":
        slices = c["slices"] // c["warps"]
        blocks = Gemv(c["block_n"], slices, c["warps"], c["stages"], 1, c["split"])
        read = weights.Source(None, None, tl.constexpr(c["kind"]), c["group"])  # type: ignore[arg-type]
        return shared_memory(read, c["inputs"], blocks) + 1024  # what Products leaves
    return None


def faults(target: Target, one: Launch, took: Taken) -> list[str]:
    """What a kernel has that the GPU does not have, or is not reckoned with."""
    major = target.capability[0]
    there = {"wgmma": major == 9, "tcgen05": major == 10}
    there |= dict.fromkeys(("griddepcontrol", "cp.async.bulk.tensor", "mbarrier"), major >= 9)
    found = [word for word in took.instructions if not there.get(word, True)]
    if took.shared > target.shared:
        found.append(f"{took.shared} bytes where there are {target.shared}")
    if took.registers * took.threads > 65536 or took.spilled > MOST_SPILLED:
        spilled = f"{took.spilled} bytes for those that there are not"
        found.append(f"{took.registers} registers of {took.threads} threads, {spilled}")
    thought = reckoned(target, one)
    if thought is not None and not thought - max(SLACK, thought // 5) <= took.shared <= thought:
        found.append(f"{took.shared} bytes where {thought} are reckoned")
    return found


class Compiler:
    """Compiles each launch once for all that are alike, and keeps what it takes."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.known: dict[tuple[object, ...], Taken] = {}

    def __call__(self, some: Iterable[Launch]) -> list[tuple[Launch, Taken]]:
        new = {alike(one): one for one in some if alike(one) not in self.known}
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            made = threads.map(lambda one: taken(one.compiled(self.target)), new.values())
            self.known |= dict(zip(new, made, strict=True))
        return [(one, self.known[alike(one)]) for one in some]


def main(
    targets: str | tuple[object, ...] = tuple(TARGETS),
    shapes: str | tuple[object, ...] = tuple(SHAPES),
    kinds: str | tuple[object, ...] = tuple(KINDS),
    rows: int | tuple[int, ...] = ROWS,
) -> None:
    """Print, for each target and shape, the largest shared memory of a kernel, in KB, by rows, and
    which kernel that is; then what is wrong, with status 1."""
    wrong = [
        line
        for name in _listed(targets)
        for line in table(
            TARGETS[name], _listed(shapes), _listed(kinds), [int(n) for n in _listed(rows)]
        )
    ]
    if wrong:
        raise SystemExit("\n".join(wrong))


def _listed(given: object) -> list[str]:
    if isinstance(given, (list, tuple)):
        return [str(one) for one in given]
    return str(given).split(",")


def table(
    target: Target, shapes: Sequence[str], kinds: Sequence[str], counts: Sequence[int]
) -> list[str]:
    """Of one target; returns what is wrong."""
    begin, wrong, compiler = time.perf_counter(), [], Compiler(target)
    major, minor = target.capability
    print(f"{major}.{minor}, {target.name}, {target.shared / 1024:.0f} KB", flush=True)
    for shape in shapes:
        most: dict[int, tuple[int, str]] = {}
        for kind in filter(partial(can, target), kinds):
            for count, some in launches(target, shape, kind, counts).items():
                for one, took in compiler(some):
                    wrong += [
                        f"{target.name}, {shape}, {kind}, {count} rows: {one.name}: {fault}"
                        for fault in faults(target, one, took)
                    ]
                    said = f"{one.name.partition('.')[0]} {kind}"
                    most[count] = max(most.get(count, (0, "")), (took.shared, said))
        cells = [
            f"{count or 'prompt'}: {size / 1024:.0f} ({said})"
            for count, (size, said) in most.items()
        ]
        print(f"  {shape:14}", *cells, sep="  ", flush=True)
    spilled = max(((took.spilled, key[0]) for key, took in compiler.known.items()), default=(0, ""))
    took, said = time.perf_counter() - begin, "a thread spills {} bytes at most ({})"
    print(f"  {len(compiler.known)} kernels in {took:.0f} s;", said.format(*spilled), flush=True)
    return list(dict.fromkeys(wrong))


if __name__ == "__main__":
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    fire.Fire(main)
