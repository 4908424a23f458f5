"""Sampling: random numbers by counter, and draws that have exactly the distribution asked for.

The chi-square tests fail by chance with probability FALSE_ALARM each, over seeds; the seeds are
fixed, so a test that passes goes on passing.

R rows   V vocabulary
"""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from llama import sampling
from llama.sampling import (
    RowParams,
    SamplingParams,
    count_tokens,
    finite_rows,
    gumbel,
    logprobs_of,
    philox,
    sample,
    survivors,
)

CPU = torch.device("cpu")
FALSE_ALARM = 1e-6
DRAWS = 20_000

# The three philox4x32-10 lines of tests/kat_vectors in Random123: counter, key, words.
VECTORS = (
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def rows_of(*params, seeds=None, device=CPU):
    given = seeds or [p.seed or 0 for p in params]
    return RowParams.from_params(params, given, device)


def unfiltered(**fields):
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": 1} | fields)


def random_logits(rows, vocab, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * spread


def draw(logits, params, seeds, index):
    """One draw for each seed and index, from the same logits (V,): ids (R,)."""
    drawn, index = [], torch.as_tensor(index, dtype=torch.int64)
    for at in range(0, len(seeds), 500):
        part = list(seeds[at : at + 500])
        rows = rows_of(*[params] * len(part), seeds=part)
        drawn.append(sample(logits.expand(len(part), -1), rows, index[at : at + 500]))
    return torch.cat(drawn)


def reference(logits, params):
    """Probabilities (V,) in float64 after temperature and the filters, by sorting."""
    scaled = logits.double().numpy() / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.sort(p)[::-1]
    if 0 < params.top_k < len(p):
        p = np.where(p >= order[params.top_k - 1], p, 0)
        p /= p.sum()
    if params.top_p < 1:
        order = np.sort(p)[::-1]
        needed = np.searchsorted(np.cumsum(order), params.top_p)  # first with sum >= top_p
        p = np.where(p >= order[min(needed, len(p) - 1)], p, 0)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    return p / p.sum()


def kept_by(logits, params):
    """survivors (R, V) of logits (R, V), every row with the same params."""
    scaled = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    return survivors(scaled, rows_of(*[params] * len(logits)))


def chi_square_p(observed, expected):
    """The probability of a chi-square at least as large; cells that expect under 5 are merged."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    assert observed[expected == 0].sum() == 0, "an impossible token was drawn"
    large = expected >= 5
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


# ---- random numbers


def words_of(counter, key):
    tensors = [torch.tensor([word]) for word in (*counter, *key)]
    return tuple(int(word) for word in philox(tuple(tensors[:4]), tuple(tensors[4:])))


def philox_in_python(counter, key):
    """Philox 4x32-10 in Python's own integers, from the paper."""
    (a, b, c, d), (left, right) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ left, q % 2**32, p >> 32 ^ d ^ right, p % 2**32
        left, right = (left + 0x9E3779B9) % 2**32, (right + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_published_vectors(counter, key, words):
    assert words_of(counter, key) == words
    assert philox_in_python(counter, key) == words


@pytest.mark.parametrize(
    ("constant", "wrong"),
    [
        ("PHILOX_MULTIPLIERS", (0xD2511F51, 0xCD9E8D57)),
        ("PHILOX_MULTIPLIERS", (0xCD9E8D57, 0xD2511F53)),
        ("PHILOX_KEY_STEPS", (0x9E3779B8, 0xBB67AE85)),
        ("PHILOX_KEY_STEPS", (0x9E3779B9, 0xBB67AE84)),
        ("PHILOX_ROUNDS", 9),
    ],
)
def test_a_wrong_constant_fails_every_vector(monkeypatch, constant, wrong):
    monkeypatch.setattr(sampling, constant, wrong)
    for counter, key, words in VECTORS:
        assert words_of(counter, key) != words


def test_noise_is_a_function_of_seed_index_and_vocabulary_id():
    vocab = 11
    seeds = [0, 7, 2**32 + 7, 2**64 - 1, 0x0123456789ABCDEF]
    index = [0, 1, 5, 2**32 + 5, 3]
    rows = rows_of(*[SamplingParams()] * 5, seeds=seeds)
    noise = gumbel(rows.seed, torch.tensor(index), vocab)
    for r, (seed, i) in enumerate(zip(seeds, index, strict=True)):
        for token in range(vocab):
            counter = (token // 4, i % 2**32, i >> 32, 0)
            word = philox_in_python(counter, (seed % 2**32, seed >> 32))[token % 4]
            exact = -math.log(-math.log1p(-(word + 0.5) / 2**32))
            assert noise[r, token].item() == pytest.approx(exact, rel=2e-6, abs=2e-6)


def test_seeds_are_taken_modulo_2_to_the_64():
    assert torch.equal(rows_of(SamplingParams(seed=-1)).seed, torch.tensor([[2**32 - 1] * 2]))
    same = rows_of(SamplingParams(seed=5), SamplingParams(seed=5 - 2**64)).seed
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize(("word", "noise"), [(0, 33 * math.log(2)), (2**32 - 1, -2.8117)])
def test_noise_is_finite_at_the_ends_and_fine_where_it_is_large(monkeypatch, word, noise):
    monkeypatch.setattr(sampling, "philox", lambda counter, key: (torch.full((1, 2), word),) * 4)
    got = gumbel(rows_of(SamplingParams()).seed, torch.zeros(1, dtype=torch.int64), 8)
    assert got == pytest.approx(np.full((1, 8), noise), abs=1e-3)
    if word == 0:
        monkeypatch.setattr(sampling, "philox", lambda counter, key: (torch.full((1, 2), 1),) * 4)
        next_word = gumbel(rows_of(SamplingParams()).seed, torch.zeros(1, dtype=torch.int64), 8)
        assert (got - next_word) == pytest.approx(np.full((1, 8), math.log(3)), abs=1e-5)


# ---- the law: a sample depends on nothing but its own row


def mixed_batch(vocab=1003):
    choices = [
        unfiltered(),
        SamplingParams(),
        unfiltered(top_k=7),
        unfiltered(min_p=0.05),
        SamplingParams(top_k=20, min_p=0.02, temperature=1.3),
        SamplingParams(temperature=0),
        SamplingParams(presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParams(logit_bias={3: 4.0, 8: -math.inf}),
    ]
    params = [dataclasses.replace(p, seed=100 + i) for i, p in enumerate(choices * 8)]
    rows = len(params)
    counts = torch.randint(0, 3, (rows, vocab), generator=torch.Generator().manual_seed(2))
    return params, random_logits(rows, vocab), torch.arange(rows) * 3, counts


def test_a_row_alone_gives_what_it_gives_in_a_batch_in_any_order():
    params, logits, index, counts = mixed_batch()
    together = sample(logits, rows_of(*params), index, counts)
    for r in range(len(params)):
        at = slice(r, r + 1)
        assert sample(logits[at], rows_of(params[r]), index[at], counts[at]) == together[r]
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(4))
    moved = rows_of(*[params[i] for i in order])
    assert torch.equal(sample(logits[order], moved, index[order], counts[order]), together[order])


def test_padding_of_the_vocabulary_changes_no_sample():
    params, logits, index, counts = mixed_batch()
    wide = torch.cat([logits, torch.full((len(params), 21), -math.inf)], -1)
    more = torch.cat([counts, counts.new_zeros(len(params), 21)], -1)
    rows = rows_of(*params)
    narrow = sample(logits, rows, index, counts)
    assert torch.equal(sample(wide, rows, index, more), narrow)
    assert torch.equal(sample(wide[:, :1003], rows, index, more[:, :1003]), narrow)


def test_nothing_global_changes_and_logits_are_not_written_to():
    params, logits, index, counts = mixed_batch()
    before, state = logits.clone(), torch.get_rng_state()
    sample(logits, rows_of(*params), index, counts)
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_the_host_never_waits_for_the_device():
    """On the meta device there are no values, so whatever read one would raise."""
    params, logits, index, counts = mixed_batch()
    rows = rows_of(*params, device=torch.device("meta"))
    ids = sample(logits.to("meta"), rows, index.to("meta"), counts.to("meta"))
    assert (ids.shape, ids.dtype) == ((len(params),), torch.int64)
    assert finite_rows(logits.to("meta")).shape == ids.shape


@pytest.mark.gpu
def test_cuda_gives_the_words_the_sets_and_the_samples_of_the_cpu():
    cuda = torch.device("cuda")
    params, logits, index, counts = mixed_batch()
    here, there = rows_of(*params), rows_of(*params, device=cuda)
    assert torch.equal(here.seed, there.seed.cpu())
    counter = (torch.arange(997)[None], index[:, None], index[:, None] >> 1, index[:, None] * 0)
    words = philox(counter, (here.seed[:, :1], here.seed[:, 1:]))
    on_cuda = philox(tuple(c.to(cuda) for c in counter), (there.seed[:, :1], there.seed[:, 1:]))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(words, on_cuda, strict=True))
    scaled = logits - logits.amax(-1, keepdim=True)
    assert torch.equal(survivors(scaled, here), survivors(scaled.to(cuda), there).cpu())
    for step in range(50):
        ids = sample(logits, here, index + step, counts)
        moved = [t.to(cuda) for t in (index + step, counts)]
        assert torch.equal(sample(logits.to(cuda), there, *moved).cpu(), ids)
    ties = torch.zeros(1, 128_256, device=cuda)
    ties[0, 777:] = 1.0
    greedy = rows_of(SamplingParams(temperature=0), device=cuda)
    assert sample(ties, greedy, index[:1].to(cuda)).item() == 777


# ---- distributions

FILTERED = [
    unfiltered(),
    unfiltered(temperature=0.6),
    unfiltered(temperature=2.5),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(),
    unfiltered(top_k=5),
    unfiltered(min_p=0.1),
    SamplingParams(temperature=1.2, top_p=0.7, top_k=12, min_p=0.08),
]


@pytest.mark.parametrize("params", FILTERED)
def test_draws_have_the_distribution_that_was_asked_for(params):
    logits = random_logits(1, 50, seed=11, spread=1.5)[0]
    half = DRAWS // 2
    by_seed = draw(logits, params, range(10**12, 10**12 + half), [3] * half)
    by_index = draw(logits, params, [42] * half, range(half))
    drawn = np.bincount(torch.cat([by_seed, by_index]), minlength=50)
    assert chi_square_p(drawn, reference(logits, params) * DRAWS) > FALSE_ALARM


def test_the_chi_square_sees_a_slightly_wrong_temperature():
    logits = random_logits(1, 50, seed=11, spread=1.5)[0]
    ids = draw(logits, unfiltered(temperature=1.05), range(DRAWS), [0] * DRAWS)
    expected = reference(logits, unfiltered()) * DRAWS
    assert chi_square_p(np.bincount(ids, minlength=50), expected) < FALSE_ALARM


@pytest.mark.parametrize(("seed_step", "index_step"), [(0, 1), (1, 0), (2**32, 0), (1, -1)])
def test_neighbours_in_seed_or_index_are_independent(seed_step, index_step):
    logits = torch.tensor([0.0, 0.5, 1.0, -0.7])
    seeds, index = np.arange(DRAWS) * (seed_step == 0) * 3 + 9, np.arange(DRAWS) * 2 + 1
    here = draw(logits, unfiltered(), seeds.tolist(), index)
    there = draw(logits, unfiltered(), (seeds + seed_step).tolist(), index + index_step)
    p = reference(logits, unfiltered())
    pairs = np.bincount(here * 4 + there, minlength=16)
    assert chi_square_p(pairs, np.outer(p, p).ravel() * DRAWS) > FALSE_ALARM


def test_a_rare_token_keeps_its_probability():
    logits = torch.tensor([0.0, 0.0, -5.0, 0.0])
    ids = draw(logits, unfiltered(), range(10 * DRAWS), [0] * (10 * DRAWS))
    expected = reference(logits, unfiltered()) * 10 * DRAWS  # of the rare one, some 450
    assert chi_square_p(np.bincount(ids, minlength=4), expected) > FALSE_ALARM


# ---- filters


@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9},
        {"top_p": 0.1},
        {"top_p": 0.999},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 10**30},
        {"min_p": 0.03},
        {"top_k": 30, "top_p": 0.6, "min_p": 0.01},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.2},
        {"top_k": 5, "top_p": 0.97},
        {"temperature": 0.3, "top_k": 900, "top_p": 0.95},
    ],
)
def test_what_survives_is_what_sorting_says(vocab, ties, fields):
    logits = random_logits(100, vocab, seed=vocab)
    if ties:
        logits = logits.round()
    params = unfiltered(**fields)
    kept = kept_by(logits, params)
    expected = torch.stack([torch.from_numpy(reference(row, params) > 0) for row in logits])
    different = (kept != expected).any(-1)  # a sum within rounding of top_p may go either way
    assert different.sum() <= 1
    assert (kept.sum(-1) - expected.sum(-1)).abs().max() <= 1 or ties


