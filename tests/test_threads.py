"""Laws of several threads on one `Llama`, of calls that are interrupted, and of what is passed."""

import contextlib
import gc
import inspect
import math
import random
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from conftest import says
from test_engine_faults import AtLine, interrupt

import llama.generation
from llama import Llama
from llama.engine import owner
from llama.sampling import SamplingParams

BAD = 77  # a token that the model makes no numbers of
PROMPTS = ["Once upon", "a", "The quick brown fox", "zebra", ""]


@pytest.fixture
def shared(tiny_llama):
    """A function that makes a Llama of four slots in which one token is poison."""

    def make(**changes):
        llama = tiny_llama(max_batch_size=4, max_seq_len=96, n_layers=1, **changes)
        with torch.no_grad():
            llama.model.tok_embeddings.weight[BAD] = torch.nan
        return llama

    return make


def attempt(call):
    try:
        return call()
    except (ValueError, FloatingPointError) as error:
        return type(error).__name__


def left_early(llama, prompt, count, **options):
    stream = llama.stream_text_completion([prompt], **options)
    texts = []
    for piece in stream:
        texts.append((piece.text, piece.token))
        if len(texts) == count:
            break
    return texts


def calls(rng):
    """A call of every kind; what it raises counts as its answer: the model may come to say what it
    makes no numbers of."""
    call = any_call(rng)
    return lambda llama: attempt(lambda: call(llama))


def any_call(rng):
    """Ids, text, chat, streams that are left, and mistakes."""
    options = dict(temperature=rng.choice([0, 0.9]), seed=rng.randrange(1000))
    prompt, length = rng.choice(PROMPTS), rng.choice([1, 4, 9])
    kind = rng.randrange(7)
    if kind == 0:
        ids = [[rng.randrange(70) for _ in range(rng.choice([1, 5, 30]))] for _ in range(3)]
        return lambda m: m.generate(ids, length, logprobs=True, **options)
    if kind == 1:
        return lambda m: m.text_completion([prompt], max_gen_len=length, **options)
    if kind == 2:
        dialog = [{"role": "user", "content": prompt or "Hi"}]
        return lambda m: m.chat_completion([dialog], max_gen_len=length, **options)
    if kind == 3:
        return lambda m: left_early(m, prompt, 2, max_gen_len=9, **options)
    if kind == 4:
        return lambda m: attempt(lambda: m.generate([[5, BAD], [7]], 5, **options))
    if kind == 5:
        return lambda m: attempt(lambda: m.generate([[5], [5.5]], 5))
    return lambda m: list(
        m.stream([[1, 2, 3]], SamplingParams(max_tokens=length, logprobs=2, **options))
    )


