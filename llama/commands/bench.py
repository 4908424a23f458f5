"""`bench`: how fast a model runs on this machine, as a share of what the machine itself can do.

Times the engine's own loop: decode, prefill, and from the start of the process to the 16th token.
Refuses to know kernels and text: prompts are random ids. The surprising thing: before decode is
timed, its prompts are run for a single token each, and then submitted again to an engine that still
has their keys; so all rows begin at the same step, with equally many keys.
"""

import json as json_format
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from llama.args import ModelArgs
from llama.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from llama.commands.machine import (
    decode_bytes,
    device_name,
    memory_in_use,
    prefill_operations,
    process_age,
    product_speed,
    read_bandwidth,
    release,
    times,
)
from llama.commands.timings import GIB, SHAPES, VOCAB, Report, Timing, Work, lines, work_for
from llama.engine import Engine, Request
from llama.loading import free_memory, make_plan, prepare
from llama.loading.runners import runner_for
from llama.loading.settings import CHUNK_ROWS, as_dtype, dtype_name
from llama.model import Transformer
from llama.parallel import join, local_device
from llama.quantization.packed import Format
from llama.sampling import SamplingParams
from llama.terminal.progress import progress

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.6, top_p=0.9, seed=0)
WARM = 4  # steps before those that are timed
SPARE = 8  # tokens of room behind the last one: an engine may run ahead of its events
WINDOWS, FIRST_PROMPT, FIRST_TOKENS = 4, 128, 16


def bench(
    ckpt_dir: str | None = None,
    *,
    shape: str | None = None,
    rows: str | None = None,
    contexts: str | None = None,
    lengths: str | None = None,
    steps: int | None = None,
    json: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    kernels: bool = True,
) -> None:
    """Measure how fast a model runs here, as a share of what this machine can do.

    `share` is of the time that reading the weights and the cache once would take (decode), or the
    products alone (prefill), at the speeds measured above it. What does not fit is left out.

        python -m llama bench llama/demo
        python -m llama bench --shape 8B --rows 1,8,32 --quantize int4

    Args:
        ckpt_dir: folder of weights, Meta's or Hugging Face's, or a .gguf file; needed without
            --shape.
        shape: 1B, 3B, 8B or 70B, in place of a folder: random weights, made on the device.
        rows: sequences that decode at one time, such as 1,8,32.
        contexts: tokens that each of them has before it decodes, such as 128,4096.
        lengths: tokens of the prompts whose prefill is measured, such as 512,2048.
        steps: steps of decode that are timed. What is not given suits the device.
        dtype: float32, bfloat16 or float16; by default the checkpoint's own, for a shape bfloat16.
        kernels: whether an NVIDIA GPU runs this library's kernels, or the plain model.
    """
    on = local_device(device)
    work = work_for(on, rows, contexts, lengths, steps)
    name, checkpoint = choose(ckpt_dir, shape, work, on, dtype)
    report = measure(
        name,
        checkpoint,
        work,
        device=on,
        dtype=as_dtype(dtype),
        quantize=quantize,
        kernels=kernels,
        show_progress=True,
    )
    print(json_format.dumps(asdict(report)) if json else "\n".join(lines(report)))


# ---- the engine's loop


def random_prompt(length: int, vocab: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (length,), generator=generator).tolist()


def first_tokens(engine: Engine, prompt: list[int]) -> None:
    request = engine.submit(prompt, replace(GREEDY, max_tokens=FIRST_TOKENS))
    while request.finish_reason is None:
        engine.step()
    raise_errors([request])


def raise_errors(requests: Sequence[Request]) -> None:
    """Raise what a request failed with: its steps are no measurement."""
    for request in requests:
        if request.error is not None:
            raise request.error