def test_the_threshold_is_exact():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x3F800000, (60, 90), generator=generator, dtype=torch.int32)
    bits[:, :45] = bits[:, 45:] + torch.randint(-2, 2, (60, 45), generator=generator).int()
    bits = bits.clamp(0, 0x3F800000)
    weights = torch.randint(0, 2**40, bits.shape, generator=generator)
    goal = weights.sum(-1, keepdim=True) * torch.arange(60)[:, None] // 57 + 1  # some out of reach
    found = sampling._threshold(bits, weights, goal)
    for b, w, g, t in zip(bits, weights, goal, found, strict=True):
        reached = [int(x) for x in b if w[b >= x].sum() >= g]
        assert int(t) == max(reached, default=0)


def test_the_most_probable_token_survives_every_filter():
    logits = random_logits(50, 300)
    for params in (unfiltered(top_p=1e-12), unfiltered(top_k=1), unfiltered(min_p=1.0)):
        kept = kept_by(logits, params)
        assert kept.sum(-1).eq(1).all()
        assert torch.equal(kept.int().argmax(-1), logits.argmax(-1))


def test_all_that_tie_at_the_edge_stay():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert kept_by(logits, unfiltered(top_k=2))[0].tolist() == [True] * 4 + [False]
    assert kept_by(logits, unfiltered(top_p=0.75))[0].tolist() == [True] * 4 + [False]


