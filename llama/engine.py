"""Requests, slots and one step: admit, run, sample, emit.

The only loop that generates: everything that wants tokens submits requests here and calls `step`
until they are done. Ids in, ids out; it knows no text. The surprising thing: a step runs the model
once on a flat row of tokens in which one-token decodes and chunks of prompts lie side by side, so a
long prompt never stalls those who are already answering.

Letters: N tokens of a step, R requests that get a token in it, M scored prompt rows, V vocabulary.
"""

import logging
import random
import zlib
from array import array
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama.cache import Batch
from llama.model import Transformer
from llama.sampling import RowParams, SamplingParams, finite_rows, logprobs_of, sample

if TYPE_CHECKING:
    from llama.cuda.forward import FlatForward
    from llama.cuda.step import CapturedStep

logger = logging.getLogger(__name__)

LOGIT_ROWS = 256  # scored prompt rows whose logits exist at one time: 131 MB at V = 128256


@dataclass(eq=False)
class Request:
    """One prompt and what has become of it. Read it; only the engine writes."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    limit: int  # tokens it may generate
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)  # the first token's is 0.0
    finish_reason: str | None = None  # "stop", "length", or what cancel was given
    slot: int = -1
    cached: int = 0  # how many of prompt + tokens have their keys in the slot
    reused: int = 0  # how many of them had when it came, of an earlier request

    @property
    def pending(self) -> int:
        """Tokens whose keys are not in the slot yet: one while decoding, more in the prompt."""
        return len(self.prompt) + len(self.tokens) - self.cached

    def following(self, count: int) -> list[int]:
        """The first `count` of the pending tokens."""
        if self.tokens and self.pending == 1:
            return self.tokens[-1:]
        return (self.prompt + self.tokens)[self.cached : self.cached + count]


@dataclass(frozen=True)
class Event:
    """What a step brought one request: a token, the end, or both.

    `token` is None at a stop token, which is neither text nor output. Logprobs are of the model's
    own distribution, before temperature and filters; `top_logprobs` the (id, logprob) that params
    ask for.
    """

    request: Request
    token: int | None
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """A step's result for one request, on the host."""

    token: int
    logprob: float
    top_logprobs: list[tuple[int, float]]


