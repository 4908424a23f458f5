"""The plain runner: one forward of the model in torch for a share, scoring and sampling on it.

It knows the model, its cache and sampling; refuses to know who waits, who has which slot and why a
request ends. The surprising thing: a step runs on one flat row of tokens in which one-token decodes
and chunks of prompts lie side by side, so a long prompt never stalls those who are answering.

Letters: N tokens of a step, R requests that get a token in it, M scored prompt rows, D dim, V
vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama.cache import Batch, KVCache
from llama.engine.protocol import Runner as Runner
from llama.engine.request import Alternatives, Choice, Outcome, Request, Share
from llama.model import Transformer
from llama.sampling import RowParams, finite_rows, logprobs_of, sample

LOGIT_ROWS = 256  # scored prompt rows whose logits exist at one time: 131 MB at V = 128256

Scores = tuple[list[float], list[Alternatives], bool]  # logprobs, alternatives, all of it finite


class Forward(Protocol):
    """A forward in two halves, with the meaning of Transformer's."""

    def hidden(self, tokens: Tensor, positions: Tensor, batch: Batch, cache: KVCache) -> Tensor: ...

    def logits(self, h: Tensor) -> Tensor: ...


class PlainRunner:
    """A `Runner` for every model and device, over a cache that it is given.

    `n_words` bounds the ids that are chosen (None: all of the vocabulary).
    """

    def __init__(self, model: Transformer, cache: KVCache, n_words: int | None = None) -> None:
        vocab = model.params.vocab_size
        self.model, self.cache, self.ranks = model, cache, model.ranks
        self.forward: Forward = model  # or what an accelerator has in its place
        self.device = model.norm.weight.device
        self.dtype_name = str(cache.k.dtype)
        self.n_slots, self.max_seq_len = cache.n_slots, cache.max_seq_len
        self.vocab_size, self.n_words = vocab, min(n_words or vocab, vocab)
        self._params: tuple[list[Request], RowParams] | None = None  # of the last step's rows

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
                own, theirs = torch.cuda.default_stream(), torch.cuda.current_stream()
                if theirs != own:  # steps of all threads follow each other on one stream
                    own.wait_stream(theirs)
                    stack.enter_context(torch.cuda.stream(own))
            stack.enter_context(torch.inference_mode())
            if torch.is_autocast_enabled(self.device.type):  # weights and cache have one dtype
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if torch.empty(0).device.type != "cpu":  # what the host prepares is made here
                stack.enter_context(torch.device("cpu"))
            yield

    def step(self, share: Share) -> Sequence[Outcome]:
        return self.run(share)

    def run(self, share: Share) -> Sequence[Outcome]:
        """One forward of all of it; a token for each request whose pending tokens are in it."""
        share = sorted(share, key=lambda item: (item[1] > 1, item[0].slot if item[1] == 1 else 0))
        with self.ranks.together():
            hidden, last = self._hidden(share)
            scores: dict[Request, Scores] = {}
            first = 0
            for request, count in share:
                if request.scoring:
                    scores[request] = self._score(request, hidden[first : first + count])
                first += count
            ready, choices = list(last), {}
            if ready:
                at = torch.tensor(list(last.values()), device="cpu").to(self.device)
                logits = self.forward.logits(hidden[at])  # (R, V)
                choices = dict(zip(ready, self._sample(ready, logits), strict=True))
        return [
            Outcome(r, r.cached + count, choices.get(r, ()), *scores.get(r, ()))
            for r, count in share
        ]

    def _hidden(self, share: Share) -> tuple[Tensor, dict[Request, int]]:
        """The states (N, D) of a share, and the row from which each request that is ready for a
        token gets it."""
        ids: list[int] = []
        positions: list[int] = []
        last: dict[Request, int] = {}
        for request, count in share:
            ids += request.following(count)
            positions += range(request.cached, request.cached + count)
            if count == request.pending and request.limit:
                last[request] = len(ids) - 1
        both = torch.tensor([ids, positions], device="cpu").to(self.device)  # (2, N)
        batch = Batch(
            [count for _, count in share],
            [request.cached + count for request, count in share],
            [request.slot for request, _ in share],
            self.device,
        )
        return self.forward.hidden(both[0], both[1], batch, self.cache), last

    def _score(self, request: Request, hidden: Tensor) -> Scores:
        """The scores of the prompt tokens that follow the rows of `hidden` (M, D), some rows at a
        time."""
        done: list[float] = []
        tops: list[Alternatives] = []
        if not hidden.isfinite().all():  # of the last token too, whose logits nobody asks for
            return done, tops, False
        k = request.params.prompt_logprobs or 0
        for part in torch.split(hidden, LOGIT_ROWS):
            first = request.cached + 1 + len(done)
            targets = request.prompt[first : first + len(part)]
            if targets:
                wanted = torch.tensor(targets, device=self.device)
                logits = self.forward.logits(part)[: len(targets)]
                scores, top_ids, top = (t.tolist() for t in logprobs_of(logits, wanted, k))
                if not all(map(math.isfinite, scores)):
                    return done, tops, False
                done += scores
                tops += [list(zip(*pair, strict=True)) for pair in zip(top_ids, top, strict=True)]
        return done, tops, True

    def _sample(self, ready: list[Request], logits: Tensor) -> list[list[Choice]]:
        """One token for each row of `logits` (R, V), brought to the host in one transfer."""
        if self._params is None or self._params[0] != ready:
            params = [r.params for r in ready]
            rows = RowParams.from_params(params, [r.seed for r in ready], self.device)
            self._params = (ready, rows)
        rows = self._params[1]
        index = torch.tensor([len(r.choices) for r in ready], device="cpu").to(self.device)
        counts = [r.tokens for r in ready] if rows.penalised else None
        chosen = sample(logits, rows, index, counts, self.n_words)  # (R,)
        k = max((r.params.logprobs or 0) for r in ready)
        logprob, top_ids, top = logprobs_of(logits, chosen, k)
        packed = torch.cat(  # ids are exact in float32: vocabularies end far below 2^24
            [chosen[:, None], finite_rows(logits)[:, None], logprob[:, None], top_ids, top], dim=1
        ).tolist()
        return [
            [
                Choice(
                    int(v[0]),
                    v[2],
                    [(int(i), p) for i, p in zip(v[3 : 3 + k], v[3 + k :], strict=True)],
                    bool(v[1]),
                )
            ]
            for v in packed
        ]

    def ran_out_of_memory(self, error: Exception) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        self._params = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def moved(self) -> ValueError | None:
        weight, keys = self.model.norm.weight, self.cache.k
        if (weight.dtype, weight.device) == (keys.dtype, keys.device):
            return None
        return ValueError(
            f"the model was moved to {weight.dtype} on {weight.device} after it was built for "
            f"{keys.dtype} on {keys.device}: build it again with that dtype and device"
        )

    def is_finite(self, slot: int, length: int) -> bool:
        return self.cache.is_finite(slot, length)

    def forget(self, slot: int) -> None:
        self.cache.forget(slot)

    def drop(self) -> None:
        self._params = None