def test_top_p_1_filters_nothing():
    logits = torch.tensor([[0.0, -5.0, -40.0, -200.0, -1e30]])
    assert kept_by(logits, unfiltered()) is None
    rows = rows_of(unfiltered(), SamplingParams(), unfiltered(top_k=2))
    kept = survivors(logits.expand(3, -1), rows)
    assert kept.tolist() == [[True] * 5, [True] + [False] * 4, [True, True] + [False] * 3]


# ---- temperature


def test_temperature_0_takes_the_lowest_id_among_equals():
    logits = random_logits(2, 4000)
    logits[:, [17, 900, 3999]] = 50.0
    greedy = SamplingParams(temperature=0)
    assert sample(logits, rows_of(greedy, greedy), torch.zeros(2).long()).tolist() == [17, 17]
    beside = rows_of(greedy, SamplingParams(seed=1))
    assert sample(logits, beside, torch.zeros(2).long())[0] == 17


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-10, 3.4e38])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_temperatures_give_no_nan(temperature, scale):
    logits = random_logits(200, 60) * scale
    logits[:, 5] = -math.inf
    params = [SamplingParams(temperature=temperature, top_k=50, seed=i) for i in range(200)]
    ids = sample(logits, rows_of(*params), torch.arange(200))
    if temperature < 1e-9:
        assert torch.equal(ids, logits.argmax(-1))
    else:
        assert len(set(ids.tolist())) > 30
        assert 5 not in ids


