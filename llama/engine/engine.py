"""Requests, slots and one step: agree, admit, run, emit.

The only loop that generates: everything that wants tokens submits requests here and calls `step`
until they are done. Ids in, ids out; it knows no text, and no tensor: a runner computes.

The life of a step. The ranks tell each other what they were told since the last one, where there
are several. Requests that wait get the slots that are free. The runner is handed this step's share,
which is every request that is answering with one token, and chunks of prompts as far as there is
room; it returns outcomes, of this share or of an earlier one, and they are written down in the
requests. What a request got is read off it as events, and those that have ended leave their slots.

The live requests are the only state. One waits while it has no slot, free slots are those that no
live request has, and a request is out of the list only once its slot was looked after. So a step
that was interrupted at any line is taken again by the next one, and nothing is lost.
"""

import itertools
import random
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

from llama.engine.control import Cancel, Close, Control
from llama.engine.protocol import Runner
from llama.engine.request import Event, Outcome, Request, Share, token_ids
from llama.engine.slots import Kept
from llama.sampling_params import SamplingParams, plain_number

Run = Callable[[Share], Sequence[Outcome]]


class Engine:
    """Runs requests on the slots of a runner; more requests than slots wait in line.

    `stop_token_ids` end every request; `seed` starts the stream from which requests without a seed
    of their own draw one; `chunk` bounds the prompt tokens of a step, a quarter of it a step in
    which others are answering. With `reuse`, a prompt that begins like what a free slot still holds
    takes that over and only runs the rest: for conversations. It is off by default, because the
    same prompt may then differ in the last bit from one call to the next.

    `submit` and `cancel` may be called by any thread at any moment, also by a finalizer; `step` by
    several threads, one after the other. With several ranks either every rank makes the same calls
    in the same order, or rank 0 does and the others `follow`.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        stop_token_ids: Collection[int] = (),
        seed: int = 1,
        chunk: int = 2048,
        reuse: bool = False,
    ) -> None:
        self.runner = runner
        self.n_slots, self.max_seq_len = runner.n_slots, runner.max_seq_len
        self.vocab_size = runner.vocab_size
        self.stop_token_ids = frozenset(stop_token_ids)
        self.chunk, self.reuse = chunk, reuse
        self.steps = 0
        self._seeds = random.Random(plain_number(seed))
        self._numbers = itertools.count()
        self._live: dict[Request, None] = {}  # in the order of arrival
        self._kept = Kept()  # what free slots still hold
        self._stepping = threading.RLock()
        self._control: Control | None = None
        if runner.ranks.size > 1:
            self._control = Control(runner.ranks, self._numbers)

    # ---- the face

    def configure(self, *, reuse: bool | None = None, chunk: int | None = None) -> None:
        """Change `reuse` or `chunk`, from the next step on; every rank must do the same."""
        self.reuse = self.reuse if reuse is None else reuse
        self.chunk = self.chunk if chunk is None else chunk

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise the ValueError that `submit` would."""
        vocab, room = self.vocab_size, self.max_seq_len
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
        params.check_vocabulary(vocab, self.runner.n_words)
        moved = self.runner.moved()
        if moved is not None:
            raise moved

    def prepare(self, prompt: Iterable[int], params: SamplingParams) -> Request:
        """A request that nobody runs yet: hand it to `queue`. Raises ValueError where it cannot be
        run; see `check`."""
        ids = token_ids(prompt)
        self.check(ids, params)
        room = self.max_seq_len - len(ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        return Request(ids, params, limit, self.stop_token_ids.union(params.stop_token_ids))

    def queue(self, request: Request) -> None:
        """Let a prepared request wait for a slot; it has its place in the order of arrival, and of
        the seeds that are drawn, from here on."""
        seed = request.params.seed
        request.seed = self._seeds.getrandbits(64) if seed is None else seed
        if self._control is None:
            request.number = next(self._numbers)
        else:
            self._control.news.append(request)
        self._live[request] = None

    def submit(self, prompt: Iterable[int], params: SamplingParams) -> Request:
        """Queue a prompt of token ids. Raises ValueError where it cannot be run; see `check`."""
        request = self.prepare(prompt, params)
        self.queue(request)
        return request

    def cancel(self, request: Request, reason: str) -> None:
        """End a request now, whatever state it is in; its slot is free for the next step. With
        several ranks it ends when the next step begins, on all of them."""
        if request.finish_reason is not None:
            return
        if self._control is None:
            request.ends.append(reason)
        else:
            self._control.news.append(Cancel(request, reason))

    @property
    def idle(self) -> bool:
        """Whether no request wants a step."""
        control = self._control
        return not any(
            request.finish_reason is None and not (control and control.leaves(request))
            for request in list(self._live)
        )

    def step(self) -> list[Event]:
        """Run the model once on everything that can go on; returns what that brought.

        What goes wrong with a request (its logits are not finite, memory does not suffice for it)
        ends that one with finish_reason "error" and its `error`. Raises RuntimeError where ranks
        disagree or are gone, or one of them failed, after which this engine takes no step.
        """
        with self._stepping, self.runner.surroundings():
            self._agree()
            running = self._admit()
            seen = [len(request.choices) for request in running]
            self._run(self._share(running))
            return self._emit(running, seen)

    def follow(self) -> None:
        """Take the steps of rank 0 until it calls `close`: for the other ranks, which then make no
        call of their own."""
        control = self._control
        if control is not None:
            control.follows = True
            while not control.over:
                self.step()

    def close(self) -> None:
        """Cancel what still runs, and let the ranks that follow go on with their program."""
        for request in list(self._live):
            self.cancel(request, "cancelled")
        if self._control is not None:
            self._control.news.append(Close())
            self.step()

    # ---- agree

    def _agree(self) -> None:
        """Every rank learns what this engine was told since the last step, and that all of them
        have come to the same; then those that have ended leave."""
        control = self._control
        if control is not None:
            told, heard = control.agree()
            for item in told:
                if isinstance(item, Cancel) and item.request.finish_reason is None:
                    item.request.ends.append(item.reason)
            for said in heard:
                if "submit" in said:
                    request = self.prepare(said["submit"], said["params"])
                    request.seed, request.number = said["seed"], next(self._numbers)
                    self._live[request] = None
                elif "cancel" in said:
                    for request in self._live:
                        if request.number == said["cancel"] and request.finish_reason is None:
                            request.ends.append(said["reason"])
                control.over = control.over or "close" in said
        self._sweep(list(self._live))

    def _sweep(self, requests: Iterable[Request]) -> None:
        """Take those that have ended out of the list, and look after their slots."""
        for request in [r for r in requests if r.slot >= 0 or r.ends]:  # the others wait
            if request.finish_reason is None:
                continue
            if request.slot >= 0:
                self._leave(request)
            if self._control is not None:
                self._control.note([request.number, len(request.choices)])
            self._live.pop(request, None)

    def _leave(self, request: Request) -> None:
        """Remember what a slot holds; what is no number there must reach nobody, even masked."""
        self._kept.tokens.pop(request.slot, None)
        bad = request.finish_reason == "error"
        if bad or (
            request.sound < request.cached
            and not self.runner.is_finite(request.slot, request.cached)
        ):
            self.runner.forget(request.slot)
        elif self.reuse:
            self._kept.tokens[request.slot] = (request.prompt + request.tokens)[: request.cached]

    # ---- admit

    def _admit(self) -> list[Request]:
        """Give the first of those that wait the slots that are free; returns all that have one and
        go on, in the order of arrival."""
        live = list(self._live)
        running = [r for r in live if r.slot >= 0 and r.finish_reason is None]
        if len(running) == self.n_slots or len(running) == len(live):
            return running
        taken = {request.slot for request in live}  # one that ended has its slot until it is swept
        free = [slot for slot in range(self.n_slots) if slot not in taken]
        waiting = (r for r in live if r.slot < 0 and not r.ends and r.number >= 0)
        coming = list(itertools.islice(waiting, len(free)))
        for going_on in (True, False) if self.reuse else (False,):
            for request in coming:
                if request.slot >= 0:
                    continue
                # the lowest, to keep the live span short, unless something there can be used
                slot, known = self._kept.choose(request, free) if self.reuse else (free[0], 0)
                if going_on and not self._kept.goes_on(slot, known):
                    continue  # those that go on with what is in a slot choose first
                request.cached = request.sound = request.reused = known
                request.slot = slot  # from here on it has the slot
                free.remove(slot)
        return [r for r in live if r.slot >= 0 and r.finish_reason is None]

    # ---- run

    def _share(self, running: list[Request]) -> Share:
        """Who runs how many tokens in this step: all decodes, then prompts while there is room."""
        share, prompts = [], []
        for request in running:
            pending = request.pending
            if pending == 1:
                share.append((request, 1))
            else:
                prompts.append((request, min(pending, request.share or pending)))
        room = self.chunk
        if share and prompts:  # however many are answering, prompts go on by an eighth
            room = max(1, self.chunk // 8, self.chunk // 4 - len(share))
        for request, wanted in prompts:
            if room > 0:
                share.append((request, min(wanted, room)))
                room -= wanted
        return share

    def _run(self, share: Share) -> None:
        """Have the runner run a share; what fails is tried again in parts, see `_instead`."""
        if not share:
            return
        self.steps += 1
        left = self._try(self.runner.step, share)
        while left:
            part = [item for item in left.pop() if item[0].finish_reason is None]
            if part:
                left += self._try(self.runner.run, part)

    def _try(self, run: Run, share: Share) -> list[Share]:
        """Run a share: either all of it happens, and nothing is left, or what is to be tried
        instead is returned. Of several ranks one that fails alone ends all."""
        try:
            outcomes = run(share)
        except BaseException as error:
            if self._control is not None:
                self._control.fail(error)
            if self._control is not None or not isinstance(error, Exception):
                raise
            failed = error.with_traceback(None)  # which holds what the forward has allocated
        else:
            self._commit(outcomes)
            return []
        return self._instead(share, failed)

    def _instead(self, share: Share, error: Exception) -> list[Share]:
        """What to run in place of a share that failed: where memory ran out, half of the largest
        part, or all but the youngest; else each request by itself, so that the one that fails
        alone has the error."""
        if self.runner.ran_out_of_memory(error):
            largest, count = max(share, key=lambda item: item[1])
            if count > 1:
                half = largest.share = count // 2
                return [[(r, half if r is largest else n) for r, n in share]]
            _fail(max((r for r, _ in share), key=lambda r: r.number), error)
            return [share]
        if len(share) > 1:
            return [[item] for item in share]
        _fail(share[0][0], self.runner.moved() or error)
        return []

    def _commit(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what a step brought; a request that ended meanwhile gets no token."""
        for outcome in outcomes:
            request = outcome.request
            if outcome.logprobs is not None:
                self._commit_scores(outcome)
            for choice in outcome.choices:
                if request.finish_reason is not None:
                    break
                if not choice.finite:
                    self._not_finite(request, f"token {len(request.choices)} of its answer")
                elif choice.token in request.stops:
                    request.stop = choice
                    request.ends.append("stop")
                else:
                    request.choices.append(choice)
            request.cached = outcome.cached  # after the tokens: where they are missing it runs on
            if outcome.choices and all(choice.finite for choice in outcome.choices):
                request.sound = outcome.cached
        if self._control is not None:
            self._control.note(choice.token for o in outcomes for choice in o.choices)

    def _commit_scores(self, outcome: Outcome) -> None:
        """Write down the scores of a prompt's tokens."""
        request = outcome.request
        done, tops = request.prompt_logprobs, request.prompt_top_logprobs
        del done[request.cached + 1 :], tops[request.cached + 1 :]  # of an interrupted step
        if not done:
            done[:], tops[:] = [0.0], [[]]
        done += outcome.logprobs or ()
        tops += outcome.top_logprobs
        if not outcome.finite:
            self._not_finite(request, "its prompt")

    def _not_finite(self, request: Request, which: str) -> None:
        """End a request of which a step made what is no number."""
        error = FloatingPointError(
            f"the logits of slot {request.slot} at step {self.steps} ({which}) are not finite, "
            f"with weights in {self.runner.dtype_name}: check the checkpoint, or build with "
            "dtype='float32'"
        )
        _fail(request, error)

    # ---- emit

    def _emit(self, running: list[Request], seen: list[int]) -> list[Event]:
        """The events of this step; those that have ended leave their slots."""
        events = [e for r, had in zip(running, seen, strict=True) for e in r.news(had)]
        self._sweep(running)
        if all(r.finish_reason is not None for r in list(self._live) if r.number >= 0):
            self.runner.drop()
            if self._control is not None:  # that the last tokens were the same, too
                self._agree()
        return events


def _fail(request: Request, error: Exception) -> None:
    """End a request with an error of its own."""
    request.error = error
    request.ends.append("error")
