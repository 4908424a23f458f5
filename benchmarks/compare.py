"""This library and others on the same work, on this machine, one after the other, in one table.

    python benchmarks/compare.py --shape 8B --transformers --reference PATH --gpt_fast PATH

Each system runs in a process of its own, which gives its memory back before the next one starts and
is stopped after --limit seconds. benchmarks/README.md says what is measured, and how.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from llama.commands.bench import SHAPES, VOCAB
from llama.model import ModelArgs
from llama.parallel import local_device
from llama.terminal import arguments as cli

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / "peers"


def run(command: list[str], path: list[str | Path], limit: float) -> tuple[dict, str | None]:
    """The last line of a program's output as JSON, and a sentence where it did not end well.

    `path` goes before the rest of PYTHONPATH, from which this library is left out. It runs in an
    empty folder, and in a session of its own, all of which is ended with it.
    """
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    others = [p for p in others if Path(p).resolve() != ROOT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *others])}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        out = Path(folder) / "stdout"
        with out.open("w") as stdout:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                stdout=stdout, stderr=errors, start_new_session=True,
            )  # fmt: skip
        problem = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status, problem = 0, f"did not finish in {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no words"])[-1]
            problem = f"ended with status {status}: {last}"
        for line in reversed(out.read_text().splitlines()):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found, problem
    return {}, problem or "printed no result"


def from_bench(found: dict, context: int) -> dict[str, float]:
    """The report of `python -m llama bench --json` under the names that the other systems use."""
    numbers = {
        f"decode {t['rows']} at {context}, ms a step": 1000 * t["seconds"]
        for t in found.get("decode", [])
        if not t["temperature"]
    }
    numbers |= {f"prefill {t['tokens']}, ms": 1000 * t["seconds"] for t in found.get("prefill", [])}
    if found.get("start"):
        numbers["start to 16th token, s"] = found["start"]
    return numbers


def table(systems: dict[str, dict[str, float]]) -> list[str]:
    """A line for each number, a column for each system; behind a peer's number, how many times
    ours it is."""
    ours = next(iter(systems.values()))
    names = list(dict.fromkeys(name for numbers in systems.values() for name in numbers))
    width = max(map(len, names), default=0)
    column = max(18, *(len(system) for system in systems))
    lines = [" " * width + "".join(f"  {system:>{column}}" for system in systems)]
    for name in names:
        cells = []
        for numbers in systems.values():
            cell = f"{numbers[name]:.2f}" if name in numbers else "-"
            if numbers is not ours and name in numbers and ours.get(name):
                cell += f" ({numbers[name] / ours[name]:.2f}x)"
            cells.append(f"  {cell:>{column}}")
        lines.append(f"{name:{width}}" + "".join(cells))
    return lines


def main(
    shape: str = "8B",
    reference: str | None = None,
    transformers: bool = False,
    gpt_fast: str | None = None,
    device: str | None = None,
    dtype: str = "bfloat16",
    rows: str = "1,32",
    context: int = 128,
    lengths: str = "2048",
    steps: int = 64,
    limit: float = 300,
    compile: bool = False,
    mode: str = "bf16",
    longest: int = 2000,
    new_tokens: int = 128,
    vocab_size: int = VOCAB,
    args: str | None = None,
) -> None:
    """Run every system that is asked for, and print one table.

    Args:
        shape: 1B, 3B, 8B or 70B.
        reference: a checkout of Meta's llama3.
        transformers: also transformers, as it is installed.
        gpt_fast: a checkout of gpt-fast.
        device: cuda or cpu; by default the first there is.
        dtype: of weights and activations.
        rows: sequences that decode at one time.
        context: tokens that each of them has.
        lengths: tokens of the prompts whose prefill is measured.
        steps: steps of decode that are timed.
        limit: seconds that each system may take.
        compile: also transformers with a static cache, compiled.
        mode: gpt-fast's weights: bf16, int8, int4.
        longest: tokens of the longest ragged prompt, at most.
        new_tokens: tokens that each of these is continued by.
        vocab_size: with args, another one.
        args: a JSON object of ModelArgs in place of the shape, to try all this out on something
            tiny; python -m llama bench is then left out.
    """
    given = SHAPES[shape] if args is None else json.loads(args)
    full = ModelArgs(**given, vocab_size=vocab_size)
    numbers = {
        name: [int(word) for word in text.split(",")]
        for name, text in (("rows", rows), ("lengths", lengths))
    }
    where = local_device(device).type
    task = {"args": given, "config": vars(full) | {"rope_scaling": None}, "device": where,
            "vocab_size": vocab_size, "dtype": dtype, "context": context, "steps": steps,
            "longest": longest, "new_tokens": new_tokens, "compile": False, "mode": mode,
            "compile_gpt_fast": where == "cuda", **numbers}  # fmt: skip
    systems: dict[str, dict[str, float]] = {"llama": {}}
    problems = []

    def peer(system: str, script: str, *path: str | Path, **changes: object) -> None:
        print(f"{system} ...", file=sys.stderr, flush=True)
        command = [str(PEERS / script), json.dumps(task | changes)]
        found, problem = run(command, [Path(p).resolve() for p in path], limit)
        systems.setdefault(system, {}).update(found)
        problems.extend([f"{system}: {problem}"] if problem else [])

    if args is None:
        print("llama ...", file=sys.stderr, flush=True)
        words = ["-m", "llama", "bench", "--shape", shape, "--json", "--device", where,
                 "--dtype", dtype, "--steps", str(steps), "--contexts", str(context)]  # fmt: skip
        words += [f"--{name}={','.join(map(str, value))}" for name, value in numbers.items()]
        found, problem = run(words, [ROOT], limit)
        systems["llama"] = from_bench(found, context)
        problems += [f"llama: {problem}"] if problem else []
        problems += [f"llama: left out: {line}" for line in found.get("left_out", [])]
    peer("llama", "ours.py", ROOT)
    if reference is not None:
        peer("Meta's llama3", "reference.py", reference)
    if transformers:
        peer("transformers", "transformers_.py")
    if compile:
        peer("transformers, compiled", "transformers_.py", compile=True)
    if gpt_fast is not None:
        peer(f"gpt-fast, {mode}", "gpt_fast.py", gpt_fast)
    print("\n".join([*table(systems), *problems]))


if __name__ == "__main__":
    cli.run(main)
