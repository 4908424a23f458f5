"""What kernels take of a GPU that is not here, beside what it has: compiled for it, not run.

    python benchmarks/targets.py                               # the table of all targets
    python benchmarks/targets.py --targets 8.6,9.0 --shapes 8B --kinds bf16,int4 --rows 1,8

The launches are those that the captured step and the forward of prompts make: their own code runs,
on tensors without memory, before a driver that says it has the GPU asked for, and what it would
launch is written down instead. The surprising thing: a kernel is compiled for one of all shapes
that differ only in sizes over which it has a loop, since these change neither shared memory nor
registers (`alike`); `--every` compiles them all, for hours.

Triton keeps what it compiled in its cache on disk. Needs no GPU, and no TRITON_INTERPRET.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import fire
import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llama.bench import SHAPES as RELEASED
from llama.cache import Batch
from llama.checkpoint.packed import Packed
from llama.cuda import attention, forward, launch, prefill, products, rows, sampling, step, unpack
from llama.model import ModelArgs, Transformer
from llama.quantization import QuantizedEmbedding, QuantizedLinear, formats_of


class Target(NamedTuple):
    """A GPU of that compute capability: its name, bytes that a program may share, multiprocessors."""

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
        """Its constants by name."""
        names = self.kernel.arg_names
        return {names[at[0]]: value for at, value in self.constants.items() if len(at) == 1}

    def compiled(self, target: Target) -> Any:  # noqa: ANN401
        source = self.kernel.ASTSource(
            self.kernel, self.signature, self.constants, self.attributes
        )
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
    everywhere = (attention, forward, launch, prefill, products, rows, sampling, step, unpack)
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
        tensors = {part: torch.empty(size, dtype=d, device="meta") for part, (size, d) in layout.items()}
        packed = Packed(**tensors)
        made = QuantizedEmbedding if leaf == "tok_embeddings" else QuantizedLinear
        setattr(model.get_submodule(path), leaf, made(packed, dtype))
        if args.tied and leaf == "tok_embeddings":
            model.output = QuantizedLinear(packed, dtype)
    return model


def launches(target: Target, shape: str, kind: str, counts: Sequence[int] = ROWS) -> list[Launch]:
    """Those of steps of so many rows, lean, sampled and masked, of few keys and of many, and those
    of a prompt."""
    with pretended(target) as found:
        model = model_of(shape, kind)
        device = torch.device("meta")
        cache = model.new_cache(max(counts), LONGEST)
        captured = step.CapturedStep(model, cache, max(counts))
        for count in counts:
            for long, greedy, masked in ((False, True, False), (True, False, True), (True, False, False)):
                captured._step(step.Key(count, None, long, masked, greedy))
        batch = Batch([1, 40], [7, 50], [0, 1], device)
        tokens = torch.zeros(41, dtype=torch.int64, device=device)
        captured.forward.hidden(tokens, tokens, batch, cache)
    return found


# ---- what they take


class Taken(NamedTuple):
    """By a compiled kernel: bytes that a program shares, registers of a thread, bytes of it that
    found no register, and words of its code."""

    shared: int
    registers: int
    spilled: int
    words: dict[str, bool]


def main(targets: str = ",".join(TARGETS)) -> None:
    begin = time.perf_counter()
    for name in TARGETS:
        for shape in SHAPES:
            for kind in KINDS:
                if kind == "fp8" and TARGETS[name].capability < (8, 9):
                    continue
                found = launches(TARGETS[name], shape, kind)
                print(name, shape, kind, len(found), f"{time.perf_counter() - begin:.1f}", flush=True)


if __name__ == "__main__":
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    fire.Fire(main)
