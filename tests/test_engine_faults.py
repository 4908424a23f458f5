"""Laws of the engine when something goes wrong: an interruption at any line, an error of one
request, memory that runs out, a cancel or an arrival at any moment. On the plain path, and on the
captured one, emulated."""

import contextlib
import math
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from emulated import Emulated, EmulatedRunner, engine_of, small

import llama.cuda.runner
import llama.engine.engine
from llama import sampling
from llama.cuda import launch
from llama.sampling import SamplingParams

# the engine with its runner, and the runner of a GPU
FILES = (str(Path(llama.engine.engine.__file__).parent), llama.cuda.runner.__file__)
GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
PATHS = pytest.mark.parametrize("path", ["plain", "captured"])


@pytest.fixture(autouse=True)
def nothing_hidden(caplog):
    """A captured step that fails is done by the plain path, which would hide a mistake in it."""
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    failed = [sentence for sentence in said if "captured step failed" in sentence]
    assert not failed


class Stuck(Exception):
    pass


def finish(engine, most=300):
    """Step until nothing is left to do, and not for ever."""
    events = []
    for _ in range(most):
        if engine.idle:
            return events
        events += engine.step()
    raise Stuck([(r.slot, r.cached, r.finish_reason) for r in engine._live])


def empty(engine):
    """Whether no request and no slot is left behind."""
    engine.step()
    return engine.idle and not engine._live


def answers(engine, prompts, params):
    params = params if isinstance(params, list) else [params] * len(prompts)
    requests = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    finish(engine)
    return requests


class AtLine:
    """Does something at the n-th line of the engine's own code; counts the lines.

    It traces line by line, so that no line is left out; a real Ctrl-C falls in fewer places.
    """

    def __init__(self, at, action, others=()):
        self.at, self.action, self.count, self.hit = at, action, 0, None
        self.files = (*FILES, *others)

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def call(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(self.files) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.hit = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                action, self.action = self.action, None
                sys.settrace(None)  # the rest at full speed
                frame.f_trace = None
                action()
                return None
        return self.line


def interrupt():
    raise KeyboardInterrupt


def lines_of(path, **options):
    engine = engine_of(small(), path, slots=2, room=32, chunk=4, **options)
    with AtLine(0, None) as lines:
        answers(engine, PROMPTS, GREEDY)
    return lines.count


def every(count, quick):
    """All lines under `-m slow`; in the quick suite a spread of them."""
    step = max(1, count // quick)
    return range(1, count + 1, step)


def check_interruptions(path, quick, **options):
    model = small()
    reference = [
        r.tokens for r in answers(engine_of(model, slots=2, room=32, chunk=4), PROMPTS, GREEDY)
    ]
    for at in every(lines_of(path, **options), quick):
        engine = engine_of(model, path, slots=2, room=32, chunk=4, **options)
        requests = [engine.submit(p, GREEDY) for p in PROMPTS]
        with AtLine(at, interrupt) as lines, contextlib.suppress(KeyboardInterrupt):
            finish(engine)
        finish(engine)
        assert [r.tokens for r in requests] == reference, lines.hit
        assert empty(engine), lines.hit


@PATHS
@pytest.mark.parametrize("reuse", [False, True])
def test_an_interruption_at_any_line_loses_nothing(path, reuse):
    check_interruptions(path, 150, reuse=reuse)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
@PATHS
@pytest.mark.parametrize("reuse", [False, True])
def test_an_interruption_at_every_single_line_loses_nothing(path, reuse):
    check_interruptions(path, 10**9, reuse=reuse)


def arrive(engine, extra):
    extra.append(engine.submit([11, 12], GREEDY))


def check_others(path, what, quick):
    model = small()
    reference = [
        r.tokens for r in answers(engine_of(model, slots=2, room=32, chunk=4), PROMPTS, GREEDY)
    ]
    late = answers(engine_of(model), [[11, 12]], GREEDY)[0].tokens
    for at in every(lines_of(path), quick):
        engine = engine_of(model, path, slots=2, room=32, chunk=4)
        requests = [engine.submit(p, GREEDY) for p in PROMPTS]
        extra = []
        act = partial(engine.cancel, requests[1], "cut")
        if what == "submit":
            act = partial(arrive, engine, extra)
        with AtLine(at, act) as lines:
            finish(engine)
        finish(engine)  # it may have come in the line that said that nothing was left
        got = [r.tokens for r in requests]
        assert got[0] == reference[0], lines.hit
        assert got[2] == reference[2], lines.hit
        assert got[1] == reference[1][: len(got[1])], lines.hit
        assert all(r.tokens == late for r in extra), lines.hit
        assert empty(engine), lines.hit


@PATHS
@pytest.mark.parametrize("what", ["cancel", "submit"])
def test_a_cancel_or_an_arrival_at_any_line_of_a_step_disturbs_nobody(path, what):
    check_others(path, what, 100)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
@PATHS
@pytest.mark.parametrize("what", ["cancel", "submit"])
def test_a_cancel_or_an_arrival_at_every_single_line_disturbs_nobody(path, what):
    check_others(path, what, 10**9)


# ---- the end of a request, whatever it asks

ODD = [
    ([5], SamplingParams(temperature=0, max_tokens=0)),
    ([5], SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)),
    ([5], SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)),
    ([5] * 17, SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)),
    ([5] * 17, SamplingParams(temperature=0, max_tokens=1)),
    (list(range(24)), SamplingParams(max_tokens=0, prompt_logprobs=0)),
    (list(range(23)), SamplingParams(temperature=0)),
]