def test_a_token_at_minus_infinity_is_never_chosen():
    logits = torch.full((5000, 9), -math.inf)
    logits[:, 4] = 1.0
    logits[::2, 7] = -30.0
    hot = [unfiltered(temperature=1e6, seed=s) for s in range(5000)]
    ids = sample(logits, rows_of(*hot), torch.zeros(5000).long())
    assert set(ids[::2].tolist()) == {4, 7}
    assert set(ids[1::2].tolist()) == {4}


# ---- penalties and biases


def test_penalties_and_biases_are_what_their_definition_says():
    params, logits, index, counts = mixed_batch(vocab=40)
    expected = logits.double()
    for r, p in enumerate(params):
        for token in range(40):
            times = int(counts[r, token])
            expected[r, token] -= times * p.frequency_penalty + (times > 0) * p.presence_penalty
            expected[r, token] += (p.logit_bias or {}).get(token, 0.0)
    got = sampling.shifted(logits, rows_of(*params), counts)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    cold = [dataclasses.replace(p, temperature=0) for p in params]
    assert torch.equal(sample(logits, rows_of(*cold), index, counts), expected.argmax(-1))


def test_tokens_are_counted_row_by_row():
    counts = count_tokens(torch.zeros(3, 5), [[4, 1, 4], []])  # the third row is not told of
    assert counts.tolist() == [[0, 1, 0, 0, 2], [0] * 5, [0] * 5]
    assert not count_tokens(torch.zeros(2, 5), [[], []]).any()


