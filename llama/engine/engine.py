"""Requests, slots and one step: agree, admit, run, emit.

The only loop that generates: everything that wants tokens submits requests here and calls `step`
until they are done. Ids in, ids out; it knows no text. The surprising thing: a step runs the model
once on a flat row of tokens in which one-token decodes and chunks of prompts lie side by side, so a
long prompt never stalls those who are already answering.

The live requests are the only state. One waits while it has no slot, free slots are those that no
live request has, and a request is out of the list only once its slot was looked after. So a step
that was interrupted at any line is taken again by the next one, and nothing is lost.

Letters: N tokens of a step, R requests that get a token in it, M scored prompt rows, V vocabulary.
"""

import contextlib
import itertools
import logging
import math
import random
import threading
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama.cache import Batch
from llama.engine.request import Choice, Event, Request, token_ids
from llama.model import Transformer
from llama.sampling import (
    RowParams,
    SamplingParams,
    finite_rows,
    logprobs_of,
    plain_number,
    sample,
)

if TYPE_CHECKING:
    from llama.cuda.forward import FlatForward
    from llama.cuda.step import CapturedStep

logger = logging.getLogger(__name__)

LOGIT_ROWS = 256  # scored prompt rows whose logits exist at one time: 131 MB at V = 128256

Work = list[tuple[Request, int]]  # who runs how many tokens


