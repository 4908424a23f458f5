"""Perplexity: windows that count every token once, and numbers equal to a direct computation."""

import math
import statistics
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.cache import Batch
from llama.commands.scoring import Score, check_window, score, windows
from llama.demo.world.corpus import held_out_text

DEMO = Path(__file__).parent.parent / "llama" / "demo"


def direct(llama, text, window, stride):
    """Negative log likelihoods by one uncached pass a window: what `score` does through the
    engine."""
    bos = llama.tokenizer.bos_id
    ids = llama.tokenizer.encode(text, bos=False, eos=False)
    losses, end = [], 0
    while end < len(ids):
        begin = end
        end = min(len(ids), begin + (stride if begin else window - 1))
        row = torch.tensor([bos, *ids[max(0, end - window + 1) : end]])
        with torch.inference_mode():
            logits = llama.model.forward_flat(row, torch.arange(len(row)), Batch([len(row)]))
        picked = logits[:-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        losses += (-picked[begin - end :]).tolist()
    return losses


def close(result, losses, text):
    assert result.tokens == len(losses)
    assert result.mean == pytest.approx(statistics.fmean(losses), abs=1e-5)
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    assert result.error == pytest.approx(error, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-5)
    bits = sum(losses) / math.log(2) / len(text.encode())
    assert result.bits_per_byte == pytest.approx(bits, abs=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 1), (32, 31), (2, 1), (64, None)])
@pytest.mark.parametrize("length", [1, 31, 32, 100])
def test_it_is_what_the_model_says_without_engine_and_cache(tiny_llama, window, stride, length):
    llama = tiny_llama(max_seq_len=64, max_batch_size=3)
    text = "".join(chr(32 + 7 * i % 90) for i in range(length))
    result = score(llama, text, window=window, stride=stride)
    losses = direct(llama, text, window, stride or window // 2)
    if length > 1:
        close(result, losses, text)
    else:
        assert result.total == pytest.approx(losses[0], abs=1e-5)
        assert math.isnan(result.error)


@pytest.mark.parametrize("window", range(2, 9))
def test_every_token_is_new_in_one_window_and_has_the_context_it_was_promised(window):
    ids = list(range(100, 123))
    for stride in range(1, window):
        seen = []
        for index, (row, new) in enumerate(windows(ids, 7, window, stride)):
            assert row[0] == 7
            assert len(row) <= window
            assert len(row) == window or not index
            assert new == (window - 1 if not index else stride) or row[-1] == ids[-1]
            seen += row[-new:]
        assert seen == ids


def test_the_demos_own_text_as_computed_directly(tmp_path):
    if not (DEMO / "consolidated.00.pth").exists():
        pytest.skip("the demo has not been trained")
    llama = Llama.build(DEMO, max_seq_len=256, max_batch_size=4, device="cpu", dtype="float32")
    documents = held_out_text(60)
    plain = [d if isinstance(d, str) else "\n".join(m["content"] for m in d) for d in documents]
    text = "\n".join(plain)
    result = score(llama, text, window=256)
    close(result, direct(llama, text, 256, 128), text)
    print(
        f"{result.tokens} tokens: {result.mean:.6f} nats a token, perplexity "
        f"{result.perplexity:.4f} +- {result.perplexity * result.error:.4f}, "
        f"{result.bits_per_byte:.6f} bits a byte"
    )


def test_mistakes_are_refused(tiny_llama):
    llama = tiny_llama(max_seq_len=64)
    with pytest.raises(ValueError, match="the text is empty"):
        score(llama, "", window=64)
    with pytest.raises(ValueError, match="window is 65; this model was built for 64"):
        score(llama, "x", window=65)
    with pytest.raises(ValueError, match="window is 1; it must be at least 2"):
        check_window(1, None)
    for stride in (0, -1, 8):
        with pytest.raises(ValueError, match=rf"stride is {stride}; it must be from 1 to 7"):
            check_window(8, stride)
    assert check_window(2, None) == 1


def test_the_standard_error_of_equal_tokens_is_none():
    assert Score(4, 4, 8.0, 16.0, 8, 4).error == 0
