"""Decode and prefill speed of this library on a model of random weights, without any file.

    python benchmarks/speed.py --shape 8B
    python benchmarks/speed.py --shape 8B --reference PATH   # and Meta's llama3 checkout, same run

Decode is the median step of 64 after a prompt of 128 tokens; prefill the time from a submitted
prompt to its first token, the best of three. Weights in bfloat16 unless --dtype says otherwise.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import fire
import torch

from llama.checkpoint import load, make_plan, random_checkpoint
from llama.engine import Engine
from llama.generation import as_dtype, chunk_rows
from llama.model import ModelArgs
from llama.parallel import ONE, local_device
from llama.sampling import SamplingParams

SHAPES = {
    "1B": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=256,
               ffn_dim_multiplier=1.5, tied=True, use_scaled_rope=True),
    "3B": dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, multiple_of=256,
               ffn_dim_multiplier=1.0, tied=True, use_scaled_rope=True),
    "8B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024,
               ffn_dim_multiplier=1.3),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096,
                ffn_dim_multiplier=1.3),
}  # fmt: skip


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128000, (length,), generator=generator).tolist()


def decode_step(engine: Engine, rows: int) -> float:
    """Median seconds of a step in which `rows` sequences get a token each."""
    params = SamplingParams(temperature=0, max_tokens=72)
    for row in range(rows):
        engine.submit(prompt(128, row), params)
    times = []
    while not engine.idle:
        start = time.perf_counter()
        count = len(engine.step())
        if count == rows:
            times.append(time.perf_counter() - start)
    return statistics.median(times[4:68])


def first_token(engine: Engine, length: int) -> float:
    """Seconds from a prompt of `length` tokens to the first token of its answer, best of three."""
    times = []
    for turn in range(3):
        ids = prompt(length, turn)
        synchronize(engine.device)
        start = time.perf_counter()
        engine.submit(ids, SamplingParams(temperature=0, max_tokens=1))
        while not engine.idle:
            engine.step()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(shape: str, device: str | None, dtype: str, rows: list[int], lengths: list[int]) -> dict:
    where, kind = local_device(device), as_dtype(dtype)
    longest = max([*lengths, 256]) + 8
    args = ModelArgs(**SHAPES[shape], vocab_size=128256, max_batch_size=max(rows),
                     max_seq_len=longest, context_length=max(8192, longest))  # fmt: skip
    source = random_checkpoint(args, dtype=kind, device=where)
    model = load(source, ranks=ONE, device=where)
    engine = Engine(model, max_batch_size=max(rows), max_seq_len=longest, chunk=chunk_rows(where))
    results: dict = {f"decode {n}, ms a step": 1e3 * decode_step(engine, n) for n in rows}
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for n in lengths:
        results[f"prefill {n}, ms"] = 1e3 * first_token(engine, n)
    if where.type == "cuda":
        plan = make_plan(
            args, dtype=kind, max_batch_size=max(rows), max_seq_len=longest, chunk=engine.chunk
        )
        used = torch.cuda.max_memory_allocated() - before
        results["prefill workspace, MB"] = used / 2**20
        results["prefill workspace planned, MB"] = plan.workspace / 2**20
    return results


def main(
    shape: str = "8B",
    device: str | None = None,
    dtype: str = "bfloat16",
    rows: tuple = (1, 32),
    lengths: tuple = (2048, 8184),
    reference: str | None = None,
) -> None:
    """Print a table; with `reference` also what a checkout of Meta's llama3 does on this
    machine."""
    results = {"llama": ours(shape, device, dtype, list(rows), list(lengths))}
    if reference is not None:
        script = Path(__file__).with_name("reference.py")
        env = {**os.environ, "PYTHONPATH": f"{reference}:{os.environ.get('PYTHONPATH', '')}"}
        torch.cuda.empty_cache()
        shape_args = {
            k: v for k, v in SHAPES[shape].items() if k not in ("tied", "use_scaled_rope")
        }
        task = json.dumps({"args": shape_args, "rows": rows, "lengths": lengths})
        done = subprocess.run([sys.executable, script, task], env=env, stdout=subprocess.PIPE)
        results["reference"] = json.loads(done.stdout.splitlines()[-1])
    for name in results["llama"]:
        cells = [
            f"{system}: {table[name]:9.2f}" for system, table in results.items() if name in table
        ]
        print(f"{name:32}", "   ".join(cells))


if __name__ == "__main__":
    fire.Fire(main)