class Engine:
    """Runs requests on one model with a cache of `max_batch_size` slots of `max_seq_len` tokens.

    More requests than slots wait their turn. `stop_token_ids` end every request; tokens are chosen
    among the first `n_words` of the vocabulary, those that the tokenizer has (None: all); `seed`
    starts the stream from which requests without a seed of their own draw one; `chunk` bounds the
    prompt tokens of a step, a quarter of it a step in which others are answering. With
    `reuse`, a prompt that begins like what a free slot still holds takes that over and only runs
    the rest: for conversations. It is off by default, because the same prompt may then differ in
    the last bit from one call to the next. On an NVIDIA GPU `kernels` lets llama.cuda run the
    model: a step of decodes alone is then captured, and its events come while the next step runs.

    `submit` and `cancel` may be called by any thread at any moment, also by a finalizer; `step` by
    several threads, one after the other. With several ranks, every rank makes the same calls in
    the same order.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch_size: int,
        max_seq_len: int,
        stop_token_ids: Collection[int] = (),
        n_words: int | None = None,
        seed: int = 1,
        chunk: int = 2048,
        reuse: bool = False,
        kernels: bool = True,
    ) -> None:
        self.model = model
        self.device = model.norm.weight.device
        self.cache = model.new_cache(max_batch_size, max_seq_len)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.n_words = min(n_words or model.params.vocab_size, model.params.vocab_size)
        self.chunk = chunk
        self.reuse = reuse
        self.steps = 0
        self._seeds = random.Random(plain_number(seed))
        self._numbers = itertools.count()
        self._live: dict[Request, None] = {}  # in the order of arrival
        self._kept: dict[int, list[int]] = {}  # what slots held at the last end there, oldest first
        self._checksum = 0
        self._rows: tuple[list[Request], RowParams] | None = None
        self._stepping = threading.RLock()
        self._broken: str | None = None  # why the ranks can no longer step together
        self.forward: Transformer | FlatForward = model
        self.captured: CapturedStep | None = None
        self._loaded: list[Request] = []  # the rows of the captured step
        self._failures = self._resume = 0  # of it in a row; the step that tries it again
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

        with torch.cuda.device(self.device):
            self.captured = CapturedStep(self.model, self.cache, self.cache.n_slots, self.n_words)
        self.forward = self.captured.forward

    # ---- the face

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
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
        params.check_vocabulary(vocab, self.n_words)
        moved = self._moved()
        if moved is not None:
            raise moved

    def _moved(self) -> ValueError | None:
        """What to say where the model has another dtype or device than the engine was made for."""
        weight, keys = self.model.norm.weight, self.cache.k
        if (weight.dtype, weight.device) == (keys.dtype, keys.device):
            return None
        return ValueError(
            f"the model was moved to {weight.dtype} on {weight.device} after it was built for "
            f"{keys.dtype} on {keys.device}: build it again with that dtype and device"
        )

    def prepare(self, prompt: Iterable[int], params: SamplingParams) -> Request:
        """A request that nobody runs yet: hand it to `queue`. Raises ValueError where it cannot be
        run; see `check`."""
        ids = token_ids(prompt)
        self.check(ids, params)
        room = self.cache.max_seq_len - len(ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        return Request(ids, params, limit)

    def queue(self, request: Request) -> None:
        """Let a prepared request wait for a slot; it has its place in the order of arrival, and of
        the seeds that are drawn, from here on."""
        seed = request.params.seed
        request.seed = self._seeds.getrandbits(64) if seed is None else seed
        request.number = next(self._numbers)
        self._note([request.number, *request.prompt])
        self._live[request] = None

    def submit(self, prompt: Iterable[int], params: SamplingParams) -> Request:
        """Queue a prompt of token ids. Raises ValueError where it cannot be run; see `check`."""
        request = self.prepare(prompt, params)
        self.queue(request)
        return request

    def cancel(self, request: Request, reason: str) -> None:
        """End a request now, whatever state it is in; its slot is free for the next step."""
        if request.finish_reason is None:
            request.ends.append(reason)

    @property
    def idle(self) -> bool:
        """Whether no request wants a step."""
        return all(request.finish_reason is not None for request in list(self._live))

    @property
    def _running(self) -> list[Request]:
        """The live requests that have a slot, in the order of arrival."""
        return [r for r in list(self._live) if r.slot >= 0 and r.finish_reason is None]

    @property
    def _waiting(self) -> list[Request]:
        """The live requests that have none, in the order of arrival."""
        return [r for r in list(self._live) if r.slot < 0 and not r.ends]

    @property
    def _free(self) -> list[int]:
        """The slots that no live request has; one that ended is live until it was swept."""
        taken = {request.slot for request in list(self._live)}
        return [slot for slot in range(self.cache.n_slots) if slot not in taken]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run the model once on everything that can go on; at most one event a request.

        What goes wrong with a request (its logits are not finite, memory does not suffice for it)
        ends that one with finish_reason "error" and its `error`. Raises RuntimeError where ranks
        disagree or are gone, or one of them failed, after which this engine takes no step.
        """
        with self._stepping, self._surroundings():
            self._sweep(list(self._live))
            self._agree()
            running = self._running
            if len(running) < self.cache.n_slots and self._admit():
                running = self._running
            seen = [len(request.choices) for request in running]
            if running:
                self._advance(running)
            events = [e for r, had in zip(running, seen, strict=True) for e in r.news(had)]
            self._sweep(running)
            if self.idle:
                self._forget_captured()
                self._rows = None
                self._agree()
            return events

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What a step needs of its thread, whatever the caller has set there."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
                own, theirs = torch.cuda.default_stream(), torch.cuda.current_stream()
                if theirs != own:  # steps of all threads follow each other on one stream
                    own.wait_stream(theirs)
                    stack.enter_context(torch.cuda.stream(own))
            if torch.is_autocast_enabled(self.device.type):  # weights and cache have one dtype
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if torch.empty(0).device.type != "cpu":  # what the host prepares is made here
                stack.enter_context(torch.device("cpu"))
            yield

    # ---- slots

    def _sweep(self, requests: Iterable[Request]) -> None:
        """Take those that have ended out of the list, and look after their slots."""
        for request in [r for r in requests if r.slot >= 0 or r.ends]:  # the others wait
            if request.finish_reason is None:
                continue
            if request.slot >= 0:
                self._leave(request)
            self._note([request.number, len(request.choices)])
            self._live.pop(request, None)

    def _leave(self, request: Request) -> None:
        """Remember what a slot holds; what is no number there must reach nobody, even masked."""
        self._kept.pop(request.slot, None)
        bad = request.finish_reason == "error"
        if bad or (
            request.sound < request.cached
            and not self.cache.is_finite(request.slot, request.cached)
        ):
            self.cache.forget(request.slot)
        elif self.reuse:
            self._kept[request.slot] = (request.prompt + request.tokens)[: request.cached]

    def _admit(self) -> bool:
        """Give the first of those that wait the slots that are free; whether anybody got one."""
        free = self._free
        coming = self._waiting[: len(free)]
        for going_on in (True, False) if self.reuse else (False,):
            for request in coming:
                if request.slot >= 0:
                    continue
                slot, known = self._slot_for(request, free)
                if going_on and not self._goes_on(slot, known):
                    continue  # those that go on with what is in a slot choose first
                request.cached = request.sound = request.reused = known
                request.slot = slot  # from here on it has the slot
                free.remove(slot)
        return bool(coming)

    def _slot_for(self, request: Request, free: list[int]) -> tuple[int, int]:
        """The slot for a request, and how many of its tokens have their keys there.

        The lowest, to keep the live span short; with `reuse` the one of which it goes on with the
        most, if that is more than half of what is there, else the least recently used.
        """
        if not self.reuse:
            return free[0], 0
        known = {slot: self._known(slot, request) for slot in free}
        best = max(free, key=lambda slot: known[slot])
        if not self._goes_on(best, known[best]):
            age = {slot: at for at, slot in enumerate(self._kept)}
            best = min(free, key=lambda slot: age.get(slot, -1))
        return best, known[best]

    def _goes_on(self, slot: int, known: int) -> bool:
        """Whether a request that knows so much of a slot uses most of what is there."""
        return 2 * known > len(self._kept.get(slot, ()))

    def _known(self, slot: int, request: Request) -> int:
        """How many tokens of a prompt have their keys in a slot; one is always left to run."""
        if request.params.prompt_logprobs is not None:
            return 0
        return min(_common(self._kept.get(slot, []), request.prompt), len(request.prompt) - 1)

    # ---- one step

    def _advance(self, running: list[Request]) -> None:
        """Have the requests that have a slot go on, by the captured step where that serves."""
        captured = self.captured
        if captured is None or self.steps < self._resume:
            return self._plain_step(running)
        decoding = all(request.decoding for request in running)
        if not any(request.finish_reason is None for request in self._loaded):
            self._forget_captured()
        if not (running and decoding) and not captured.flight:
            return self._plain_step(running)
        try:
            self._captured_step(captured, running, decoding)
        except Exception as error:
            if not self._without_kernels(error):
                if not self._failures:
                    logger.warning("the captured step failed, this one runs without: %s", error)
                self._failures = min(self._failures + 1, 10)
                self._resume = self.steps + 2**self._failures - 1  # it may go on failing
            self._plain_step(running)
        else:
            self._failures = 0

    def _plain_step(self, running: list[Request]) -> None:
        """Run this step's share; what fails is tried again in smaller parts, see `_instead`."""
        self._loaded = []  # its rows go on without the device
        self.steps += 1
        left = [self._share(running)]
        while left:
            work = [item for item in left.pop() if item[0].finish_reason is None]
            if work:
                left += self._try(work)

    def _share(self, running: list[Request]) -> Work:
        """Who runs how many tokens in this step: all decodes, then prompts while there is room."""
        work = [(r, 1) for r in sorted(running, key=lambda r: r.slot) if r.pending == 1]
        room = self.chunk
        if work:  # however many are answering, prompts go on by an eighth
            room = max(1, self.chunk // 8, self.chunk // 4 - len(work))
        for request in running:
            if request.pending > 1 and room > 0:
                count = min(request.pending, room, request.share or request.pending)
                work.append((request, count))
                room -= count
        return work

    def _try(self, work: Work) -> list[Work]:
        """Run `work`: either all of it happens, and nothing is left, or what is to be tried instead
        is returned. Of several ranks one that fails alone ends all."""
        work = sorted(work, key=lambda item: item[1] > 1)
        failed = None
        try:
            with self.model.ranks.together():
                ready, logits = self._run(work)
                choices = self._sample(ready, logits) if ready else []
        except BaseException as error:
            if self.model.ranks.size > 1:
                self._broken = f"{type(error).__name__}: {error}"
                self.model.ranks.fail()
            if self._broken or not isinstance(error, Exception):
                raise
            failed = error.with_traceback(None)  # which holds what the forward has allocated
        if failed is not None:
            return self._instead(work, failed)
        self._commit(ready, choices)
        for request, count in work:  # after the tokens: it is taken again where they are missing
            request.cached += count
        for request in ready:
            request.sound = request.cached
        return []

    def _instead(self, work: Work, error: Exception) -> list[Work]:
        """What to run in place of `work` that failed: where memory ran out, half of the largest
        share, or all but the youngest; else each request by itself, so that the one that fails
        alone has the error."""
        if isinstance(error, torch.OutOfMemoryError):
            self._rows = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            largest, count = max(work, key=lambda item: item[1])
            if count > 1:
                half = largest.share = count // 2
                return [[(r, half if r is largest else n) for r, n in work]]
            _fail(max((r for r, _ in work), key=lambda r: r.number), error)
            return [work]
        if self._without_kernels(error):
            return [work]
        if len(work) > 1:
            return [[item] for item in work]
        _fail(work[0][0], self._moved() or error)
        return []

    def _without_kernels(self, error: Exception) -> bool:
        """After a failure: whether it was one of loading kernels. Smaller ones are made then, or,
        if there are none, the plain model goes on."""
        self._forget_captured()
        if self.captured is None or not type(error).__module__.startswith("triton"):
            return False
        from llama.cuda.launch import use_less

        made, self.captured, self.forward = type(self.captured), None, self.model
        if type(error).__name__ == "OutOfResources" and use_less(self.device):
            logger.info("a kernel needs too much here, smaller ones are made: %s", error)
            self.captured = made(self.model, self.cache, self.cache.n_slots, self.n_words)
            self.forward = self.captured.forward
        else:
            logger.warning("a kernel cannot be used here, running without: %s", error)
        return True

    def _run(self, work: Work) -> tuple[list[Request], Tensor]:
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
        both = torch.tensor([ids, positions], device="cpu").to(self.device)  # (2, N)
        at = torch.tensor(last, dtype=torch.int64, device="cpu").to(self.device)
        batch = Batch(
            [count for _, count in work],
            [request.cached + count for request, count in work],
            [request.slot for request, _ in work],
            self.device,
        )
        hidden = self.forward.hidden(both[0], both[1], batch, self.cache)
        for request, row, count in scored:
            self._score(request, hidden[row : row + count])
        return ready, self.forward.logits(hidden[at]) if ready else hidden

    def _score(self, request: Request, hidden: Tensor) -> None:
        """Add the logprobs of the prompt tokens that follow the rows of `hidden`, slice by
        slice."""
        done, tops = request.prompt_logprobs, request.prompt_top_logprobs
        del done[request.cached + 1 :], tops[request.cached + 1 :]  # of an interrupted step
        if not done:
            done[:], tops[:] = [0.0], [[]]
        if not hidden.isfinite().all():  # of the last token too, whose logits nobody asks for
            return _fail(request, self._not_finite(request, "its prompt"))
        k = request.params.prompt_logprobs or 0
        for part in torch.split(hidden, LOGIT_ROWS):
            targets = request.prompt[len(done) : len(done) + len(part)]
            if targets:
                wanted = torch.tensor(targets, device=self.device)
                logits = self.forward.logits(part)[: len(targets)]
                scores, top_ids, top = (t.tolist() for t in logprobs_of(logits, wanted, k))
                if not all(map(math.isfinite, scores)):
                    return _fail(request, self._not_finite(request, "its prompt"))
                tops += [list(zip(*pair, strict=True)) for pair in zip(top_ids, top, strict=True)]
                done += scores

    def _sample(self, ready: list[Request], logits: Tensor) -> list[Choice]:
        """One token for each row of `logits` (R, V), brought to the host in one transfer."""
        if self._rows is None or self._rows[0] != ready:
            params = [r.params for r in ready]
            rows = RowParams.from_params(params, [r.seed for r in ready], self.device)
            self._rows = (ready, rows)
        rows = self._rows[1]
        index = torch.tensor([len(r.choices) for r in ready], device="cpu").to(self.device)
        counts = [r.tokens for r in ready] if rows.penalised else None
        chosen = sample(logits, rows, index, counts, self.n_words)  # (R,)
        k = max((r.params.logprobs or 0) for r in ready)
        logprob, top_ids, top = logprobs_of(logits, chosen, k)
        packed = torch.cat(  # ids are exact in float32: vocabularies end far below 2^24
            [chosen[:, None], finite_rows(logits)[:, None], logprob[:, None], top_ids, top], dim=1
        ).tolist()
        return [
            Choice(
                int(v[0]),
                v[2],
                [(int(i), p) for i, p in zip(v[3 : 3 + k], v[3 + k :], strict=True)],
                bool(v[1]),
            )
            for v in packed
        ]

    def _commit(self, ready: Sequence[Request], choices: Sequence[Choice]) -> None:
        """Give each request its token, or its end; one that ended meanwhile gets nothing."""
        self._note(choice.token for choice in choices)
        for request, choice in zip(ready, choices, strict=True):
            if request.finish_reason is not None:
                continue
            if not choice.finite:
                where = f"token {len(request.choices)} of its answer"
                _fail(request, self._not_finite(request, where))
            elif (
                choice.token in self.stop_token_ids or choice.token in request.params.stop_token_ids
            ):
                request.stop = choice
                request.ends.append("stop")
            else:
                request.choices.append(choice)

    def _not_finite(self, request: Request, where: str) -> FloatingPointError:
        return FloatingPointError(
            f"the logits of slot {request.slot} at step {self.steps} ({where}) are not finite, "
            f"with weights in {self.cache.k.dtype}: check the checkpoint, or build with "
            "dtype='float32'"
        )

    # ---- the captured step

    def _captured_step(
        self, captured: "CapturedStep", running: list[Request], decoding: bool
    ) -> None:
        """Launch the next step, if all it needs is on the device, then commit the one before."""
        try:
            if not captured.flight:
                self._load(captured, running)
                captured.launch()
            going = [r for r in self._loaded if r.finish_reason is None]
            known = all(self._device_knows(captured, r) for r in self._loaded)
            some_go_on = any(len(r.choices) + 1 < r.limit for r in going)
            if (
                decoding and known and len(going) == len(running)
                and some_go_on and 2 * len(going) > len(self._loaded)
            ):  # fmt: skip
                captured.launch()
            requests, choices = self._outcomes(captured)
            self.steps += 1
            self._commit(requests, choices)
            for request in requests:
                request.cached += 1
                request.sound = request.cached
        except BaseException:
            self._forget_captured()
            raise

    def _outcomes(self, captured: "CapturedStep") -> tuple[list[Request], list[Choice]]:
        """What the oldest step in flight brought those of its rows that still go on."""
        rows = zip(self._loaded, captured.read(), strict=False)
        live = [(r, found) for r, found in rows if r.finish_reason is None]
        choices = [Choice(found.token, found.logprob, found.top, found.finite) for _, found in live]
        return [request for request, _ in live], choices

    def _device_knows(self, captured: "CapturedStep", request: Request) -> bool:
        """Whether a row of the captured step goes on, or ended in a way that the device saw."""
        return not request.ends or (request.stop is not None and captured.knows_stops)

    def _load(self, captured: "CapturedStep", running: list[Request]) -> None:
        """Make the running requests the rows of the captured step."""
        from llama.cuda.step import Row

        self._loaded = list(running)
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

    def _forget_captured(self) -> None:
        """What is in flight never happened; the next captured step starts from the requests."""
        if self.captured is not None:
            self.captured.drop()
        self._loaded = []

    # ---- several ranks

    def _note(self, values: Iterable[int]) -> None:
        """Add to the checksum of what every rank must have been told and have come to."""
        if self.model.ranks.size > 1:
            self._checksum = zlib.crc32(array("q", values).tobytes(), self._checksum)

    def _agree(self) -> None:
        """Every rank has been asked the same and has sampled the same, or all of them stop here."""
        if self._broken:
            raise RuntimeError(
                f"this model's ranks no longer step together, since one failed ({self._broken}): "
                "start all of them again"
            )
        sums = [values[0] for values in self.model.ranks.exchange([self._checksum])]
        if len(set(sums)) > 1:
            raise RuntimeError(
                f"the ranks disagree on prompts or tokens (checksums {sums}): every rank must make "
                "the same calls with the same arguments"
            )


def _fail(request: Request, error: Exception) -> None:
    """End a request with an error of its own."""
    request.error = error
    request.ends.append("error")


def _common(left: list[int], right: list[int]) -> int:
    """How many tokens two lists begin with alike; halves are compared at the speed of C."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
