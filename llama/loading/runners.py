"""Which runner computes for a model: an accelerator's where its room supports the model, or the
plain one.

The only file that has an accelerator's room run a model, and only where the model lies on such a
device.
"""

import logging

import torch

from llama.cache import KVCache
from llama.engine.protocol import Runner
from llama.engine.runner import PlainRunner
from llama.model import Transformer

logger = logging.getLogger(__name__)


def runner_for(
    model: Transformer,
    *,
    max_batch_size: int,
    max_seq_len: int,
    n_words: int | None = None,
    kernels: bool = True,
) -> Runner:
    """A runner with a new cache of `max_batch_size` slots of `max_seq_len` tokens.

    Tokens are chosen among the first `n_words` of the vocabulary, those that the tokenizer has
    (None: all). On an NVIDIA GPU `kernels` lets llama.cuda run the model, where it can.
    """
    cache = model.new_cache(max_batch_size, max_seq_len)
    own = captured_runner(model, cache, n_words) if kernels else None
    return own or PlainRunner(model, cache, n_words)


def captured_runner(model: Transformer, cache: KVCache, n_words: int | None) -> Runner | None:
    """The runner of llama.cuda, or None where the model itself must do."""
    if cache.k.device.type != "cuda":
        return None
    if model.ranks.size > 1:
        logger.info("kernels are for one GPU; %d ranks run without", model.ranks.size)
        return None
    from llama import cuda

    fp8 = any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
    reason = cuda.supported(model.params, cache.k.dtype, cache.k.device, fp8)
    if reason is not None:
        logger.warning("running without kernels: %s", reason)
        return None
    from llama.cuda.runner import CapturedRunner

    return CapturedRunner(model, cache, n_words)