def decode_seconds(
    engine: Engine, rows: int, context: int, steps: int, params: SamplingParams = GREEDY
) -> tuple[float, float]:
    """Seconds of a step of `rows` sequences, and the keys that each had, on the mean.

    The seconds are the median of up to four windows of whole steps, `steps` in all, each from the
    return of one step to the return of a later one. The engine needs `reuse`, and room for
    context + WARM + steps + SPARE tokens.
    """
    prompts = [random_prompt(context, engine.vocab_size, seed) for seed in range(rows)]
    for prompt in prompts:
        engine.submit(prompt, replace(params, max_tokens=1))
    while not engine.idle:
        engine.step()
    longest = WARM + steps + SPARE
    requests = [engine.submit(prompt, replace(params, max_tokens=longest)) for prompt in prompts]
    for _ in range(WARM):
        engine.step()
    assert all(r.reused == context - 1 for r in requests), [r.reused for r in requests]
    count = min(WINDOWS, steps)
    seconds = []
    last = time.perf_counter()
    for window in range(count):
        size = steps // count + (window < steps % count)
        for _ in range(size):
            engine.step()
        now = time.perf_counter()
        seconds.append((now - last) / size)
        last = now
    raise_errors(requests)
    for request in requests:
        engine.cancel(request, "measured")
    return statistics.median(seconds), context + WARM + (steps - 1) / 2


def prefill_seconds(engine: Engine, length: int, device: torch.device, repeats: int = 3) -> float:
    """Seconds from a submitted prompt of `length` tokens to the first token of its answer."""
    prompts = [random_prompt(length, engine.vocab_size, seed) for seed in range(repeats + 1)]

    def answer() -> None:
        request = engine.submit(prompts.pop(), replace(GREEDY, max_tokens=1))
        while not engine.idle:
            engine.step()
        raise_errors([request])

    return statistics.median(times(answer, device, repeats))


# ---- one run


@dataclass(frozen=True, kw_only=True)
class _Job:
    name: str
    rows: int
    tokens: int
    room: int
    params: SamplingParams | None = None  # None: prefill


def _jobs(work: Work) -> Iterator[_Job]:
    for context in work.contexts:
        room = context + WARM + work.steps + SPARE
        each = [(rows, GREEDY, "") for rows in work.rows]
        if context == min(work.contexts):
            note = f", temperature {SAMPLED.temperature}, top-p {SAMPLED.top_p}"
            each.append((1, SAMPLED, note))
        for rows, params, note in each:
            name = f"{rows} sequence{'s' * (rows > 1)}, context {context}{note}"
            yield _Job(name=name, rows=rows, tokens=context, room=room, params=params)
    for length in work.lengths:
        yield _Job(name=f"{length} tokens", rows=1, tokens=length, room=length + SPARE)


def choose(
    ckpt_dir: str | None, shape: str | None, work: Work, device: torch.device, dtype: str | None
) -> tuple[str, Checkpoint]:
    """What to measure, and its name: the checkpoint of a folder, or random weights of a shape, made
    on `device`, in `dtype` or bfloat16."""
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"--shape is {shape!r}; it must be one of {', '.join(SHAPES)}")
    if (ckpt_dir is None) == (shape is None):
        raise ValueError(f"give either a folder of weights or --shape, one of {', '.join(SHAPES)}")
    kind = as_dtype(dtype)
    if shape is None:
        assert ckpt_dir is not None
        return ckpt_dir, open_checkpoint(ckpt_dir)
    longest = max(8192, *work.contexts, *work.lengths)
    args = ModelArgs(**SHAPES[shape], vocab_size=VOCAB, context_length=longest)
    return f"{shape} of random weights", random_checkpoint(
        args, dtype=kind or torch.bfloat16, device=device
    )


