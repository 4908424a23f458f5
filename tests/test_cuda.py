"""What only a GPU can show: the plain model there is the model here, and needs no quadratic
memory."""

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_tokenizer

from llama import Llama
from llama.checkpoint import load, make_plan, random_checkpoint, write_meta
from llama.engine import Engine
from llama.model import ModelArgs
from llama.parallel import ONE
from llama.sampling import SamplingParams

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
    engine = Engine(model, max_batch_size=1, max_seq_len=8192, chunk=chunk)
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