def test_a_banned_token_never_comes_and_a_large_bias_always_does():
    logits = torch.zeros(3000, 6)
    ban = unfiltered(logit_bias={2: -math.inf, 3: -math.inf})
    seeds = list(range(3000))
    assert set(draw(logits[0], ban, seeds, seeds).tolist()) == {0, 1, 4, 5}
    assert set(draw(logits[0], unfiltered(logit_bias={2: 1e6}), seeds, seeds).tolist()) == {2}


DRAWN = {  # field: a value that changes the draws of SamplingParams(temperature=1, top_p=1, seed=1)
    "temperature": 0.2,
    "top_p": 0.3,
    "top_k": 2,
    "min_p": 0.5,
    "presence_penalty": 5.0,
    "frequency_penalty": 5.0,
    "logit_bias": {0: 5.0},
    "seed": 2,
}
ENGINES = {"max_tokens", "stop_token_ids", "logprobs", "prompt_logprobs"}


def test_every_field_is_either_the_samplers_or_the_engines():
    assert {f.name for f in dataclasses.fields(SamplingParams)} == DRAWN.keys() | ENGINES


@pytest.mark.parametrize("name", DRAWN)
def test_every_field_of_the_sampler_changes_something(name):
    logits, counts = random_logits(300, 20, spread=1.0), torch.zeros(300, 20)
    counts[:, :10] = 1

    def ids(params):
        return sample(logits, rows_of(*[params] * 300), torch.arange(300), counts)

    changed = dataclasses.replace(unfiltered(), **{name: DRAWN[name]})
    assert not torch.equal(ids(changed), ids(unfiltered()))


# ---- parameters


@pytest.mark.parametrize(
    ("name", "bad", "works"),
    [
        ("temperature", [-1, -1e-9, math.nan, math.inf, 1e300, True, "1", None], ">= 0"),
        ("top_p", [0, -0.5, 1.0001, 9, math.nan, True, "0.9", None], "> 0 and <= 1"),
        ("top_k", [-1, 2.0, True, None, "5"], "int >= 0"),
        ("min_p", [-0.1, 1.1, math.nan, False, None], ">= 0 and <= 1"),
        ("presence_penalty", [math.nan, math.inf, -1e7, True, "2"], "1000000"),
        ("frequency_penalty", [math.nan, -math.inf, 10**400, None], "1000000"),
        ("logit_bias", [3, "5", [(1, 2.0)]], "-inf"),
        ("logit_bias", [{-1: 0.0}, {"5": 1.0}, {1.0: 1.0}, {True: 1.0}], "-inf"),
        ("logit_bias", [{5: math.nan}, {5: math.inf}, {5: 1e7}, {5: "x"}, {5: True}], "-inf"),
        ("seed", [1.0, True, "1"], "int or None"),
        ("max_tokens", [-1, 1.5, True, "9"], "int >= 0"),
        ("stop_token_ids", [5, "5", b"5", None, (-1,), (1.0,), [True]], "token ids"),
        ("logprobs", [-1, 2.0, True], "int >= 0"),
        ("prompt_logprobs", [-1, 2.0, "yes"], "int >= 0 or None"),
    ],
)
def test_a_bad_value_is_named_with_what_would_work(name, bad, works):
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name} ") as error:
            SamplingParams(**{name: value})
        shown = next(iter(value.items())) if isinstance(value, dict) else (value,)
        assert all(repr(part) in str(error.value) for part in shown)
        assert works in str(error.value)