def measure(
    name: str,
    checkpoint: Checkpoint,
    work: Work,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    kernels: bool = True,
    show_progress: bool = False,
) -> Report:
    """Do all of `work` on one model. What does not fit the memory that is free, or the model, is
    left out, and the report says so. ValueError where not even a short prompt fits."""
    length = min(FIRST_PROMPT, checkpoint.args.context_length)
    room = length + FIRST_TOKENS + SPARE
    if join(None, device).size > 1:
        raise ValueError("bench measures a single process: start it without torchrun")
    prepared = prepare(
        checkpoint,
        max_seq_len=min(room, checkpoint.args.context_length),
        device=device,
        dtype=dtype,
        quantize=quantize,
        kernels=kernels,
    )
    args, kind, formats = prepared.checkpoint.args, prepared.dtype, prepared.formats
    model = prepared.load(show_progress=show_progress)
    release(device)
    loading = process_age()
    engine = _engine(model, kernels, rows=1, room=room)
    first_tokens(engine, random_prompt(length, args.vocab_size, 0))
    start = process_age()
    del engine
    release(device)
    size = min(work.buffer, free_memory(device) // 2)
    report = Report(
        model=name,
        parameters=checkpoint.parameters,
        device=device_name(device),
        dtype=dtype_name(kind) + (f", {quantize}" if quantize else ""),
        bandwidth=read_bandwidth(device, size),
        operations=product_speed(device, kind, work.product),
        buffer=size,
        product=work.product,
        start=start,
        loading=loading,
    )
    jobs = list(_jobs(work))
    with progress("measuring", len(jobs), unit="lines", enabled=show_progress) as advance:
        for job in jobs:
            release(device)
            _measure_one(job, model, formats, kernels, work.steps, report)
            advance(1)
    return report


def _measure_one(
    job: _Job,
    model: Transformer,
    formats: Mapping[str, Format],
    kernels: bool,
    steps: int,
    report: Report,
) -> None:
    """Add a line to the report, or why there is none."""
    args, device, kind = model.params, model.norm.weight.device, model.norm.weight.dtype
    what = f"decode, {job.name}" if job.params else f"prefill, {job.name}"
    if job.tokens > args.context_length:
        report.left_out.append(f"{what}: the model's context is {args.context_length} tokens")
        return
    plan = make_plan(args, dtype=kind, max_batch_size=job.rows, max_seq_len=job.room,
                     chunk=CHUNK_ROWS, device=device.type, kernels=kernels,
                     formats=formats)  # fmt: skip
    needed, free = plan.cache + plan.workspace, free_memory(device)
    if needed > free:
        sizes = f"{needed / GIB:.2f} GiB beside the weights, and {free / GIB:.2f} are free"
        report.left_out.append(f"{what}: needs {sizes}")
        return
    try:
        engine = _engine(model, kernels, rows=job.rows, room=job.room, reuse=job.params is not None)
        if job.params:
            seconds, keys = decode_seconds(engine, job.rows, job.tokens, steps, job.params)
            limit = decode_bytes(args, kind, job.rows, keys, formats) / report.bandwidth
        else:
            seconds = prefill_seconds(engine, job.tokens, device)
            limit = prefill_operations(args, job.tokens) / report.operations
        memory = memory_in_use(device)
    except torch.OutOfMemoryError:
        report.left_out.append(f"{what}: ran out of memory")
        return
    known = plan.weights + plan.cache
    timing = Timing(
        name=job.name,
        rows=job.rows,
        tokens=job.tokens,
        temperature=job.params.temperature if job.params else 0,
        steps=steps if job.params else 1,
        seconds=seconds,
        tokens_per_second=(job.rows if job.params else job.tokens) / seconds,
        share=limit / seconds,
        memory=memory,
        above=memory - known if memory is not None and device.type == "cuda" else None,
    )
    (report.decode if job.params else report.prefill).append(timing)


def _engine(
    model: Transformer, kernels: bool, *, rows: int, room: int, reuse: bool = False
) -> Engine:
    runner = runner_for(model, max_batch_size=rows, max_seq_len=room, kernels=kernels)
    return Engine(runner, chunk=CHUNK_ROWS, reuse=reuse)