def close(ours, theirs):
    """Equal, logprobs to 1e-5."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) < 1e-5
    if hasattr(ours, "__dataclass_fields__"):
        ours, theirs = vars(ours), vars(theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(close(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return ours == theirs


def on_threads(llama, jobs, seconds):
    """What the calls of each list answer, a thread for each list, all at one time."""
    got = [[] for _ in jobs]

    def work(own, out):
        for job in own:
            out.append(job(llama))

    workers = [
        threading.Thread(target=work, args=pair, daemon=True)
        for pair in zip(jobs, got, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds)
        assert not worker.is_alive(), "a call hangs"
    return got


def side_by_side(llama, alone, threads, count, seed):
    """`count` calls on each of several threads, against each call by itself."""
    rng = random.Random(seed)
    jobs = [[calls(rng) for _ in range(count)] for _ in range(threads)]
    expected = [[job(alone) for job in own] for own in jobs]
    got = on_threads(llama, jobs, 240)
    for ours, theirs in zip(got, expected, strict=True):
        for at, (mine, one) in enumerate(zip(ours, theirs, strict=True)):
            assert close(mine, one), (at, mine, one)
    llama.engine.step()
    assert llama.engine.idle
    assert not llama.engine._live


@pytest.fixture
def quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def test_threads_get_what_each_call_gets_alone(shared, quick_switches):
    side_by_side(shared(), shared(), 4, 15, seed=0)


def test_a_request_that_is_cancelled_as_it_turns_bad_leaves_nothing_in_its_slot(
    shared, monkeypatch
):
    """The cancel came between the step and the writing down of what it brought, which then counted
    as sound: the next request in the slot read what is no number, though masked."""
    prompts = [[7, 8, 9], [6] * 50]  # the longer one makes the other's slot be read so far
    expected = shared().generate(prompts, 5, 0)
    llama = shared()
    engine = llama.engine
    request = engine.submit([*[5] * 40, BAD], SamplingParams(max_tokens=5))
    plain = engine.runner.run

    def cancelled_meanwhile(share):
        outcomes = plain(share)
        engine.cancel(request, "cancelled")
        return outcomes

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "step", cancelled_meanwhile)
        engine.step()
    assert request.finish_reason == "cancelled"
    assert llama.generate(prompts, 5, 0) == expected


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_four_threads_of_two_hundred_calls_get_what_each_gets_alone(shared, quick_switches, seed):
    side_by_side(shared(), shared(), 4, 200, seed)


def test_threads_share_steps(shared):
    """Who holds the engine steps for everybody: eight threads take about the steps of one."""
    llama = shared()
    start = threading.Barrier(4)

    def work():
        start.wait()
        llama.generate([[1, 2, 3]], 40, 0)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert llama.engine.steps < 3 * 40


def test_who_does_not_read_on_holds_nobody_up(shared):
    llama = shared()
    expected = llama.generate([[4, 5]], 10, 0)
    stream = llama.stream_text_completion(["Once"], 0, max_gen_len=50)
    next(stream)
    out = []
    worker = threading.Thread(
        target=lambda: out.append(llama.generate([[4, 5]], 10, 0)), daemon=True
    )
    worker.start()
    worker.join(30)
    assert out == [expected]
    assert len(list(stream)) > 40


def test_a_stream_that_is_thrown_away_takes_no_lock(shared):
    """A finalizer runs in any thread at any moment, also in one that is inside the engine."""
    llama = shared()
    stream = llama.stream_text_completion(["Once"], 0, max_gen_len=50)
    next(stream)
    (request,) = llama.engine._live
    held, done = threading.Event(), threading.Event()

    def hold():
        with llama.engine._stepping, llama.owner._lock:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    began = time.monotonic()
    del stream
    gc.collect()
    waited = time.monotonic() - began
    done.set()
    holder.join()
    assert waited < 5
    assert request.finish_reason == "cancelled"


def test_an_error_reaches_its_own_caller_and_nobody_else(shared):
    llama = shared()
    good = llama.stream([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8))
    bad = llama.stream([[5, BAD]], SamplingParams(temperature=0, max_tokens=8))
    next(good)
    with pytest.raises(FloatingPointError, match="not finite"):
        next(bad)
    tokens = [piece.token for piece in good]
    reference = shared().generate([[5, 6, 7]], 8, 0)[0][0]
    assert tokens == reference[1:]


class Endless(Exception):
    pass


def interrupted_then_again(shared, lines):
    prompts = [[5, 6, 7], [9, 10]]
    expected = shared().generate(prompts, 4, 0)[0]
    paths = (llama.generation.__file__, owner.__file__)
    for at in lines:
        model = shared(seed=0)
        with AtLine(at, interrupt, paths) as hit, contextlib.suppress(KeyboardInterrupt):
            model.generate(prompts, 4, 0)
        if hit.hit is None:
            return at
        before = model.engine.steps
        assert model.generate(prompts, 4, 0)[0] == expected, hit.hit
        assert model.engine.steps - before <= 8, (hit.hit, "somebody else was still running")
        model.engine.step()
        assert not model.engine._live, hit.hit
    return None


def test_a_call_that_is_interrupted_at_any_line_leaves_nothing_behind(shared):
    interrupted_then_again(shared, range(1, 10**6, 23))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_call_that_is_interrupted_at_every_line_leaves_nothing_behind(shared):
    interrupted_then_again(shared, range(1, 10**6))


def test_of_several_ranks_one_thread_calls(tiny_llama):
    """Ranks would see the calls of several threads in different orders."""
    llama = tiny_llama()
    llama.owner.ranks = 2
    stream = llama.stream([[1, 2]], SamplingParams(temperature=0, max_tokens=20))
    next(stream)
    errors = []

    def work():
        try:
            llama.generate([[3]], 2, 0)
        except RuntimeError as error:
            errors.append(str(error))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(30)
    assert len(errors) == 1
    assert "cut over 2 ranks and another thread is using it" in errors[0]
    assert len(list(stream)) == 19
    work()  # nobody else is on it now
    assert len(errors) == 1


# ---- what people pass


def test_ids_of_numpy_and_torch_and_iterables_of_prompts_are_taken(shared):
    llama = shared()
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = llama.generate(rows, 4, 0, echo=True)
    for prompts in (
        numpy.array(rows), torch.tensor(rows), tuple(map(tuple, rows)), (row for row in rows),
        [numpy.array(row, dtype=numpy.int32) for row in rows], [torch.tensor(row) for row in rows],
        [[numpy.int64(i) for i in row] for row in rows], [iter(row) for row in rows],
        [list(torch.tensor(row)) for row in rows], [range(1, 4), range(4, 7)],
    ):  # fmt: skip
        got = llama.generate(prompts, 4, 0, echo=True)
        assert got == expected
        assert {type(i) for row in got[0] for i in row} == {int}
    texts = llama.text_completion(["a", "b"], 0, max_gen_len=3)
    assert llama.text_completion((p for p in "ab"), 0, max_gen_len=3) == texts
    assert llama.text_completion(numpy.array(["a", "b"]), 0, max_gen_len=3) == texts
    dialogs = [[{"role": "user", "content": "x"}]]
    chats = llama.chat_completion(dialogs, 0, max_gen_len=3)
    assert llama.chat_completion(iter(dialogs), 0, max_gen_len=3) == chats


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([1, 2, 3], 4), r"prompt 0: the prompt is 1; it must be a list"),
        (lambda m: m.generate(torch.tensor([1, 2, 3]), 4), r"prompt 0: the prompt is 1; it must"),
        (lambda m: m.generate(torch.tensor(3), 4), r"prompt_tokens is tensor\(3\); it must be"),
        (lambda m: m.generate("abc", 4), "prompt_tokens is 'abc'; it must be a list"),
        (lambda m: m.generate(["abc"], 4), "prompt 0: the prompt is 'abc'; it must be a list of"),
        (lambda m: m.generate(None, 4), "prompt_tokens is None; it must be a list"),
        (lambda m: m.generate([[1], [2.0]], 4), r"prompt 1: the prompt has 2.0 in it; token ids"),
        (lambda m: m.generate([numpy.array([1.0])], 4), r"prompt 0: the prompt has 1.0 in it"),
        (lambda m: m.generate([torch.tensor([[1]])], 4), r"prompt 0: the prompt has \[1\] in it"),
        (lambda m: m.generate([[1, None]], 4), r"prompt 0: the prompt has None in it"),
        (lambda m: m.generate([[True]], 4), r"prompt 0: the prompt has True in it"),
        (lambda m: m.generate([{"a": 1}], 4), r"prompt 0: the prompt is {'a': 1}; it must"),
        (lambda m: m.generate([[1]], 4, logprobs=5), r"logprobs is 5; .*SamplingParams\("),
        (lambda m: m.generate([[1]], 4, echo=1), "echo is 1; it must be True or False"),
        (lambda m: m.generate([[1]], 4.5), "max_gen_len is 4.5; it must be an int >= 0"),
        (lambda m: m.generate([[1]], True), "max_gen_len is True; it must be an int >= 0"),
        (lambda m: m.generate([[1]], 4, seed=1.5), "seed is 1.5; it must be an int or None"),
        (lambda m: m.generate([[1]], 4, stop_token_ids=7), "stop_token_ids is 7; it must be"),
        (lambda m: m.text_completion(["a"], logprobs=3), "logprobs is 3; it must be True or False"),
        (lambda m: m.text_completion({"a": 1}), "prompts is {'a': 1}; it must be a list"),
        (lambda m: m.text_completion(b"a"), "prompts is b'a'; it must be a list"),
        (lambda m: m.text_completion([b"a"]), r"prompts is \[b'a'\]; it must be a list of strings"),
        (lambda m: m.chat_completion("Hi"), "dialogs is 'Hi'; it must be a list"),
        (lambda m: m.chat_completion([{"role": "user", "content": "x"}]), "dialog 0: "),
        (lambda m: m.chat_completion([["x"]]), "dialog 0: "),
        (lambda m: m.chat_completion([None]), "dialog 0: "),
    ],
)  # fmt: skip
def test_anything_else_is_refused_before_it_is_queued_and_the_next_call_works(
    shared, call, message
):
    """Ids that were floats used to stay in the engine and fail every later call."""
    llama = shared()
    with pytest.raises(ValueError, match=message):
        call(llama)
    assert not llama.engine._live
    assert len(llama.generate([[1, 2]], 3, 0)[0][0]) == 3


def test_numbers_of_numpy_are_taken_wherever_a_number_is(shared):
    llama = shared()
    plain = dict(max_gen_len=6, temperature=0.5, top_p=0.9, seed=3, top_k=40)
    expected = llama.text_completion(["abc"], logprobs=True, **plain)
    for change in (
        dict(temperature=numpy.float64(0.5)), dict(temperature=torch.tensor(0.5)),
        dict(top_p=numpy.float64(0.9)), dict(top_k=numpy.int64(40)), dict(seed=numpy.int64(3)),
        dict(max_gen_len=numpy.int32(6)), dict(max_gen_len=torch.tensor(6)),
        dict(seed=numpy.array([3])), dict(seed=torch.tensor([3])), dict(seed=torch.tensor(3)),
    ):  # fmt: skip
        assert (
            llama.text_completion(["abc"], logprobs=numpy.bool_(True), **{**plain, **change})
            == expected
        )
    stops = numpy.array([65, 66])
    assert llama.generate([[1]], 5, 0, stop_token_ids=stops) == llama.generate(
        [[1]], 5, 0, stop_token_ids=[65, 66]
    )


@contextlib.contextmanager
def default(get, put, value):
    before = get()
    put(value)
    yield
    put(before)


AROUND = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64 by default": partial(
        default, torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "float16 by default": partial(
        default, torch.get_default_dtype, torch.set_default_dtype, torch.float16
    ),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "meta by default": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_torch_is_told_around_a_call_it_answers_the_same(
    tiny, byte_tokenizer, around, dtype
):
    llama = Llama(tiny(vocab_size=512).to(dtype), byte_tokenizer)

    def answers():
        params = SamplingParams(max_tokens=6, seed=1, logprobs=2, prompt_logprobs=1, top_k=50,
                                presence_penalty=0.5, logit_bias={5: 1.0})  # fmt: skip
        return llama.generate([[1, 2, 3]], 5, 0, logprobs=True), list(
            llama.stream([[7, 8]], params)
        )

    expected = answers()
    with AROUND[around]():
        assert answers() == expected
    assert answers() == expected


def test_a_stream_keeps_the_seed_of_its_params_and_hands_out_alternatives(tiny_llama):
    llama = tiny_llama()
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=9, seed=7, logprobs=3)
    first, second, other = (
        list(llama.stream([[1, 2], [3]], replace(params, seed=seed))) for seed in (7, 7, 8)
    )
    assert first == second != other
    assert first == list(llama.stream([[1, 2], [3]], replace(params, seed=None), seed=7))
    assert all(len(p.top_logprobs) == 3 and p.logprob <= p.top_logprobs[0][1] for p in first)
    pieces = list(llama.stream([[1, 2, 3]], params, echo=True))
    assert [len(p.top_logprobs) for p in pieces[:4]] == [0, 3, 3, 3]
    assert [p.logprob for p in pieces[:3]] == llama.generate(
        [[1, 2, 3]], 0, logprobs=True, echo=True
    )[1][0]
    bare = list(llama.stream([[1, 2, 3]], replace(params, logprobs=None), echo=True))
    assert all(p.logprob is None and p.top_logprobs is None for p in bare)


def test_a_thread_that_was_interrupted_at_any_line_holds_nobody_up(shared, monkeypatch):
    monkeypatch.setattr(owner, "PATIENCE", 0.05)
    expected = shared().generate([[5, 6, 7]], 3, 0)
    paths = (llama.generation.__file__, owner.__file__)
    first, count = inspect.getsourcelines(owner.Owner._step)[1], 0
    stops = {first + at for at in range(len(inspect.getsourcelines(owner.Owner._step)[0]))}
    for at in range(1, 10**6):
        model = shared()
        with AtLine(at, interrupt, paths) as hit, contextlib.suppress(KeyboardInterrupt):
            model.generate([[1, 2]], 2, 0)
        if hit.hit is None:
            break
        name, line = hit.hit.split(":")
        if name != "owner.py" or int(line) not in stops:
            continue
        count += 1
        got = []
        worker = threading.Thread(
            target=lambda m=model, out=got: out.append(m.generate([[5, 6, 7]], 3, 0)), daemon=True
        )
        worker.start()
        worker.join(30)
        assert got == [expected], hit.hit
    assert count > 5, count


def test_a_call_that_failed_leaves_nothing_behind_while_its_exception_is_kept(shared):
    model = shared()

    def broken(token):
        raise Endless

    model.tokenizer.token_bytes, whole = broken, model.tokenizer.token_bytes
    with pytest.raises(Endless) as kept:
        model.text_completion(["ab"], 0, max_gen_len=40)
    model.tokenizer.token_bytes = whole
    model.engine.step()
    assert model.engine.idle
    assert kept.value.__traceback__ is not None


def test_a_text_that_is_kept_up_by_another_thread_ends_where_it_ends_alone(scripted):
    """Behind the stop string its request goes on until somebody reads it, and may even fail."""
    llama = scripted(says("one stop two three", 2))
    made = llama.model.logits

    def logits(h):
        out = made(h)
        out[h[:, 1] >= 12] = math.nan
        return out

    llama.model.logits = logits
    stream = llama.stream([[1, 2]], SamplingParams(temperature=0), stop="stop")
    pieces = [next(stream)]
    while not llama.engine.idle:
        llama.engine.step()
    pieces += stream
    assert "".join(piece.text for piece in pieces) == "one "
    assert pieces[-1].finish_reason == "stop"


def test_a_call_that_is_refused_draws_no_seed(shared):
    ours, fresh = shared(), shared()
    for call in (
        lambda: ours.generate([[1], [10**6]], 2),
        lambda: ours.text_completion(["a"], stop=[""]),
        lambda: ours.chat_completion([[{"role": "user", "content": "a"}]], logprobs=5),
    ):
        with pytest.raises(ValueError, match=r"must be|ids go"):
            call()
    ours.stream([[1]], SamplingParams(max_tokens=2))  # nor one that nobody reads
    assert ours.generate([[1]], 8, 1.5) == fresh.generate([[1]], 8, 1.5)


@pytest.mark.parametrize("stop", [5, True, 0, ["a", 5], [""], "", b"a"])
def test_stop_is_a_string_or_several(tiny_llama, stop):
    with pytest.raises(ValueError, match=r"stop is .*must be a string or several"):
        tiny_llama().text_completion(["a"], stop=stop)


def test_several_stops_may_come_as_any_collection(tiny_llama):
    model = tiny_llama()
    expected = model.text_completion(["a"], 0, stop=["x", "y"])
    for stop in (numpy.array(["x", "y"]), {"x", "y"}, iter(["x", "y"])):
        assert model.text_completion(["a"], 0, stop=stop) == expected


@pytest.mark.parametrize("prompt", [{1, 2}, frozenset({3}), {1: 2}, [torch.tensor(True)]])
def test_ids_without_an_order_and_truths_are_refused(tiny_llama, prompt):
    with pytest.raises(ValueError, match=r"prompt 0: the prompt (is|has)"):
        tiny_llama().generate([prompt], 2)
    with pytest.raises(ValueError, match="must be"):
        tiny_llama().text_completion({"a", "b"})
    with pytest.raises(ValueError, match="max_gen_len is"):
        tiny_llama().text_completion(["a"], max_gen_len=torch.tensor(True))


@pytest.mark.parametrize("seed", [numpy.int64(7), torch.tensor(7)])
def test_the_seed_of_an_instance_may_be_a_number_of_numpy_or_torch(tiny_llama, seed):
    model = tiny_llama()
    ours, expected = (Llama(model.model, model.tokenizer, seed=s) for s in (seed, 7))
    assert ours.generate([[1]], 8, 1.5) == expected.generate([[1]], 8, 1.5)


def test_forward_works_in_every_mode_of_torch_and_after_the_model_was_moved(tiny):
    model, ids = tiny(), torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        whole = tiny()(ids)
    with torch.inference_mode():
        model(ids[:, :2])
    with torch.no_grad():
        assert torch.allclose(model(ids[:, 2:4], 2), whole[:, 2:4], atol=1e-5)
        model.to(torch.bfloat16)
        later = model(ids[:, 4:], 4)
    assert later.dtype == torch.float32
    assert torch.allclose(later, whole[:, 4:], atol=0.2)