class Engine:
    """Runs requests on one model with a cache of `max_batch_size` slots of `max_seq_len` tokens.

    More requests than slots wait their turn. `stop_token_ids` end every request; `seed` starts the
    stream from which requests without a seed of their own draw one; `chunk` bounds the tokens of a
    step, a quarter of it those of a step in which others are answering. With `reuse`, a prompt
    that begins like what a free slot still holds takes that over and only runs the rest: for
    conversations. It is off by default, because the same prompt may then differ in the last bit
    from one call to the next. With several ranks, every rank makes the same calls in the same
    order. On an NVIDIA GPU `kernels` lets llama.cuda run the model: a step of decodes alone is then
    captured, and its events come while the next step runs already.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch_size: int,
        max_seq_len: int,
        stop_token_ids: Collection[int] = (),
        seed: int = 1,
        chunk: int = 2048,
        reuse: bool = False,
        kernels: bool = True,
    ) -> None:
        self.model = model
        self.device = model.norm.weight.device
        self.cache = model.new_cache(max_batch_size, max_seq_len)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.chunk = chunk
        self.reuse = reuse
        self.steps = 0
        self._seeds = random.Random(seed)
        self._free = set(range(max_batch_size))
        self._kept: dict[int, list[int]] = {}  # what free slots hold keys of
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._checksum = 0
        self._rows: tuple[list[Request], RowParams] | None = None
        self.forward: Transformer | FlatForward = model
        self.captured: CapturedStep | None = None
        self._loaded: list[Request] = []  # the rows of the captured step
        self._stale = False  # whether one of them ended without the device knowing
        if kernels:
            self._use_kernels()

    def _use_kernels(self) -> None:
        """Have llama.cuda run the model, where it can; the model itself does where it cannot."""
        if self.device.type != "cuda":
            return
        if self.model.ranks.size > 1:
            logger.info("kernels are for one GPU; %d ranks run without", self.model.ranks.size)
            return
        from llama import cuda

        fp8 = any(p.dtype == torch.float8_e4m3fn for p in self.model.parameters())
        reason = cuda.supported(self.model.params, self.cache.k.dtype, self.device, fp8)
        if reason is not None:
            logger.warning("running without kernels: %s", reason)
            return
        from llama.cuda.step import CapturedStep

        self.captured = CapturedStep(self.model, self.cache, self.cache.n_slots)
        self.forward = self.captured.forward

    # ---- the face

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raise the ValueError that `submit` would."""
        vocab, room = self.model.params.vocab_size, self.cache.max_seq_len
        if not prompt:
            raise ValueError("the prompt is empty; it must have at least one token")
        bad = next((t for t in prompt if not 0 <= t < vocab), None)
        if bad is not None:
            raise ValueError(f"the prompt has token id {bad}; ids go from 0 to {vocab - 1}")
        wanted = 0 if params.max_tokens == 0 else 1
        if len(prompt) + wanted > room:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_seq_len is {room}, which leaves no "
                f"room for an answer: shorten it to {room - wanted} tokens, or build with a larger "
                "max_seq_len"
            )
        params.check_vocabulary(vocab)

    def submit(self, prompt: Iterable[int], params: SamplingParams) -> Request:
        """Queue a prompt of token ids. Raises ValueError where it cannot be run; see `check`."""
        ids = list(prompt)
        self.check(ids, params)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        room = self.cache.max_seq_len - len(ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        request = Request(ids, params, seed, limit)
        self._waiting.append(request)
        self._note(ids)
        return request

    def cancel(self, request: Request, reason: str) -> None:
        """End a request now, whatever state it is in; its slot is free for the next step."""
        if request.finish_reason is None:
            self._finish(request, reason)
            self._stale = True

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run the model once on everything that can go on; at most one event a request.

        Raises FloatingPointError, naming request, step and dtype, where logits are not finite (that
        request ends with finish_reason "error"), and RuntimeError where ranks disagree or are gone.
        """
        self._agree()
        self._admit()
        if self.captured is not None:
            decoding = all(request.pending == 1 for request in self._running)
            if not any(request.finish_reason is None for request in self._loaded):
                self._forget_captured(self.captured)
            if (self._running and decoding) or self.captured.flight:
                return self._captured_step(self.captured, decoding)
        work = self._share()
        if not work:
            return []
        self._loaded = []  # its rows go on without the device
        self.steps += 1
        with self.model.ranks.together():
            ready, logits = self._run(work)
            choices = self._sample(ready, logits) if ready else []
        for request, count in work:  # from here on nothing fails: a step happens as a whole or not
            request.cached += count
        events = self._emit(ready, choices)
        events += [self._end(r, "length") for r, _ in work if r.limit == 0 and not r.pending]
        if self.idle:
            self._agree()
        return events

    def _captured_step(self, captured: "CapturedStep", decoding: bool) -> list[Event]:
        """Launch the next step, if all it needs is on the device, then emit the one before."""
        try:
            if not captured.flight:
                self._load(captured)
                captured.launch()
            going = [r for r in self._loaded if r.finish_reason is None]
            same = decoding and not self._stale and len(going) == len(self._running)
            some_go_on = any(len(r.tokens) + 1 < r.limit for r in going)
            if same and some_go_on and 2 * len(going) > len(self._loaded):
                captured.launch()
            outcomes = zip(self._loaded, captured.read(), strict=False)
            live = [(r, outcome) for r, outcome in outcomes if r.finish_reason is None]
            self.steps += 1
            for request, outcome in live:
                self._check(request, outcome.finite)
        except BaseException:
            self._forget_captured(captured)
            raise
        for request, _ in live:
            request.cached += 1
        choices = [Choice(found.token, found.logprob, found.top) for _, found in live]
        events = self._emit([request for request, _ in live], choices)
        if not captured.knows_stops:
            self._stale = self._stale or any(r.finish_reason == "stop" for r, _ in live)
        if self.idle:
            self._forget_captured(captured)
            self._agree()
        return events

    def _load(self, captured: "CapturedStep") -> None:
        """Make the running requests the rows of the captured step."""
        from llama.cuda.step import Row

        self._loaded, self._stale = list(self._running), False
        captured.load(
            [
                Row(
                    token=request.following(1)[0],
                    position=request.cached,
                    slot=request.slot,
                    generated=request.tokens,
                    limit=request.limit,
                    seed=request.seed,
                    params=request.params,
                    stops=self.stop_token_ids | set(request.params.stop_token_ids),
                )
                for request in self._loaded
            ]
        )

    def _forget_captured(self, captured: "CapturedStep") -> None:
        """What is in flight never happened; the next captured step starts from the requests."""
        captured.drop()
        self._loaded = []

    # ---- the four verbs

    def _admit(self) -> None:
        while self._waiting and self._free:
            request = self._waiting.popleft()
            # The slot that knows most of the prompt; else the lowest, to keep the live span short.
            known = {slot: self._known(slot, request) for slot in self._free}
            request.slot = min(self._free, key=lambda slot: (-known[slot], slot))
            request.cached = request.reused = known[request.slot]
            self._free.remove(request.slot)
            self._kept.pop(request.slot, None)
            self._running.append(request)

    def _known(self, slot: int, request: Request) -> int:
        """How many tokens of a prompt have their keys in a slot; one is always left to run."""
        if request.params.prompt_logprobs is not None:
            return 0
        both = zip(self._kept.get(slot, ()), request.prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))

    def _share(self) -> list[tuple[Request, int]]:
        """Who runs how many tokens in this step: decodes first, then prompts while there is
        room."""
        decodes = sorted((r for r in self._running if r.pending == 1), key=lambda r: r.slot)
        work = [(r, 1) for r in decodes]
        room = max(1, self.chunk // 4 - len(work)) if work else self.chunk
        for request in self._running:
            if request.pending > 1 and room > 0:
                count = min(request.pending, room)
                work.append((request, count))
                room -= count
        return sorted(work, key=lambda item: item[1] > 1)

    def _run(self, work: list[tuple[Request, int]]) -> tuple[list[Request], Tensor]:
        """One forward; the requests that now want a token, and their logits (R, V)."""
        ids: list[int] = []
        positions: list[int] = []
        last, ready = [], []
        scored: list[tuple[Request, int, int]] = []  # request, its first row, its tokens
        for request, count in work:
            first, row = request.cached, len(ids)
            ids += request.following(count)
            positions += range(first, first + count)
            if request.params.prompt_logprobs is not None and first < len(request.prompt):
                scored.append((request, row, count))
            if count == request.pending and request.limit:
                ready.append(request)
                last.append(len(ids) - 1)
        tokens, where = torch.tensor([ids, positions]).to(self.device)  # (N,), (N,)
        at = torch.tensor(last, dtype=torch.int64).to(self.device)
        batch = Batch(
            [count for _, count in work],
            [request.cached + count for request, count in work],
            [request.slot for request, _ in work],
            self.device,
        )
        hidden = self.forward.hidden(tokens, where, batch, self.cache)
        for request, row, count in scored:
            self._score(request, hidden[row : row + count])
        return ready, self.forward.logits(hidden[at]) if ready else hidden

    def _score(self, request: Request, hidden: Tensor) -> None:
        """Add the logprobs of the prompt tokens that follow the rows of `hidden`, slice by
        slice."""
        done = request.prompt_logprobs
        done[request.cached + 1 :] = []  # of a step that was interrupted
        if not done:
            done.append(0.0)
        for part in torch.split(hidden, LOGIT_ROWS):
            targets = request.prompt[len(done) : len(done) + len(part)]
            if targets:
                wanted = torch.tensor(targets, device=self.device)
                logits = self.forward.logits(part)[: len(targets)]
                done += logprobs_of(logits, wanted, 0)[0].tolist()

    def _sample(self, ready: list[Request], logits: Tensor) -> list[Choice]:
        """One token for each row of `logits` (R, V), brought to the host in one transfer."""
        if self._rows is None or self._rows[0] != ready:
            params = [r.params for r in ready]
            rows = RowParams.from_params(params, [r.seed for r in ready], self.device)
            self._rows = (ready, rows)
        rows = self._rows[1]
        index = torch.tensor([len(r.tokens) for r in ready]).to(self.device)
        counts = [r.tokens for r in ready] if rows.penalised else None
        chosen = sample(logits, rows, index, counts)  # (R,)
        k = max((r.params.logprobs or 0) for r in ready)
        logprob, top_ids, top = logprobs_of(logits, chosen, k)
        packed = torch.cat(  # ids are exact in float32: vocabularies end far below 2^24
            [chosen[:, None], finite_rows(logits)[:, None], logprob[:, None], top_ids, top], dim=1
        ).tolist()
        for request, values in zip(ready, packed, strict=True):
            self._check(request, bool(values[1]))
        return [
            Choice(
                int(v[0]),
                v[2],
                [(int(i), p) for i, p in zip(v[3 : 3 + k], v[3 + k :], strict=True)],
            )
            for v in packed
        ]

    def _check(self, request: Request, finite: bool) -> None:
        """End a request whose logits are not finite, and raise."""
        if not finite:
            self.cache.forget(request.slot)
            self._finish(request, "error")
            raise FloatingPointError(
                f"the logits of slot {request.slot} at step {self.steps} (token "
                f"{len(request.tokens)} of its answer) are not finite, with weights in "
                f"{self.cache.k.dtype}: check the checkpoint, or build with dtype='float32'"
            )

    def _emit(self, ready: list[Request], choices: list[Choice]) -> list[Event]:
        self._note(choice.token for choice in choices)
        events = []
        for request, choice in zip(ready, choices, strict=True):
            stops = request.params.stop_token_ids
            if choice.token in self.stop_token_ids or choice.token in stops:
                events.append(self._end(request, "stop"))
                continue
            request.tokens.append(choice.token)
            reason = "length" if len(request.tokens) == request.limit else None
            if reason:
                self._finish(request, reason)
            asked = request.params.logprobs
            top = None if asked is None else choice.top_logprobs[:asked]
            events.append(Event(request, choice.token, choice.logprob, top, reason))
        return events

    # ---- small things

    def _end(self, request: Request, reason: str) -> Event:
        self._finish(request, reason)
        return Event(request, None, finish_reason=reason)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request in self._running:
            self._running.remove(request)
            self._free.add(request.slot)
            if self.reuse and reason != "error":
                self._kept[request.slot] = (request.prompt + request.tokens)[: request.cached]
        else:
            self._waiting.remove(request)

    def _note(self, ids: Iterable[int]) -> None:
        self._checksum = zlib.crc32(array("q", ids).tobytes(), self._checksum)

    def _agree(self) -> None:
        """Every rank has been asked the same and has sampled the same, or all of them stop here."""
        sums = [values[0] for values in self.model.ranks.exchange([self._checksum])]
        if len(set(sums)) > 1:
            raise RuntimeError(
                f"the ranks disagree on prompts or tokens (checksums {sums}): every rank must make "
                "the same calls with the same arguments"
            )