@PATHS
@pytest.mark.parametrize("chunk", [4, 16, 2048])
def test_a_request_ends_whatever_it_asks(path, chunk):
    """Requests of no new token, or with a scored prompt of one pending token, went to the captured
    step and never ended."""
    model = small()
    for prompt, params in ODD:
        alone = answers(engine_of(model, slots=1, room=24), [prompt], params)[0]
        engine = engine_of(model, path, slots=2, room=24, chunk=chunk)
        request = engine.submit(prompt, params)
        beside = engine.submit([9], GREEDY)
        finish(engine)
        assert request.tokens == alone.tokens
        assert request.finish_reason == "length"
        assert request.prompt_logprobs == pytest.approx(alone.prompt_logprobs, abs=1e-5)
        scored = params.prompt_logprobs
        assert len(request.prompt_logprobs) == (0 if scored is None else len(prompt))
        sizes = [len(top) for top in request.prompt_top_logprobs]
        assert sizes == ([] if scored is None else [0] + [scored] * (len(prompt) - 1))
        assert beside.tokens == answers(engine_of(model), [[9]], GREEDY)[0].tokens


def test_alternatives_of_the_prompt_are_those_of_the_logits():
    model, prompt = small(), [3, 1, 4, 1, 5, 9, 2, 6]
    params = SamplingParams(max_tokens=0, prompt_logprobs=3)
    request = answers(engine_of(model, chunk=3), [prompt], params)[0]
    expected = model(torch.tensor([prompt]), 0)[0].log_softmax(-1).topk(3)
    for at, top in enumerate(request.prompt_top_logprobs[1:]):
        assert [i for i, _ in top] == expected.indices[at].tolist()
        assert [p for _, p in top] == pytest.approx(expected.values[at].tolist(), abs=1e-5)


@PATHS
def test_the_event_of_a_stop_has_the_token_and_its_logprob(path):
    model = small()
    free = answers(engine_of(model), [[5, 6, 7]], GREEDY)[0]
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    engine = engine_of(model, path, stop_token_ids=(stop,))
    request = engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, logprobs=2))
    last = finish(engine)[-1]
    assert request.tokens == free.tokens[:first]
    assert (last.token, last.finish_reason) == (stop, "stop")
    assert last.logprob == pytest.approx(free.choices[first].logprob, abs=1e-5)
    assert last.top_logprobs[0][0] == stop


# ---- an error belongs to its request


def poisoned(**changes):
    """A model in which token 77 is no number."""
    model = small(**changes)
    with torch.no_grad():
        model.tok_embeddings.weight[77] = math.nan
    return model


@PATHS
def test_logits_that_are_no_numbers_end_their_request_alone(path):
    model = poisoned()
    expected = [r.tokens for r in answers(engine_of(model), PROMPTS, GREEDY)]
    engine = engine_of(model, path, slots=4)
    requests = [engine.submit(p, GREEDY) for p in PROMPTS]
    engine.step()
    bad = engine.submit([5, 77], GREEDY)
    events = [e for e in finish(engine) if e.request is bad]
    assert [r.tokens for r in requests] == expected
    assert [(e.token, e.finish_reason) for e in events] == [(None, "error")]
    assert isinstance(bad.error, FloatingPointError)
    assert "(token 0 of its answer) are not finite, with weights in torch.float32" in str(bad.error)
    assert not engine.runner.cache.k.isnan().any()


@pytest.mark.parametrize(
    ("params", "steps"),
    [
        (SamplingParams(max_tokens=0, prompt_logprobs=0), None),
        (SamplingParams(max_tokens=0), None),
        (SamplingParams(temperature=0, max_tokens=5), 1),  # cancelled in the middle of its prompt
    ],
)
def test_what_is_no_number_stays_in_no_slot(params, steps):
    """A key that is masked still meets a weight of zero, and NaN times zero is NaN."""
    model = poisoned(n_layers=2)
    engine = engine_of(model, slots=2, chunk=8)
    both = [[5], [6, 7, 8, 9, 10, 11]]
    expected = [r.tokens for r in answers(engine, both, GREEDY)]
    request = engine.submit([5, 6, 77, *range(20)], params)
    if steps is None:
        finish(engine)
    else:
        engine.step()
        engine.cancel(request, "enough")
    scored = params.prompt_logprobs is not None
    assert request.finish_reason == ("error" if scored else "length" if steps is None else "enough")
    assert scored == ("(its prompt) are not finite" in str(request.error))
    assert [r.tokens for r in answers(engine, both, GREEDY)] == expected
    assert not engine.runner.cache.v.isnan().any()


