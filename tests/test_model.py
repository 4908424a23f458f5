"""Laws of the model: what it computes, by comparison with transformers and with itself."""

import contextlib
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import tiny_args, unit_scale

from llama import parallel
from llama.cache import Batch
from llama.loading.settings import check_vocabulary, with_limits
from llama.model import ModelArgs, RMSNorm, RopeScaling, Transformer, rope_frequencies
from llama.parallel import float32_product

SHAPES = {
    "llama3": {},
    "llama3 without grouped heads": {"n_kv_heads": 8},
    "llama3 one kv head": {"n_kv_heads": 1},
    "llama31": {"use_scaled_rope": True},
    "llama32 factor, tied": {"rope_scaling": RopeScaling(factor=32.0), "tied": True},
    "head size of its own": {"head_dim": 16},
}


def swap_pairs(weight, heads):
    """Rows of wq or wk from interleaved pairs (2i, 2i+1) to two halves (i, i + E/2)."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def transformers_twin(model, permute=True, scaling=True):
    transformers = pytest.importorskip("transformers")
    args = model.params
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling and scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.original_context,
        }
    config = transformers.LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=args.tied,
    )
    twin = transformers.LlamaForCausalLM(config).eval()
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, weight in model.state_dict().items():
        if permute and name.endswith("wq.weight"):
            weight = swap_pairs(weight, args.n_heads)
        if permute and name.endswith("wk.weight"):
            weight = swap_pairs(weight, args.n_kv_heads)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("tok_embeddings", "embed_tokens")
        state[name.replace("output.", "lm_head.") if "output" in name else "model." + name] = weight
    twin.load_state_dict(state, strict=True)
    return twin


def far_positions(count, seed=0):
    """Rising positions from 0 to far past 8192, so that many distances between tokens occur."""
    generator = torch.Generator().manual_seed(seed)
    far = torch.randperm(100_000, generator=generator)[: count - 4]
    return torch.cat([torch.arange(4), far + 4]).sort().values


def both_logits(model, twin, tokens, positions):
    with torch.inference_mode():
        ours = model.forward_flat(tokens, positions, Batch([len(tokens)]))
        return ours, twin(tokens[None], position_ids=positions[None]).logits[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_our_logits_are_those_of_transformers_also_past_position_8192(shape):
    model = unit_scale(Transformer(tiny_args(**SHAPES[shape])))
    tokens = torch.randint(0, 96, (48,), generator=torch.Generator().manual_seed(1))
    ours, theirs = both_logits(model, transformers_twin(model), tokens, far_positions(48))
    assert 0.3 < ours.std() < 3
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_our_greedy_ids_are_those_of_transformers(shape, tiny):
    model = tiny(**SHAPES[shape])
    twin = transformers_twin(model)
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    with torch.inference_mode():
        theirs = twin.generate(
            ids, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None
        )[0]
        ours = ids
        for _ in range(40):
            past = 0 if ours is ids else ours.shape[1] - 1
            logits = model(ours[:, past:], past)
            ours = torch.cat([ours, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert ours[0].tolist() == theirs.tolist()


def test_the_comparison_fails_when_q_and_k_are_not_permuted(tiny):
    model = tiny()
    twin = transformers_twin(model, permute=False)
    ours, theirs = both_logits(model, twin, torch.arange(48), far_positions(48))
    assert (ours - theirs).abs().max() > 0.1


def test_the_comparison_fails_when_the_rope_factor_is_dropped(tiny):
    model = tiny(use_scaled_rope=True)
    twin = transformers_twin(model, scaling=False)
    ours, theirs = both_logits(model, twin, torch.arange(48), far_positions(48))
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_frequencies_are_those_of_transformers(factor):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    theirs, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    ours = rope_frequencies(ModelArgs(rope_scaling=RopeScaling(factor=factor)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8}, 32),
        ({"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8}, 32),
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8}, 8),
        ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8}, 8),
        ({"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8}, 8),
    ],
)
def test_use_scaled_rope_means_the_factor_of_the_released_model(shape, factor):
    args = ModelArgs(**shape, use_scaled_rope=True)
    assert (args.rope_scaling.factor, args.context_length) == (factor, 131072)
    assert ModelArgs(**shape).rope_scaling is None
    chosen = ModelArgs(**shape, use_scaled_rope=True, rope_scaling=RopeScaling(factor=4.0))
    assert chosen.rope_scaling.factor == 4


def test_hidden_sizes_are_those_of_the_released_models():
    released = [
        (dict(dim=4096, multiple_of=1024, ffn_dim_multiplier=1.3), 14336),
        (dict(dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3, n_heads=64), 28672),
        (dict(dim=16384, multiple_of=4096, ffn_dim_multiplier=1.2, n_heads=128), 53248),
        (dict(dim=2048, multiple_of=256, ffn_dim_multiplier=1.5), 8192),
        (dict(dim=3072, multiple_of=256, ffn_dim_multiplier=1.0, n_heads=24), 8192),
        (dict(dim=4096, multiple_of=256), 11008),
    ]
    for shape, hidden in released:
        assert ModelArgs(**shape).hidden_dim == hidden


def released_parameters(**shape):
    with torch.device("meta"):
        model = Transformer(ModelArgs(vocab_size=128256, **shape))
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_are_those_of_the_released_models():
    eight = dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024)
    assert released_parameters(**eight, ffn_dim_multiplier=1.3) == 8_030_261_248
    seventy = dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096)
    assert released_parameters(**seventy, ffn_dim_multiplier=1.3) == 70_553_706_496
    one = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=256, tied=True)
    assert released_parameters(**one, ffn_dim_multiplier=1.5) == 1_235_814_400
    three = dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, multiple_of=256, tied=True)
    assert released_parameters(**three, ffn_dim_multiplier=1.0) == 3_212_749_824


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 8, 5], [1, 18, 1], [19, 1]])
def test_cached_is_uncached_and_chunks_are_one_pass(tiny, cuts):
    model = tiny()
    tokens = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole = model.forward_flat(tokens.flatten(), torch.arange(20).repeat(3), Batch([20] * 3))
        start, parts = 0, []
        for cut in cuts:
            parts.append(model(tokens[:, start : start + cut], start))
            start += cut
    torch.testing.assert_close(torch.cat(parts, 1).flatten(0, 1), whole, rtol=0, atol=1e-5)


def test_a_row_of_a_ragged_flat_batch_is_the_row_alone(tiny):
    model = tiny()
    tokens = torch.randint(0, 96, (4, 30), generator=torch.Generator().manual_seed(3))
    alone = model(tokens, 0)
    cache = model.new_cache(6, 64)
    cache.k.fill_(7.0)  # what earlier sequences left must not matter
    cache.v.fill_(-7.0)
    first = Batch([9, 4, 9], [9, 4, 9], [3, 1, 5])
    rows = torch.cat([tokens[0, :9], tokens[1, :4], tokens[2, :9]])
    places = torch.cat([torch.arange(9), torch.arange(4), torch.arange(9)])
    model.forward_flat(rows, places, first, cache)
    second = Batch([1, 1, 12, 5], [10, 5, 12, 14], [5, 1, 0, 3])  # decode, decode, begin, continue
    rows = torch.cat([tokens[2, 9:10], tokens[1, 4:5], tokens[3, :12], tokens[0, 9:14]])
    places = torch.cat([torch.tensor([9, 4]), torch.arange(12), torch.arange(9, 14)])
    out = model.forward_flat(rows, places, second, cache)
    expected = torch.cat([alone[2, 9:10], alone[1, 4:5], alone[3, :12], alone[0, 9:14]])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    some = model.forward_flat(rows, places, second, cache, logits_at=torch.tensor([13, 0]))
    torch.testing.assert_close(some, expected[[13, 0]], rtol=0, atol=1e-5)


def test_a_sequence_moved_to_far_positions_gives_the_same_logits(tiny):
    """Rotary attention sees distances only: true past 8192 if the angles are precise enough."""
    model = tiny(use_scaled_rope=True)
    tokens = torch.arange(40)
    near = model.forward_flat(tokens, torch.arange(40), Batch([40]))
    far = model.forward_flat(tokens, torch.arange(40) + 100_000, Batch([40]))
    torch.testing.assert_close(near, far, rtol=0, atol=2e-2)  # float32 angles of 1e5 turns: 1e-2
    wrong = model.forward_flat(tokens, torch.arange(40) * 2, Batch([40]))
    assert (near - wrong).abs().max() > 0.1


def test_training_without_a_cache_has_the_gradient_of_the_rectangle(tiny):
    model = tiny()
    tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(4))
    flat = model.forward_flat(tokens.flatten(), torch.arange(16).repeat(2), Batch([16, 16]))
    loss = torch.nn.functional.cross_entropy(flat[:-1], tokens.flatten()[1:])
    loss.backward()
    grad = model.layers[0].attention.wq.weight.grad.clone()
    eps, direction = 1e-2, torch.randn(grad.shape, generator=torch.Generator().manual_seed(5))
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            model.layers[0].attention.wq.weight.add_(sign * eps * direction)
            out = model.forward_flat(tokens.flatten(), torch.arange(16).repeat(2), Batch([16, 16]))
            losses.append(torch.nn.functional.cross_entropy(out[:-1], tokens.flatten()[1:]))
            model.layers[0].attention.wq.weight.sub_(sign * eps * direction)
    measured = (losses[0] - losses[1]) / (2 * eps)
    assert measured.item() == pytest.approx((grad * direction).sum().item(), rel=2e-2, abs=1e-3)


def test_rms_norm_is_computed_in_float32():
    norm = RMSNorm(8, 1e-5).to(torch.float16)
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    torch.testing.assert_close(norm(x), torch.ones(1, 8, dtype=torch.float16))


def test_a_short_prompt_of_bf16_weights_gives_float32_logits(tiny):
    model = tiny().to(torch.bfloat16)
    logits = model(torch.arange(10)[None], 0)
    assert logits.dtype == torch.float32
    assert model.cache.k.dtype == torch.bfloat16


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_logits_of_half_precision_are_products_in_float32(tiny, dtype, rows):
    """Rounded, equal logits would be first together, and the best token another one."""
    model = tiny(vocab_size=20_000).to(dtype)
    tokens = torch.arange(rows)
    with torch.no_grad():
        hidden = model.hidden(tokens, tokens, Batch([rows]))
        logits = model.logits(hidden)
        exact = hidden.double() @ model.output.weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))
    rounded = exact.to(dtype)
    assert (rounded != exact).float().mean() > 0.9
    assert len(logits[0].unique()) > 2 * len(rounded[0].unique())


def test_a_weight_in_many_blocks_is_the_whole_weight(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 24, generator=generator).bfloat16() for n in (5, 103))
    whole = x.double() @ weight.double().T
    for block in (1, 24 * 10, 2**20):
        monkeypatch.setattr(parallel, "float32_block", lambda _, size=block: size)
        out = torch.full((5, 110), 7.0)
        with torch.no_grad():
            made = float32_product(x, weight)
            float32_product(x, weight, out[:, 3:106])
        torch.testing.assert_close(made.double(), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(out[:, 3:106].double(), whole, rtol=0, atol=1e-5)
        assert (out[:, :3] == 7).all()
        assert (out[:, 106:] == 7).all()


WIDE = [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]


@pytest.mark.parametrize("dtypes", [(h, h) for h in HALF] + WIDE)
def test_the_product_of_logits_has_the_gradients_of_a_product(dtypes):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 24, generator=generator) for n in (6, 50))
    x, weight = x.to(dtypes[0]).view(2, 3, 24).requires_grad_(), weight.to(dtypes[1])
    weight.requires_grad_()
    target = torch.arange(6)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    out = float32_product(x, weight)
    assert out.dtype == torch.float32
    torch.nn.functional.cross_entropy(out.flatten(0, 1), target).backward()
    logits = torch.nn.functional.linear(*exact)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target).backward()
    for ours, theirs in zip((x, weight), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("weights", [torch.float32, *HALF])
@pytest.mark.parametrize("cast", HALF)
def test_metas_call_works_under_autocast(tiny, weights, cast):
    model = tiny().to(weights)
    tokens = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens, 0)
        with torch.autocast("cpu", dtype=cast):
            parts = [model(tokens[:, low:high], low) for low, high in ((0, 7), (7, 11), (11, 12))]
    assert model.cache.k.dtype == weights
    assert {part.dtype for part in parts} == {torch.float32}
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=0.2)


def test_training_under_autocast_has_gradients_in_float32(tiny):
    model = tiny()
    tokens = torch.arange(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.forward_flat(tokens, tokens, Batch([16]))
        torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    assert logits.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_forgetting_a_part_of_a_slot_leaves_the_rest(tiny):
    cache = tiny().new_cache(3, 10)
    for tensor in (cache.k, cache.v):
        tensor.fill_(float("nan"))
    cache.forget(1, 4)
    kept = torch.ones(3, 10, dtype=torch.bool)
    kept[1, :4] = False
    assert torch.equal(cache.k.isnan().any(-1).any(-1).any(0), kept)
    assert torch.equal(cache.v.isnan().any(-1).any(-1).any(0), kept)
    cache.forget(2)
    assert not cache.k[:, 2].any()
    assert cache.v[:, 1, 4:].isnan().all()


def test_scripts_for_metas_model_set_the_vocabulary_after_construction():
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, max_seq_len=16, max_batch_size=2)
    assert args.vocab_size == -1
    with pytest.raises(ValueError, match="vocab_size=-1: set it to the tokenizer's n_words"):
        Transformer(args)
    args.vocab_size = 32
    assert Transformer(args)(torch.zeros(2, 3, dtype=torch.int64), 0).shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim=0: must be positive"),
        ({"n_heads": 6}, "n_heads=6 is no multiple of n_kv_heads=4"),
        ({"dim": 66}, "dim=66 is no multiple of n_heads=8"),
        ({"head_dim": 7}, "head_dim=7: rotary pairs need an even head size"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0: must be positive"),
        ({"hidden_dim": -2}, "hidden_dim=-2: must be positive, or 0"),
        ({"max_seq_len": 0}, "max_seq_len=0: must be positive"),
    ],
)
def test_a_shape_that_is_no_model_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{"dim": 64, "n_heads": 8, "n_kv_heads": 4, **change})


@pytest.mark.parametrize("kind", [numpy.int32, numpy.int64, numpy.array, torch.tensor])
def test_the_limits_of_a_run_are_whole_numbers_of_any_kind(kind):
    limited = with_limits(tiny_args(), kind(3), kind(50))
    assert (limited.max_batch_size, limited.max_seq_len) == (3, 50)
    assert {type(limited.max_batch_size), type(limited.max_seq_len)} == {int}
    for wrong in (0, numpy.float64(2), numpy.bool_(True), kind(0), torch.tensor([4])):
        for limits in ((wrong, 50), (3, wrong)):
            with pytest.raises(ValueError, match="must be a positive whole number"):
                with_limits(tiny_args(), *limits)


@pytest.mark.parametrize(
    ("words", "rows", "fits"),
    [(512, 520, True), (546, 812, False), (1536, 1544, True), (1536, 1792, True),
     (1536, 2304, True), (1536, 1540, True), (1536, 1700, False), (32000, 32001, True),
     (32000, 32768, True), (32000, 128256, False), (128256, 32000, False), (128256, 129024, True),
     (128256, 130048, True), (128256, 131072, False), (128000, 128256, True)],
)  # fmt: skip
def test_padding_of_any_size_that_people_ship_fits(words, rows, fits):
    tokenizer = SimpleNamespace(n_words=words, stated=False, added=[])
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="different models"):
        check_vocabulary(tokenizer, tiny_args(vocab_size=rows), "here")


def test_a_rectangle_that_does_not_fit_is_refused(tiny):
    model = tiny()
    for tokens, start in (((5, 1), 0), ((1, 65), 0), ((1, 1), 64), ((1, 1), -1)):
        with pytest.raises(ValueError, match=r"do not fit in \(max_batch_size, max_seq_len\)"):
            model(torch.zeros(tokens, dtype=torch.int64), start)


def test_rank_counts_divide_heads_and_hidden_size_and_fit_the_kv_heads():
    assert ModelArgs(n_kv_heads=8, vocab_size=8).rank_counts() == [1, 2, 4, 8, 16, 32]
    three = ModelArgs(dim=3072, n_heads=24, n_kv_heads=8, ffn_dim_multiplier=1.0, vocab_size=8)
    assert three.rank_counts() == [1, 2, 4, 8]
    assert all(math.gcd(three.n_heads, w) == w for w in three.rank_counts())