def test_the_ends_of_every_range_are_accepted():
    SamplingParams(
        temperature=0, top_p=1, min_p=1, top_k=0, logprobs=0, max_tokens=0, seed=-(2**70)
    )
    SamplingParams(temperature=3.4e38, top_p=1e-300, min_p=0, presence_penalty=-1e6, seed=2**64)
    SamplingParams(logit_bias={0: -math.inf, 1: 1_000_000, 2: -1e6}, stop_token_ids=[1, 2])


def test_params_are_values():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias, stop_token_ids=[4, 5])
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    assert params.stop_token_ids == (4, 5)
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(dataclasses.replace(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4
    with pytest.raises(TypeError):
        SamplingParams(0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {3: 0.0, 8: 1.0}}, "logit_bias has id 8; ids go from 0 to 7"),
        ({"stop_token_ids": (7, 9)}, "stop_token_ids has id 9; ids go from 0 to 7"),
        ({"logprobs": 9}, "^logprobs is 9; it must be at most 8"),
        ({"prompt_logprobs": 9}, "prompt_logprobs is 9; it must be at most 8"),
        ({"logit_bias": dict.fromkeys(range(8), -math.inf)}, "bans all 8 tokens"),
    ],
)
def test_what_depends_on_the_vocabulary_is_checked_against_it(fields, message):
    params = SamplingParams(logit_bias={7: 1.0}, stop_token_ids=(7,), logprobs=8, prompt_logprobs=8)
    params.check_vocabulary(8)
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields).check_vocabulary(8)


def test_what_may_be_chosen_may_not_be_banned_to_the_last():
    all_words = SamplingParams(logit_bias=dict.fromkeys(range(6), -math.inf))
    all_words.check_vocabulary(8)
    with pytest.raises(ValueError, match="bans all 6 tokens"):
        all_words.check_vocabulary(8, words=6)
    SamplingParams(logit_bias=dict.fromkeys(range(1, 8), -math.inf)).check_vocabulary(8, words=6)


NUMBERS = {  # every field that takes a number, and one that float32 holds
    "temperature": 0.5, "top_p": 0.75, "top_k": 40, "min_p": 0.25, "presence_penalty": 1.5,
    "frequency_penalty": -2, "seed": 7, "max_tokens": 3, "logprobs": 2, "prompt_logprobs": 4,
}  # fmt: skip
FLOATS = (np.float16, np.float32, np.float64, np.array, torch.tensor)
WHOLE = (np.int32, np.int64, np.uint8, np.array, torch.tensor)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_and_torch_are_taken_and_kept_as_pythons(name):
    number = NUMBERS[name]
    for kind in WHOLE if isinstance(number, int) and number > 0 else FLOATS:
        params = SamplingParams(**{name: kind(number)})
        assert getattr(params, name) == number
        assert type(getattr(params, name)) in (int, float)
        assert params == SamplingParams(**{name: type(getattr(params, name))(number)})
    refused = [np.array([number]), torch.tensor([number])]
    if name != "prompt_logprobs":  # which True and False stood for
        refused += [np.bool_(True), torch.tensor(True)]
    if name in ("top_k", "seed", "max_tokens", "logprobs", "prompt_logprobs"):
        refused += [np.float64(number), torch.tensor(float(number))]
    for value in refused:
        with pytest.raises(ValueError, match=f"^{name} is "):
            SamplingParams(**{name: value})


def test_every_number_of_the_params_is_among_those_tried():
    others = {"logit_bias", "stop_token_ids"}
    assert {f.name for f in dataclasses.fields(SamplingParams)} == NUMBERS.keys() | others


def test_biases_and_stop_ids_take_numbers_and_arrays_too():
    bias = {np.int64(3): np.float32(-math.inf), torch.tensor(5): torch.tensor(2.5)}
    params = SamplingParams(logit_bias=bias)
    assert params.logit_bias == {3: -math.inf, 5: 2.5}
    assert {type(i) for pair in params.logit_bias.items() for i in pair} == {int, float}
    for ids in (np.array([4, 9]), torch.tensor([4, 9]), [np.int32(4), torch.tensor(9)]):
        stops = SamplingParams(stop_token_ids=ids).stop_token_ids
        assert stops == (4, 9)
        assert {type(i) for i in stops} == {int}
    for ids in (np.array([4.0]), torch.tensor([[4]]), torch.tensor(4), np.array([True]), [-1]):
        with pytest.raises(ValueError, match=r"^stop_token_ids is "):
            SamplingParams(stop_token_ids=ids)
    for wrong in ({np.float64(3): 1.0}, {np.bool_(True): 1.0}, {3: np.array([1.0])}):
        with pytest.raises(ValueError, match=r"^logit_bias has "):
            SamplingParams(logit_bias=wrong)