def failing(model, fails):
    """Have the model's forward raise what `fails(batch)` returns, for a batch of which it returns
    something."""
    real = model.hidden

    def hidden(tokens, positions, batch, cache):
        error = fails(batch)
        if error is not None:
            raise error
        return real(tokens, positions, batch, cache)

    model.hidden = hidden


@PATHS
def test_memory_that_runs_out_in_a_long_prompt_halves_its_share(path):
    model = small()
    expected = [r.tokens for r in answers(engine_of(model), [PROMPTS[0], [9] * 40], GREEDY)]
    large = torch.OutOfMemoryError("more than 20 rows")
    failing(model, lambda batch: large if sum(batch.counts) > 20 else None)
    engine = engine_of(model, path)
    first = engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    second = engine.submit([9] * 40, GREEDY)
    finish(engine)
    assert [first.tokens, second.tokens] == expected


def test_where_it_cannot_be_halved_the_youngest_request_ends_with_the_error():
    model = small()
    expected = [r.tokens for r in answers(engine_of(model), PROMPTS[:2], GREEDY)]
    large = torch.OutOfMemoryError("more than two sequences")
    engine = engine_of(model)
    requests = [engine.submit(p, GREEDY) for p in PROMPTS[:2]]
    engine.step()
    failing(model, lambda batch: large if len(batch.counts) > 2 else None)
    late = [engine.submit([40 + i] * 5, GREEDY) for i in range(2)]
    finish(engine)
    assert [r.tokens for r in requests] == expected
    assert [r.finish_reason for r in late] == ["error", "error"]
    assert all(isinstance(r.error, torch.OutOfMemoryError) for r in late)
    assert empty(engine)


def test_any_other_error_is_found_out_by_running_each_alone():
    model = small()
    expected = [r.tokens for r in answers(engine_of(model), PROMPTS, GREEDY)]
    engine = engine_of(model)
    failing(model, lambda batch: RuntimeError("eleven") if 11 in batch.lengths else None)
    requests = [engine.submit(p, GREEDY) for p in PROMPTS]
    sick = engine.submit([1] * 10, GREEDY)
    finish(engine)
    got = [r.finish_reason for r in requests]
    assert (sick.finish_reason, str(sick.error)) == ("error", "eleven")
    assert len(sick.tokens) == 1
    for request, tokens, reason in zip(requests, expected, got, strict=True):
        grows_to_eleven = len(request.prompt) + 8 > 11
        assert request.tokens == (tokens[: 11 - len(request.prompt)] if grows_to_eleven else tokens)
        assert reason == ("error" if grows_to_eleven else "length")


class OutOfResources(Exception):
    """As Triton's."""


OutOfResources.__module__ = "triton.runtime.errors"


class TooLarge(Emulated):
    """A captured step whose kernels need more than `room` of what its device gives."""

    room = 0

    def launch(self):
        if launch.multiprocessors_and_memory(self.device)[1] > self.room:
            raise OutOfResources("out of resource: shared memory")
        super().launch()


class TooLargeRunner(EmulatedRunner):
    made = TooLarge


@pytest.mark.parametrize(("room", "stays"), [(100_000, True), (0, False)])
def test_a_kernel_that_cannot_be_loaded_is_made_smaller_or_done_without(
    caplog, monkeypatch, room, stays
):
    monkeypatch.setattr(launch, "_less", {})
    monkeypatch.setattr(TooLarge, "room", room)
    model = small()
    expected = [r.tokens for r in answers(engine_of(model), PROMPTS, GREEDY)]
    engine = engine_of(model, runner=TooLargeRunner)
    requests = [engine.submit(p, GREEDY) for p in PROMPTS]
    finish(engine)
    assert [r.tokens for r in requests] == expected
    assert (engine.runner.captured is not None) == stays
    said = [r.message.split(":")[0] for r in caplog.records if r.levelname == "WARNING"]
    assert said == [] if stays else ["a kernel cannot be used here, running without"]


# ---- schedules


