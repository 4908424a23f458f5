"""The captured step against the plain engine: in Triton's interpreter, where nothing is captured
but the same step runs, and on a GPU where there is one."""

import contextlib
import sys
import threading

import pytest
import torch
from conftest import tiny_args, unit_scale

pytest.importorskip("triton", reason="triton is not installed")

import triton

from llama.cache import Batch
from llama.cuda import launch
from llama.cuda import step as steps
from llama.cuda.attention import decode as attention
from llama.cuda.products import dispatch
from llama.cuda.runner import CapturedRunner
from llama.cuda.step import FLIGHTS, CapturedStep, Row
from llama.cuda.tuning import DecodeAttention as AttentionBlocks
from llama.cuda.tuning import gemm_blocks
from llama.engine import Engine
from llama.engine.runner import PlainRunner
from llama.model import Transformer
from llama.sampling import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small_blocks(rows, outputs, inputs, kind):
    """Many outputs for a program."""
    return gemm_blocks(rows, outputs, inputs, kind)._replace(block_n=64)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one program after the other, also those that have nothing to do."""
    if DEVICE.type == "cpu":
        blocks = AttentionBlocks(2, 16, 2, 4, ahead=16)
        monkeypatch.setattr(attention, "decode_attention_blocks", lambda *_: blocks)
        monkeypatch.setattr(dispatch, "gemm_blocks", small_blocks)


def small(seed=0, **changes):
    """A model whose products are few in the interpreter."""
    shape = dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=16, hidden_dim=48)
    return unit_scale(Transformer(tiny_args(**{**shape, **changes})), seed).to(DEVICE)


def engine_of(model, kernels, slots=4, stop=(), longest=64):
    made = CapturedRunner if kernels else PlainRunner
    return Engine(made(model, model.new_cache(slots, longest)), stop_token_ids=stop, seed=5)


def answers(engine, prompts, params):
    """Tokens, logprobs, alternatives and ends of each prompt."""
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    requests = [engine.submit(p, q) for p, q in zip(prompts, params, strict=True)]
    found = {r: [] for r in requests}
    while not engine.idle:
        for event in engine.step():
            found[event.request].append(event)
    return [
        (
            r.tokens,
            [e.logprob for e in found[r] if e.token is not None],
            [e.top_logprobs for e in found[r] if e.token is not None],
            r.finish_reason,
        )
        for r in requests
    ]


def check(ours, expected):
    for mine, plain in zip(ours, expected, strict=True):
        assert mine[0] == plain[0]
        assert mine[1] == pytest.approx(plain[1], abs=1e-5)
        for left, right in zip(mine[2], plain[2], strict=True):
            assert (left is None) == (right is None)
            for (i, p), (j, q) in zip(left or [], right or [], strict=True):
                assert i == j
                assert p == pytest.approx(q, abs=1e-5)
        assert mine[3] == plain[3]


PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [20, 30], [40, 41, 42]]
GREEDY = SamplingParams(temperature=0, max_tokens=9)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 2},
        {"n_kv_heads": 4},
        {"head_dim": 32, "tied": True},
        {"dim": 48, "hidden_dim": 80},
        {"head_dim": 96},
        {"head_dim": 100, "n_heads": 2},
        {"head_dim": 18, "n_kv_heads": 2},
    ],
)
def test_a_captured_row_is_the_plain_one(changes):
    model = small(**changes)
    plain = answers(engine_of(model, False), PROMPTS[:1], GREEDY)
    check(answers(engine_of(model, True), PROMPTS[:1], GREEDY), plain)


def test_more_prompts_than_slots_with_ends_of_every_kind():
    model = small()
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=3 + 4 * (i % 3)) for i in range(5)]
    plain = answers(engine_of(model, False, 3), PROMPTS, params)
    stops = {plain[0][0][2], plain[2][0][5]}  # ids that end two of them early
    plain = answers(engine_of(model, False, 3, stops), PROMPTS, params)
    assert {p[3] for p in plain} == {"stop", "length"}
    check(answers(engine_of(model, True, 3, stops), PROMPTS, params), plain)


def test_a_sequence_that_fills_its_slot():
    model = small()
    params = SamplingParams(temperature=0)
    plain = answers(engine_of(model, False, 2, longest=12), PROMPTS[:3], params)
    check(answers(engine_of(model, True, 2, longest=12), PROMPTS[:3], params), plain)


SHIFTED = [
    SamplingParams(temperature=0.9, seed=1, presence_penalty=1.5, max_tokens=7),
    SamplingParams(temperature=0, frequency_penalty=2.0, max_tokens=7, logprobs=3),
    SamplingParams(temperature=1.2, seed=2, top_k=5, max_tokens=5, logit_bias={3: 4.0, 7: -9.0}),
    SamplingParams(temperature=1.0, seed=3, min_p=0.2, max_tokens=6, logprobs=1),
    SamplingParams(temperature=0.7, seed=4, top_p=0.8, max_tokens=6),
]


def test_penalties_biases_filters_and_alternatives():
    model = small()
    plain = answers(engine_of(model, False), PROMPTS, SHIFTED)
    check(answers(engine_of(model, True), PROMPTS, SHIFTED), plain)


def test_more_stop_ids_than_the_device_knows():
    model = small()
    plain = answers(engine_of(model, False, 2), PROMPTS, GREEDY)
    last = {*range(50, 90), plain[0][0][3]}  # sorted behind those that fit
    params = [SamplingParams(temperature=0, max_tokens=9, stop_token_ids=tuple(last))] * 5
    plain = answers(engine_of(model, False, 2), PROMPTS, params)
    check(answers(engine_of(model, True, 2), PROMPTS, params), plain)


def test_a_request_that_comes_late_and_one_that_is_cancelled():
    model = small()
    alone = [answers(engine_of(model, False), [p], GREEDY)[0][0] for p in PROMPTS]
    engine = engine_of(model, True, 3)
    first, second = engine.submit(PROMPTS[0], GREEDY), engine.submit(PROMPTS[1], GREEDY)
    for _ in range(4):
        engine.step()
    late = engine.submit(PROMPTS[2], GREEDY)
    for _ in range(3):
        engine.step()
    engine.cancel(second, "enough")
    again = engine.submit(PROMPTS[3], GREEDY)  # in the slot of the one that was cancelled
    while not engine.idle:
        engine.step()
    assert [first.tokens, late.tokens, again.tokens] == [alone[0], alone[2], alone[3]]
    assert second.tokens == alone[1][: len(second.tokens)]
    assert len(second.tokens) < len(alone[1])
    assert second.finish_reason == "enough"


def test_logits_that_are_not_finite_end_their_request_alone(monkeypatch):
    model = small()
    alone = answers(engine_of(model, False), PROMPTS[:1], GREEDY)[0][0]
    engine = engine_of(model, True, 2)
    good, bad = engine.submit(PROMPTS[0], GREEDY), engine.submit(PROMPTS[1], GREEDY)
    for _ in range(3):
        engine.step()
    engine.runner.cache.k[0, bad.slot, 0] = float("nan")
    engine.step()  # was in flight before
    engine.step()
    assert bad.finish_reason == "error"
    assert "not finite" in str(bad.error)
    while not engine.idle:
        engine.step()
    assert good.tokens == alone


def test_an_interrupted_step_happens_again(monkeypatch):
    model = small()
    alone = answers(engine_of(model, False), PROMPTS[:2], GREEDY)
    engine = engine_of(model, True, 2)
    requests = [engine.submit(p, GREEDY) for p in PROMPTS[:2]]
    for _ in range(3):
        engine.step()
    read = CapturedStep.read

    def interrupted(self):
        monkeypatch.setattr(CapturedStep, "read", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(CapturedStep, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while not engine.idle:
        engine.step()
    assert [r.tokens for r in requests] == [a[0] for a in alone]


def test_as_many_steps_as_may_be_in_flight_keep_their_results_apart():
    model = small()
    alone = answers(engine_of(model, False), [[5]], SamplingParams(temperature=0, max_tokens=25))
    step = CapturedStep(model, model.new_cache(1, 64), 2)
    step.load([Row(5, 0, 0, (), 99, 0, SamplingParams(temperature=0), ())])
    tokens = []
    for ahead in (1, FLIGHTS, 3, FLIGHTS, 5):
        for _ in range(ahead):
            step.launch()
        tokens += [step.read()[0].token for _ in range(ahead)]
    assert tokens == alone[0][0]
    for _ in range(FLIGHTS):
        step.launch()
    with pytest.raises(AssertionError):  # the ninth would write where the first one's wait
        step.launch()


def test_rows_that_share_a_slot_are_tokens_of_one_sequence():
    """What speculation needs: several tokens of a sequence in one step, each seeing the others."""
    model = small()
    tokens = [5, 6, 7, 8, 9]
    cache = model.new_cache(2, 16)
    step = CapturedStep(model, cache, 4)
    plain = model.new_cache(2, 16)
    positions = torch.arange(5, device=DEVICE)
    ids = torch.tensor(tokens, device=DEVICE)
    logits = model.forward_flat(ids, positions, Batch([5], [5], [1], DEVICE), plain)
    params = SamplingParams(temperature=0)
    first = Row(tokens[0], 0, 1, (), 9, 0, params, ())
    step.load([first])
    step.launch()
    step.read()
    rows = [Row(tokens[i], i, 1, (), 9, 0, params, ()) for i in range(1, 5)]
    step.load(rows)
    step.launch()
    assert [o.token for o in step.read()] == logits[1:].argmax(-1).tolist()
    torch.testing.assert_close(cache.k[:, 1, :5], plain.k[:, 1, :5], rtol=1e-4, atol=1e-5)


def test_a_mask_bounds_the_choice_and_not_the_logprob():
    """What structured output needs: a bit for each token of the vocabulary, changed as it goes."""
    model = small()
    step = CapturedStep(model, model.new_cache(1, 8), 1)
    row = Row(5, 0, 0, (), 9, 0, SamplingParams(temperature=0), ())
    step.load([row])
    step.launch()
    free = step.read()[0]
    logprobs = step.scratch.logits[0].log_softmax(-1)
    others = [t for t in (3, 40, 71) if t != free.token]
    step.load([row], masked=True)
    step.sampler.mask[:] = 0
    for token in others:
        step.sampler.mask[0, token // 32] |= 1 << token % 32
    step.launch()
    bound = step.read()[0]
    best = max(others, key=lambda t: float(logprobs[t]))
    assert bound.token == best != free.token
    assert bound.logprob == pytest.approx(float(logprobs[best]), abs=1e-5)


def test_compiling_that_was_interrupted_can_begin_again(monkeypatch):
    """Ctrl-C in a chat's first answer: the second was told that a mode of Triton's is active."""

    def interrupted(*_):
        raise KeyboardInterrupt

    device = torch.device("cuda:0")
    monkeypatch.setattr(launch, "current", lambda device: contextlib.nullcontext())
    with monkeypatch.context() as patch:
        patch.setattr(triton.AsyncCompileMode, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch.compile_together(lambda: None, device)
    seen = []
    launch.compile_together(lambda: seen.append(launch._gathered.get()), device)
    assert seen == [[]]
    assert launch._gathered.get() is None


class Counted:
    """A kernel that counts how often it ran, and how often it was compiled only."""

    ran = compiled = 0

    def __getitem__(self, grid):
        return lambda *args: setattr(self, "ran", self.ran + 1)

    def warmup(self, *args, grid):
        self.compiled += 1
        return type("Compiled", (), {"run": None})()


def test_kernels_of_other_threads_run_while_one_compiles(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(launch, "index_of", lambda device: 0)
    kernel, inside, go = Counted(), threading.Event(), threading.Event()

    def compiled():
        launch.launch(kernel, (1,))(1)
        inside.set()
        assert go.wait(10)
        launch.launch(kernel, (1,))(1)

    thread = threading.Thread(
        target=launch.compile_together, args=(compiled, torch.device("cpu")), daemon=True
    )
    thread.start()
    assert inside.wait(10)
    launch.launch(kernel, (1,))(1)
    assert (kernel.ran, kernel.compiled) == (1, 1)
    go.set()
    thread.join()
    launch.launch(kernel, (1,))(1)
    assert (kernel.ran, kernel.compiled) == (2, 2)


# ---- the device that a step is on


def test_a_method_runs_where_its_device_is_the_current_one(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: mock_device(entered, device))

    class Held:
        def __init__(self, device):
            self.device = torch.device(device)

        @launch.on_its_device
        def method(self, a, *, b):
            return entered.copy(), a, b

    assert Held("cuda:1").method(1, b=2) == ([torch.device("cuda:1")], 1, 2)
    assert entered == []
    assert Held("cpu").method(1, b=2) == ([], 1, 2)


@contextlib.contextmanager
def mock_device(entered, device):
    entered.append(device)
    try:
        yield
    finally:
        entered.remove(device)


@pytest.fixture
def elsewhere(monkeypatch):
    """Refuses a kernel's launch where the model's device is not the current one."""
    entered = []
    monkeypatch.setattr(launch, "current", lambda device: mock_device(entered, device))
    real = launch.launch

    def watched(kernel, grid):
        assert entered, f"{kernel} is launched on whichever device is the current one"
        assert set(entered) == {DEVICE}
        return real(kernel, grid)

    rooms = [sys.modules[name] for name in sys.modules if name.startswith("llama.cuda.")]
    for room in rooms:
        if getattr(room, "launch", None) is real:
            monkeypatch.setattr(room, "launch", watched)
    return entered


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is not there is stood in for")
def test_steps_and_prompts_launch_on_their_own_device(elsewhere):
    model = small()
    engine = engine_of(model, True)
    params = [*SHIFTED[:2], GREEDY, SHIFTED[4], GREEDY]
    found = answers(engine, [[*PROMPTS[0]], *PROMPTS[1:]], params)
    assert all(tokens for tokens, *_ in found)
    assert not elsewhere
    with pytest.raises(AssertionError, match="whichever device is the current one"):
        engine.runner.captured.sampler(
            torch.zeros(1, 96), torch.zeros(1, dtype=torch.int64), rows=1
        )


def test_a_graph_is_captured_on_a_stream_of_its_own_and_by_its_thread_alone(monkeypatch):
    """Whatever other threads do with the GPU meanwhile is theirs."""
    model = small()
    step = CapturedStep(model, model.new_cache(1, 8), 1)
    step.load([Row(5, 0, 0, (), 9, 0, SamplingParams(temperature=0), ())])
    step.stream = object()
    seen = []

    @contextlib.contextmanager
    def graph(made, **options):
        seen.append((made, options))
        yield

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(steps, "compile_together", lambda function, device: None)
    key = steps.Key(1, None, False, False, True)
    step._capture(key)
    options = {"pool": None, "stream": step.stream, "capture_error_mode": "thread_local"}
    assert seen == [("graph", options)]
    assert step.graphs == {key: "graph"}


# ---- rows of the vocabulary that no token has


@pytest.mark.parametrize("padding", [8, 56])
def test_ids_beyond_the_words_are_never_chosen_by_a_step(padding):
    """Lean, greedy and full steps; logprobs and alternatives stay those of all rows."""
    model, words = small(), 96 - padding
    with torch.no_grad():
        model.output.weight[words:] *= 20
    params = [GREEDY, *SHIFTED, SamplingParams(temperature=1.0, top_p=1.0, seed=3, max_tokens=7)]
    for some in ([GREEDY] * 2, [params[-1]] * 2, params):
        cache = model.new_cache(8, 64)
        step = CapturedStep(model, cache, 8, words)
        rows = [Row(5 + i, 0, i, (), 9, i, p, ()) for i, p in enumerate(some)]
        step.load(rows)
        for _ in range(3):
            step.launch()
        for _ in range(3):
            found = step.read()[: len(rows)]
            assert all(outcome.token < words for outcome in found)
        logprobs = step.scratch.logits[0].log_softmax(-1)
        assert found[0].logprob == pytest.approx(float(logprobs[found[0].token]), abs=1e-4)
        tops = [token for outcome in found for token, _ in outcome.top]
        assert not tops or max(tops) >= words
    assert any(o.token >= words for o in unbounded(model, params))


def unbounded(model, params):
    step = CapturedStep(model, model.new_cache(8, 64), 8)
    step.load([Row(5 + i, 0, i, (), 9, i, p, ()) for i, p in enumerate(params)])
    step.launch()
    return step.read()[: len(params)]


def test_a_row_behind_the_end_of_its_slot_is_refused():
    model = small()
    step = CapturedStep(model, model.new_cache(2, 8), 2)
    params = SamplingParams(temperature=0)
    step.load([Row(5, 7, 0, (), 9, 0, params, ())])
    with pytest.raises(AssertionError):
        step.load([Row(5, 7, 0, (), 9, 0, params, ()), Row(5, 8, 1, (), 9, 0, params, ())])
