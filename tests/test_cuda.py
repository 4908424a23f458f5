"""What only a GPU can show: the plain model there is the model here, and needs no quadratic
memory."""

import threading
from pathlib import Path

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_tokenizer

import llama.demo
from llama import Llama
from llama.cache import Batch
from llama.checkpoint import open_checkpoint, random_checkpoint, write_meta
from llama.engine import Engine
from llama.loading import load, make_plan
from llama.loading.runners import runner_for
from llama.model import ModelArgs
from llama.parallel import ONE
from llama.sampling import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")
import triton

from llama.cuda.launch import compile_together
from llama.cuda.norm_rope_gate import rms_norm
from llama.cuda.step import CapturedStep, Row

pytestmark = pytest.mark.gpu
PROMPTS = [[256, 72, 101, 108], [256, *range(40)], [7], [9] * 63]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda")
    args = tiny_args(vocab_size=BYTES_VOCAB, dim=256, context_length=8192)
    write_meta(random_checkpoint(args, seed=2, dtype=torch.float32), path / "model", shards=2)
    write_tokenizer(path / "model" / "tokenizer.model")
    return path / "model"


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_float32_ids_and_samples_on_cuda_are_those_on_the_cpu(folder, temperature):
    def answers(device):
        llama = Llama.build(folder, max_seq_len=256, max_batch_size=3, device=device)
        return llama.generate(PROMPTS, 64, temperature, 0.9, logprobs=True, seed=3)

    (ids, scores), (expected, expected_scores) = answers("cuda"), answers("cpu")
    assert ids == expected
    for row, reference in zip(scores, expected_scores, strict=True):
        assert row == pytest.approx(reference, abs=1e-4)


def test_bf16_on_cuda_is_close_to_float32(folder):
    scores = []
    for dtype in ("bfloat16", "float32"):
        llama = Llama.build(folder, max_seq_len=256, device="cuda", dtype=dtype)
        scores.append(llama.generate([PROMPTS[1]], 0, logprobs=True, echo=True)[1][0])
    difference = (torch.tensor(scores[0]) - torch.tensor(scores[1])).abs().max()
    assert 0 < difference < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [2048, 8192])
def test_a_long_prefill_needs_what_the_plan_says_and_nothing_quadratic(dtype, chunk):
    args = ModelArgs(
        dim=2048, n_layers=3, n_heads=32, n_kv_heads=8, vocab_size=32000,
        context_length=8192, max_seq_len=8192, max_batch_size=1,
    )  # fmt: skip
    source = random_checkpoint(args, dtype=dtype, device="cuda")
    model = load(source, ranks=ONE, device="cuda")
    engine = Engine(runner_for(model, max_batch_size=1, max_seq_len=8192), chunk=chunk)
    plan = make_plan(args, dtype=dtype, max_batch_size=1, max_seq_len=8192, chunk=chunk)
    prompt = torch.randint(0, 32000, (8191,)).tolist()
    for _ in range(2):  # the first call also makes cuBLAS's own workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=1))
        while not engine.idle:
            engine.step()
    used = torch.cuda.max_memory_allocated() - before
    scores = 32 * chunk * 8192 * dtype.itemsize
    print(f"{dtype}, chunk {chunk}: {used / 2**20:.0f} MB, planned {plan.workspace / 2**20:.0f} MB")
    assert used <= plan.workspace
    assert used < scores / 2


DEMO = Path(llama.demo.__file__).parent


def demo_model(dtype):
    source = open_checkpoint(DEMO)
    return load(source, ranks=ONE, device="cuda", dtype=dtype), source.open_tokenizer(None)


def demo_prompts(tokenizer, count):
    words = ["What", "The capital of", "Spell", "One day a", "A haiku about", "Count from", "Red"]
    texts = [f"{words[i % 7]} {words[i % 5].lower()} {i}" for i in range(count)]
    return [tokenizer.encode(text, bos=True, eos=False) for text in texts]


def greedy(model, prompts, tokens, kernels):
    engine = Engine(runner_for(model, max_batch_size=8, max_seq_len=256, kernels=kernels))
    params = SamplingParams(temperature=0, max_tokens=tokens)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    while not engine.idle:
        engine.step()
    return [request.tokens for request in requests]


def test_the_demo_says_the_same_with_kernels_and_without_in_float32():
    model, tokenizer = demo_model(torch.float32)
    prompts = demo_prompts(tokenizer, 25)
    plain = greedy(model, prompts, 48, False)
    assert sum(map(len, plain)) >= 1000
    assert greedy(model, prompts, 48, True) == plain


