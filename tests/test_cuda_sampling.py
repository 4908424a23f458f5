"""The sampler of a captured step against the plain one: in Triton's interpreter on small
vocabularies, through the compiler for what a GPU would run, and on a GPU (-m gpu) at real sizes.

R rows   V vocabulary
"""

import ast
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from llama.cuda import launch
from llama.cuda.sampling import lean as sampling
from llama.cuda.sampling.lean import Sampler
from llama.sampling import RowParams, SamplingParams, finite_rows, logprobs_of, sample, survivors

ROOT = Path(__file__).parent.parent
KERNELS = ("_peaks", "_weigh", "_narrow", "_draw", "_pick")
CPU = torch.device("cpu")
INF = math.inf
GREEDY, PLAIN, USUAL, HOT, FEW, ONE = (0, 0.9), (1, 1.0), (0.6, 0.9), (2, 0.98), (1, 0.3), (1, 1e-7)
MIXED = (GREEDY, PLAIN, USUAL, HOT, FEW, ONE)
SEED = 0x9E3779B97F4A7C15

needs_interpreter = pytest.mark.skipif(
    not launch.INTERPRETED, reason="kernels run on the GPU here: see the tests marked gpu"
)


@pytest.fixture
def small(monkeypatch):
    """Several blocks to a program and several programs to a row, though tokens are few."""
    monkeypatch.setattr(sampling, "BLOCK", 64)
    monkeypatch.setattr(sampling, "PROGRAMS", 2 * len(MIXED))