def test_true_scores_a_prompt_without_alternatives_and_false_does_not():
    asked = [SamplingParams(prompt_logprobs=p).prompt_logprobs for p in (True, False, None, 0, 3)]
    assert asked == [0, None, None, 0, 3]
    assert {type(a) for a in asked} == {int, type(None)}


# ---- rows of the vocabulary that no token has


CUT = [
    unfiltered(temperature=0),
    unfiltered(),
    unfiltered(top_p=0.6),
    unfiltered(top_k=4),
    unfiltered(min_p=0.2),
    unfiltered(frequency_penalty=1.0, logit_bias={2: 3.0}),
    unfiltered(top_k=5, top_p=0.9, logit_bias={21: 1e6, 3: -math.inf, 29: -math.inf}),
]


@pytest.mark.parametrize("at_once", [2**22, 70, 1])
def test_ids_beyond_the_words_are_never_chosen_and_change_nothing(monkeypatch, at_once):
    """Also in slices of a few rows: the choice is that of a vocabulary without them."""
    monkeypatch.setattr(sampling, "AT_ONCE", at_once)
    params = CUT * 30
    logits = random_logits(len(params), 30)
    logits[:, 20:] += 8  # better than every word
    seeds, index = list(range(len(params))), torch.arange(len(params))
    counts = torch.randint(0, 3, logits.shape, generator=torch.Generator().manual_seed(1))
    chosen = sample(logits, rows_of(*params, seeds=seeds), index, counts, words=20)
    inside = [
        dataclasses.replace(p, logit_bias={i: b for i, b in (p.logit_bias or {}).items() if i < 20})
        for p in params
    ]
    alone = sample(logits[:, :20], rows_of(*inside, seeds=seeds), index, counts[:, :20])
    assert torch.equal(chosen, alone)
    assert (sample(logits, rows_of(*params, seeds=seeds), index, counts) >= 20).any()


def test_slices_of_rows_are_all_rows(monkeypatch):
    params = [p for p in CUT for _ in range(3)]
    logits = random_logits(len(params), 30)
    rows, index = rows_of(*params), torch.arange(len(params))
    generated = [[i % 30, (7 * i) % 30, 4, 4] for i in range(len(params))]
    counts = count_tokens(torch.zeros_like(logits), generated)
    whole = sample(logits, rows, index, counts), logprobs_of(logits, index, 3)
    monkeypatch.setattr(sampling, "AT_ONCE", 4 * 30)
    assert torch.equal(sample(logits, rows, index, counts), whole[0])
    assert torch.equal(sample(logits, rows, index, generated), whole[0])
    assert torch.equal(sample(logits, rows, index, generated, 30), whole[0])
    assert all(map(torch.equal, logprobs_of(logits, index, 3), whole[1]))


# ---- logits looked at


def test_rows_that_are_not_finite_are_found():
    logits = random_logits(7, 50)
    logits[1, 3] = math.nan
    logits[2, 49] = math.inf
    logits[3, :] = -math.inf
    logits[4, 1:] = -math.inf
    logits[5, 7], logits[5, 8] = math.inf, math.nan
    logits[6] = 3e38  # a sum of these would overflow
    assert finite_rows(logits).tolist() == [True, False, False, False, True, False, True]


@pytest.mark.parametrize("k", [0, 1, 5])
def test_logprobs_are_those_of_the_raw_logits(k):
    logits = random_logits(6, 400, spread=8.0)
    logits[:, 9] = -math.inf
    ids = torch.tensor([0, 9, 5, 399, 1, 2])
    logprob, top_ids, top = logprobs_of(logits, ids, k)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprob.double(), exact[range(6), ids], rtol=1e-6, atol=1e-6)
    assert (logprob.shape, top_ids.shape, top.shape) == ((6,), (6, k), (6, k))
    assert torch.equal(top_ids, exact.topk(k).indices)
    torch.testing.assert_close(top.double(), exact.topk(k).values, rtol=1e-6, atol=1e-6)