def step_logits(model, ids):
    """Logits (S, V) of every position of `ids`, by captured steps of one row."""
    cache = model.new_cache(1, len(ids))
    step = CapturedStep(model, cache, 1)
    rows = []
    for position, token in enumerate(ids):
        step.load([Row(token, position, 0, (), 9, 0, SamplingParams(temperature=0), ())])
        step.launch()
        step.read()
        rows.append(step.scratch.logits[0].double())
    return torch.stack(rows)


def test_bf16_parts_only_where_roundings_of_this_size_can_part():
    """Where two ways with logit errors a and b choose differently, the top-2 margin of the first is
    at most 2 (a + b). The errors are measured against float64, the kernels' no worse than plain."""
    model, tokenizer = demo_model(torch.bfloat16)
    exact, _ = demo_model(torch.float32)
    exact = exact.double()
    prompts = demo_prompts(tokenizer, 25)
    both = greedy(model, prompts, 48, False), greedy(model, prompts, 48, True)
    squares, parted = torch.zeros(2, dtype=torch.float64), []
    for prompt, plain, ours in zip(prompts, *both, strict=True):
        same = next((i for i, (p, o) in enumerate(zip(plain, ours, strict=False)) if p != o), None)
        ids = prompt + plain[:same]
        batch = Batch([len(ids)], device="cuda")
        tokens, positions = torch.tensor(ids).cuda(), torch.arange(len(ids)).cuda()
        with torch.no_grad():
            truth = exact.forward_flat(tokens, positions, batch).double()
            usual = model.forward_flat(tokens, positions, batch).double()
        kernels = step_logits(model, ids)
        squares += torch.stack(
            [(usual - truth).square().sum(), (kernels - truth).square().sum()]
        ).cpu()
        if same is not None:
            a, b = ((t[-1] - truth[-1]).abs().max() for t in (usual, kernels))
            top = usual[-1].topk(2).values
            parted.append((float(top[0] - top[1]), float(2 * (a + b))))
            assert top[0] - top[1] <= 2 * (a + b)
    print(f"errors {squares.sqrt().tolist()}, parted at (margin, bound): {parted}")
    assert squares[1] <= 1.1 * squares[0]


def test_memory_beside_weights_and_cache_is_small():
    args = ModelArgs(
        dim=4096, n_layers=4, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256,
        context_length=8192, max_seq_len=2048, max_batch_size=4,
    )  # fmt: skip
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    source = random_checkpoint(args, dtype=torch.bfloat16, device="cuda")
    model = load(source, ranks=ONE, device="cuda")
    engine = Engine(runner_for(model, max_batch_size=4, max_seq_len=2048), chunk=4096)
    for _ in range(2):
        for _ in range(4):
            engine.submit(list(range(1500)), SamplingParams(max_tokens=5))
        while not engine.idle:
            engine.step()
    plan = make_plan(args, dtype=torch.bfloat16, max_batch_size=4, max_seq_len=2048, chunk=4096)
    above = free - torch.cuda.mem_get_info()[0] - plan.weights - plan.cache
    print(f"{above / 2**20:.0f} MB above weights and cache")
    assert above < 1.5e9


def test_what_is_compiled_together_does_not_run_and_needs_no_compiling_later():
    x, out = torch.randn(3, 128, device="cuda"), torch.zeros(3, 128, device="cuda")
    gain = torch.ones(128, device="cuda")
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.compilation, "listener", lambda **seen: compiled.append(seen))

        def launches():
            rms_norm(x, gain, 1e-5, out)
            rms_norm(x.bfloat16(), gain.bfloat16(), 1e-5, out.bfloat16())

        compile_together(launches, x.device)
        assert len(compiled) == 2
        assert not out.any()
        rms_norm(x, gain, 1e-5, out)
        assert len(compiled) == 2
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (128,), gain, 1e-5))


@pytest.mark.parametrize("threaded", [False, True])
def test_a_model_on_the_second_gpu_runs_there_whatever_the_current_device_is(folder, threaded):
    """Kernels, graphs and events went to GPU 0, and a thread has a current device of its own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def answers(device):
        llama = Llama.build(folder, max_seq_len=256, max_batch_size=3, device=device)
        assert llama.engine.runner.captured is not None
        return llama.generate(PROMPTS, 64, 0, logprobs=True)

    torch.cuda.set_device(0)
    expected = answers("cuda:0")
    if threaded:
        found = []
        worker = threading.Thread(target=lambda: found.append(answers("cuda:1")))
        worker.start()
        worker.join()
    else:
        found = [answers("cuda:1")]
    assert torch.cuda.current_device() == 0
    assert found[0][0] == expected[0]
    for row, reference in zip(found[0][1], expected[1], strict=True):
        assert row == pytest.approx(reference, abs=1e-5)