class Case:
    """Logits (R, V), a (temperature, top_p) for each row, and what either sampler makes of them."""

    def __init__(self, logits, pairs, *, index=3, allowed=None, words=None):
        self.logits, self.device, self.allowed = logits, logits.device, allowed
        self.words = words
        params = [
            SamplingParams(temperature=t, top_p=p, seed=SEED * (i + 1))
            for i, (t, p) in enumerate(pairs)
        ]
        self.rows = RowParams.from_params(params, [p.seed for p in params], self.device)
        self.temperature = torch.tensor([p.temperature for p in params], device=self.device)
        self.index = index + torch.arange(len(logits), device=self.device)

    def plain(self):
        """ids, and the model's own logprobs of them; and whether logits are finite. Logprobs in
        float64: over 128256 tokens float32 on a CPU is off by 2e-5."""
        barred = self.logits
        if self.allowed is not None:
            barred = torch.where(self.allowed, self.logits, -INF)
        ids = sample(barred, self.rows, self.index, words=self.words)
        logprob = logprobs_of(self.logits.double(), ids, 0)[0].float()
        return ids, logprob, finite_rows(self.logits)

    def sampler(self, spare=1):
        """A sampler with these parameters, everything else in it being nonsense."""
        count, vocab = self.logits.shape
        made = Sampler(count + spare, vocab, self.device, self.words)
        mine = made._scratch
        for scratch in (mine.keys, mine.bins, mine.best, mine.found, made.seed, made.top_p):
            scratch.random_()
        for scratch in (mine.peaks, mine.sums, made.logprob, made.temperature):
            scratch.fill_(math.nan)
        for scratch in (made.ids, made.finite):
            scratch.fill_(-7)
        self.fill(made)
        return made

    def fill(self, made):
        count, vocab = self.logits.shape
        made.temperature[:count] = self.temperature
        made.top_p[:count] = self.rows.top_p[:, 0]
        made.seed[:count] = self.rows.seed
        if self.allowed is not None:
            bits = torch.zeros(count, -(-vocab // 32) * 32, dtype=torch.int64, device=self.device)
            bits[:, :vocab] = self.allowed
            words = bits.view(count, -1, 32) << torch.arange(32, device=self.device)
            made.mask[:count] = words.sum(-1).to(torch.int32)

    def call(self, made):
        greedy = bool((self.temperature == 0).all())
        masked = self.allowed is not None
        made(self.logits, self.index, rows=len(self.logits), masked=masked, greedy=greedy)
        count = len(self.logits)
        return made.ids[:count], made.logprob[:count], made.finite[:count]

    def check(self):
        made = self.sampler()
        before = self.logits.clone()
        ids, logprob, finite = self.call(made)
        expected, expected_logprob, expected_finite = self.plain()
        assert ids.tolist() == expected.tolist()
        assert torch.allclose(logprob, expected_logprob, rtol=0, atol=1e-5)
        assert finite.tolist() == expected_finite.int().tolist() == [1] * len(ids)
        assert (made.ids[-1], made.finite[-1]) == (-7, -7), "a row that was not asked for"
        assert made.logprob[-1].isnan(), "a row that was not asked for"
        assert torch.equal(self.logits, before)


def normal(rows, vocab, seed=0, spread=3.0, device=CPU):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * spread).to(device)


def shapes_of_logits(rows, vocab):
    """Rows of every kind that is hard on one of the steps: name -> (R, V)."""
    peaked, some = normal(rows, vocab), normal(rows, vocab)
    peaked[:, vocab // 2] = 60.0
    some[normal(rows, vocab, seed=1) < 2] = -INF
    some[:, vocab - 1] = 0.0
    return {
        "normal": normal(rows, vocab),
        "flat": torch.full((rows, vocab), -3.5),
        "peaked": peaked,
        "tied": (normal(rows, vocab) / 2).round(),
        # neighbours differ in the lowest bits of their odds only: the third digit tells them apart
        "close": (torch.arange(vocab) * -(2.0**-21)).flip(0).expand(rows, vocab).contiguous(),
        "impossible": some,
        "zeros": torch.where(normal(rows, vocab) > 0, 0.0, -0.0),  # the first is a -0.0
        "huge": normal(rows, vocab, spread=1e37),
    }


# ---- the law: the fast path is the plain one


@needs_interpreter
@pytest.mark.parametrize("kind", shapes_of_logits(1, 8))
def test_ids_and_logprobs_are_those_of_the_plain_sampler(small, kind):
    Case(shapes_of_logits(len(MIXED), 300)[kind], MIXED).check()


@needs_interpreter
@pytest.mark.parametrize("kind", shapes_of_logits(1, 8))
def test_rows_that_are_all_greedy_need_no_weights(small, kind):
    Case(shapes_of_logits(3, 300)[kind], [GREEDY] * 3).check()


@needs_interpreter
@pytest.mark.parametrize("vocab", [1, 33])
def test_any_vocabulary(small, vocab):
    Case(normal(3, vocab), (GREEDY, PLAIN, USUAL)).check()


@needs_interpreter
def test_rows_may_lie_apart_and_what_lies_between_is_not_read(small):
    padded = torch.full((4, 120), math.nan)
    padded[:, :100] = normal(4, 100)
    Case(padded[:, :100], (GREEDY, PLAIN, USUAL, FEW)).check()


@needs_interpreter
def test_the_threshold_is_exact_to_its_last_digit(small):
    """Many draws among tokens that share two digits: one too many or too few would come up."""
    logits = shapes_of_logits(24, 60)["close"]
    case = Case(logits, [(1, 0.5)] * 24)
    kept = survivors(logits - logits.amax(-1, keepdim=True), case.rows)
    assert 25 < kept[0].sum() < 35
    unfiltered = sample(logits, Case(logits, [PLAIN] * 24).rows, case.index)
    assert not kept[0][unfiltered].all(), "the filter would change nothing"
    case.check()


@needs_interpreter
def test_the_search_of_the_threshold_counts_every_weight_once(small):
    """The digits found and what was left of the goal, against sums over the plain odds."""
    tail = torch.full((1, 300), math.log(0.09 / 300))  # each is too light to be told apart
    tail[0, 100:110] = math.log(0.02) + torch.arange(10) * 1e-3
    tail[0, 200] = 0.0
    logits = torch.cat([normal(4, 300), normal(1, 300, spread=0.05), tail])
    pairs = [(1, 0.9), (2, 0.98), (4, 0.6), (3, 0.3), (1, 0.5), (1, 0.9)]
    case = Case(logits, pairs)
    made = case.sampler()
    case.call(made)
    scaled = (logits - logits.amax(-1, keepdim=True)) / case.rows.temperature
    odds, kept = scaled.exp(), survivors(scaled, case.rows)
    weights = (odds.double() * 2**40).floor()
    goal = weights.sum(-1) * case.rows.top_p[:, 0] / 2**24
    least = torch.where(kept, odds, 2.0).amin(-1, keepdim=True)
    for at, shift in ((1, 19), (2, 9)):
        digits = (odds.view(torch.int32) - (87 << 23)) >> shift
        edge = (least.view(torch.int32) - (87 << 23)) >> shift
        left = goal - torch.where(digits > edge, weights, 0.0).sum(-1)
        assert (left > 0).all()
        assert torch.allclose(
            made._scratch.found[:-1, at].double() / goal, left / goal, rtol=0, atol=1e-6
        )
        if shift == 19:
            assert made._scratch.found[:-1, 0].tolist() == edge[:, 0].tolist()


@needs_interpreter
def test_noise_depends_on_seed_and_on_both_words_of_the_index(small):
    flat = torch.zeros(2, 256)
    drawn = []
    for index in (5, 6, 2**32 + 5):
        case = Case(flat, (PLAIN, PLAIN), index=index)
        case.check()
        drawn += case.plain()[0].tolist()
    assert len(set(drawn)) > 3


@needs_interpreter
def test_a_temperature_below_the_normal_numbers_is_the_smallest_of_them(small):
    logits = torch.tensor([[0.0, 1e-38, 1e-38, -1.0]]).repeat(12, 1)
    case = Case(logits, [(1e-40, 1.0)] * 12)
    assert (case.temperature > 0).all()
    assert 0 in case.plain()[0]  # 1e-38 is a hundred such temperatures, but less than 2**-126
    case.check()


@needs_interpreter
def test_a_call_knows_nothing_of_the_one_before(small):
    first, second = (Case(normal(4, 100, seed=s), (USUAL, FEW, PLAIN, GREEDY)) for s in (1, 2))
    made = first.sampler()
    first.call(made)
    second.fill(made)
    assert second.call(made)[0].tolist() == second.plain()[0].tolist()


# ---- masks


@needs_interpreter
def test_a_mask_bans_tokens_and_leaves_the_models_own_logprobs(small):
    logits = normal(len(MIXED), 100)
    allowed = normal(len(MIXED), 100, seed=3) < -2
    assert not allowed.gather(1, logits.argmax(-1, keepdim=True)).any()
    allowed[:, 31] = allowed[:, 99] = True  # the sign of a word, and the last bit
    logits[1, 31] = logits[2, 99] = 40.0
    case = Case(logits, MIXED, allowed=allowed)
    case.check()
    assert case.plain()[0][1:3].tolist() == [31, 99]


@needs_interpreter
def test_a_mask_is_read_only_where_it_is_asked_for(small):
    case = Case(normal(2, 70), (GREEDY, PLAIN))
    made = case.sampler()
    made.mask.zero_()
    assert case.call(made)[0].tolist() == case.plain()[0].tolist()


# ---- rows of the vocabulary that no token has


@needs_interpreter
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("words", [1, 31, 64, 77, 99, 100])
@pytest.mark.parametrize("pairs", [MIXED, (GREEDY,) * 6], ids=["mixed", "greedy"])
def test_ids_beyond_the_words_are_never_chosen(small, words, masked, pairs):
    logits = normal(len(pairs), 100)
    logits[:, words:] += 20  # better than every word
    allowed = None
    if masked:
        allowed = normal(len(pairs), 100, seed=3) < 0
        allowed[:, words - 1] = True
    case = Case(logits, pairs, allowed=allowed, words=words)
    case.check()
    assert (case.plain()[0] < words).all()


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
def test_a_logit_that_is_not_finite_is_told_also_where_no_token_has_it(small):
    logits = normal(4, 100)
    logits[1, 98], logits[2, 97] = math.nan, INF
    logits[3, 90:] = -INF
    case = Case(logits, MIXED[:4], words=90)
    ids, _, finite = case.call(case.sampler())
    assert finite.tolist() == finite_rows(logits).int().tolist() == [1, 0, 0, 1]
    assert (ids < 90).all()


# ---- rows that are not finite


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_are_not_finite_are_told_and_disturb_nobody(small, masked):
    logits = normal(9, 100)
    logits[0, 77] = math.nan
    logits[1] = math.nan
    logits[2, 77] = INF
    logits[3] = INF
    logits[4] = -INF
    logits[5, 3], logits[5, 90] = INF, math.nan
    logits[6] = torch.tensor([-(2**22)], dtype=torch.int32).view(torch.float32)  # NaN with a sign
    allowed = torch.ones(9, 100, dtype=torch.bool) if masked else None
    if masked:
        allowed[0, 77] = allowed[8, :] = False  # what the mask hides counts; a row without any
    for pair in (GREEDY, PLAIN, USUAL):
        case = Case(logits, [pair] * 9, allowed=allowed)
        made = case.sampler()
        ids, _, finite = case.call(made)
        assert (made._scratch.bins >= 0).all(), "a weight of NaN"
        assert finite.tolist() == finite_rows(logits).int().tolist() == [0] * 7 + [1] * 2
        assert ((ids >= 0) & (ids < 100)).all()
        assert ids[7] == case.plain()[0][7]


# ---- what a GPU would run


def test_every_kernel_waits_before_anything_else():
    """launch.py's promise holds along a chain only if no program leaves early."""
    tree = ast.parse(inspect.getsource(sampling))
    kernels = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    launched = {
        node.args[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "launch"
    }
    assert launched == set(KERNELS)
    for name in KERNELS:
        opening = [ast.unparse(statement) for statement in kernels[name].body[1:3]]
        assert opening == ["allow(OVERLAP)", "wait(OVERLAP)"], name


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama.cuda.sampling import lean as sampling

GIVEN = sampling.Given("*fp32", "i32", "*i32", "*fp32", "*i64", "*i64", "i32", "*i64")
TYPES = {"given": GIVEN, "chosen": sampling.Chosen("*i64", "*fp32", "*i32"),
         "scratch": sampling.Scratch("*i64", "*fp32", "*fp32", "*i64", "*i64", "*i64"),
         "per": "i32", "parts": "i32"}
VALUES = {"SHAPE": sampling.Shape(128256, 128000, True, sampling.BLOCK), "WORDS": 128000,
          "OVERLAP": True}
found = {}
for name in sys.argv[1:]:
    kernel = getattr(sampling, name)
    signature = {a: TYPES.get(a, "constexpr") for a in kernel.arg_names}
    values = {a: VALUES[a] for a in kernel.arg_names if a in VALUES}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    options = {**sampling.OPTIONS, "launch_pdl": True}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found[name] = done.asm["ptx"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ptx():
    """The kernels for compute capability 9.0, by a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-c", COMPILE, *KERNELS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "ptxas" in done.stderr and "not found" in done.stderr.lower():
        pytest.skip("triton has no ptxas here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_and_round_as_torch_does(ptx, kernel):
    code = ptx[kernel]
    assert code.count("griddepcontrol.wait") == code.count("griddepcontrol.launch_dependents") == 1
    touched = re.search(r"\b(ld|st|atom|red)\.global", code)
    assert code.index("griddepcontrol.wait") < touched.start()
    assert not re.search(r"\b(mul|add|sub)\.f32", code), "may be fused to a product and sum"
    assert not re.search(r"\bfma\.rn\.ftz|\bdiv\.(full|approx)", code)
    divided = kernel in ("_weigh", "_narrow", "_draw")
    assert ("div.rn.f32" in code) == divided
    assert ("ex2.approx.ftz.f32" in code) == divided  # the library's exp, not Triton's


# ---- on a GPU, at real sizes

VOCAB = 128256
CUDA = torch.device("cuda")


def real_logits(rows, seed):
    """Like a model's: most tokens far below the best, with ties as bfloat16 products have them."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=generator, device=CUDA) * 2.5
    logits[:, ::5000] += 12 * torch.rand(rows, 26, generator=generator, device=CUDA)
    return logits.bfloat16().float()


def real_pairs(rows):
    return [MIXED[i % len(MIXED)] for i in range(rows)] if rows > 1 else [USUAL]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 32, 128])
def test_on_a_gpu_draws_are_those_of_the_plain_sampler(rows):
    different, draws = [], 0
    made = Case(real_logits(rows, 0), real_pairs(rows)).sampler()
    for turn in range(-(-4000 // rows)):
        case = Case(real_logits(rows, turn), real_pairs(rows), index=turn)
        made.ids.fill_(-7)
        ids, logprob, finite = case.call(made)
        expected, expected_logprob, _ = case.plain()
        for row in (ids != expected).nonzero()[:, 0].tolist():
            different.append((turn, row, ids[row].item(), expected[row].item()))
        same = ids == expected
        assert same[case.rows.greedy[:, 0]].all(), "a greedy row"
        assert torch.allclose(logprob[same], expected_logprob[same], rtol=0, atol=1e-5)
        assert finite.all()
        draws += rows
    print(f"{len(different)} of {draws} draws differ (turn, row, here, plain): {different[:20]}")
    assert len(different) <= draws / 1000


@pytest.mark.gpu
def test_on_a_gpu_odd_rows_are_those_of_the_plain_sampler():
    for kind, logits in shapes_of_logits(len(MIXED), 50001).items():
        case = Case(logits.to(CUDA), MIXED)
        ids, logprob, finite = case.call(case.sampler())
        expected, expected_logprob, _ = case.plain()
        assert ids.tolist() == expected.tolist(), kind
        assert torch.allclose(logprob, expected_logprob, rtol=0, atol=1e-5), kind
        assert finite.all(), kind


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32])
def test_on_a_gpu_a_captured_call_reads_what_stands_there_when_it_is_replayed(rows):
    first, second = (Case(real_logits(rows, s), real_pairs(rows), index=s) for s in (1, 2))
    second.rows = RowParams.from_params(
        [SamplingParams(temperature=0.8, top_p=0.7, seed=i) for i in range(rows)],
        list(range(rows)),
        CUDA,
    )
    second.temperature = torch.full((rows,), 0.8, device=CUDA)
    made = first.sampler()
    logits, index = first.logits.clone(), first.index.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made(logits, index, rows=rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # calls that follow each other at once
            made(logits, index, rows=rows)
    for case in (second, first, second):
        logits.copy_(case.logits)
        index.copy_(case.index)
        case.fill(made)
        made.ids.fill_(-7)
        graph.replay()
        assert made.ids[:rows].tolist() == case.plain()[0].tolist()


@pytest.mark.gpu
def test_on_a_gpu_masks_and_rows_that_are_not_finite():
    logits = real_logits(4, 5)
    logits[1, 99] = math.nan
    logits[2, VOCAB - 1] = INF
    logits[3] = -INF
    allowed = torch.rand(4, VOCAB, device=CUDA) < 0.1
    for pair in (GREEDY, PLAIN, USUAL):
        case = Case(logits, [pair] * 4, allowed=allowed)
        ids, _, finite = case.call(case.sampler())
        assert finite.tolist() == [1, 0, 0, 0]
        assert ((ids >= 0) & (ids < VOCAB)).all()
        assert ids[0] == case.plain()[0][0]
        assert allowed[0, ids[0]]