def play(model, path, seed, room=24):
    """Requests of every kind that arrive, are cancelled, fail and are interrupted at random; each
    must be what it is alone."""
    rng = random.Random(seed)
    engine = engine_of(
        model, path, slots=rng.choice([1, 2, 3, 5]), room=room, chunk=rng.choice([2, 5, 16, 64]),
        reuse=rng.random() < 0.3, stop_token_ids=(3, 50),
    )  # fmt: skip
    requests = []

    def arrive():
        prompt = [rng.randrange(70) for _ in range(rng.choice([1, 1, 2, 5, 9, 20]))]
        if rng.random() < 0.1:
            prompt[rng.randrange(len(prompt))] = 77
        if requests and rng.random() < 0.3:  # goes on with an earlier one
            earlier = rng.choice(requests)
            prompt = (earlier.prompt + earlier.tokens + prompt)[: room - 2]
        params = SamplingParams(
            temperature=rng.choice([0, 0, 0.8, 1.5]), top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 0, 5]), seed=rng.randrange(2**64),
            max_tokens=rng.choice([0, 1, 3, 8, None]), logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=rng.choice([None, None, None, 0, 2]),
            presence_penalty=rng.choice([0, 0, 1.0]),
            stop_token_ids=rng.choice([(), (), tuple(range(10, 50))]),
        )  # fmt: skip
        requests.append(engine.submit(prompt, params))

    for _ in range(rng.randrange(4, 40)):
        act = rng.random()
        if act < 0.3:
            arrive()
        elif act < 0.35 and requests:
            engine.cancel(rng.choice(requests), "cancelled")
        at = rng.randrange(1, 400) if act > 0.7 else 0
        with AtLine(at, interrupt), contextlib.suppress(KeyboardInterrupt):
            engine.step()
    finish(engine)
    assert empty(engine)
    assert not engine.runner.cache.k.isnan().any() or path == "captured"
    return requests, engine.stop_token_ids


def same(model, request, alone):
    """Whether tokens are equal; where they part, the two best must have been a tie but for
    rounding, which depends on the rows beside."""
    both = zip(request.tokens, alone.tokens, strict=False)
    at = next((i for i, (a, b) in enumerate(both) if a != b), None)
    if at is None:
        assert request.tokens == alone.tokens, (request.prompt, request.params)
        return True
    ids = request.prompt + alone.tokens[:at]
    logits = model(torch.tensor([ids]), 0)[0, -1:]
    rows = sampling.RowParams.from_params([request.params], [request.seed], logits.device)
    counts = sampling.count_tokens(torch.zeros_like(logits), [alone.tokens[:at]])
    logits = sampling.shifted(logits, rows, counts)
    if request.params.temperature:
        scaled = (logits - logits.amax()) / rows.temperature
        logits = scaled + sampling.gumbel(rows.seed, torch.tensor([at]), logits.shape[-1])
    ours, theirs = logits[0, request.tokens[at]], logits[0, alone.tokens[at]]
    assert abs(ours - theirs) < 1e-4, (request.prompt, request.params, at, ours, theirs)
    return False


def check_alone(model, path, seed):
    requests, stops = play(model, path, seed)
    for request in requests:
        engine = engine_of(model, slots=1, room=24, stop_token_ids=stops)
        alone = engine.submit(request.prompt, request.params)
        finish(engine)
        said = (seed, request.prompt, request.params)
        if request.finish_reason == "cancelled":
            assert request.tokens == alone.tokens[: len(request.tokens)], said
            continue
        if not same(model, request, alone):
            continue
        assert request.finish_reason == alone.finish_reason, said
        if request.finish_reason == "error":
            continue
        assert request.prompt_logprobs == pytest.approx(alone.prompt_logprobs, abs=1e-4), said
        ours, theirs = ([c.logprob for c in r.choices] for r in (request, alone))
        assert ours == pytest.approx(theirs, abs=1e-4), said


@PATHS
def test_random_schedules_give_each_request_what_it_gets_alone(path):
    for seed in range(40):
        check_alone(poisoned(), path, seed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@PATHS
def test_two_thousand_random_schedules_give_each_request_what_it_gets_alone(path):
    model = poisoned()
    for seed in range(1000, 2000):
        check_alone(model, path, seed)


def test_a_captured_step_that_goes_on_failing_is_tried_less_and_less_with_one_warning(caplog):
    model = small()
    expected = answers(engine_of(model), [[5, 6]], SamplingParams(temperature=0, max_tokens=40))
    engine, tries = engine_of(model, "captured"), []
    launch = engine.runner.captured.launch

    def fails(*_):
        tries.append(engine.steps)
        raise torch.OutOfMemoryError("no memory for a graph")

    engine.runner.captured.launch = fails
    request = engine.submit([5, 6], SamplingParams(temperature=0, max_tokens=40))
    for _ in range(20):
        engine.step()
    assert 3 <= len(tries) <= 6, tries
    assert len([r for r in caplog.records if "no memory for a graph" in r.getMessage()]) == 1
    engine.runner.captured.launch = launch
    finish(engine)
    assert request.tokens == expected[0].tokens
    assert engine.runner._failures == 0  # it was tried again
    caplog.clear()
