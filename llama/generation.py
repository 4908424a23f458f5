"""Where ids meet text: `Llama` builds a model and answers prompts, whole or as a stream.

It turns text into ids, hands them to the engine, and turns the engine's events back into text. It
knows nothing of how a step is run. The surprising thing: there is one path. `text_completion` and
`chat_completion` join what their streaming forms yield, and `generate` reads the same events as
ids. Several threads may be on it: one of them steps the engine for all, the others wait for it.
"""

import logging
import threading
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any, TypedDict

import torch

from llama.args import RopeScaling
from llama.engine import Engine, Event, Request
from llama.loading import prepare
from llama.loading.runners import runner_for
from llama.loading.settings import CHUNK_ROWS, check_vocabulary
from llama.model import Transformer
from llama.quantization import Recipe
from llama.sampling import SamplingParams, plain_number
from llama.text.choose import chat_format, choose_format
from llama.text.llama2 import RefusedDialog
from llama.text.streaming import AnswerText, IncrementalDecoder, Piece, join_pieces, stop_strings
from llama.tokenizer import Dialog, Message
from llama.tokenizer.protocols import DialogFormat, TextTokenizer

logger = logging.getLogger(__name__)

Seed = int | Sequence[int] | None

PATIENCE = 1.0  # seconds that a thread waits for another one's step before it steps itself


class CompletionPrediction(TypedDict, total=False):
    """`tokens` (text pieces) and `logprobs` are there where they were asked for, and as long as
    the ids."""

    generation: str
    finish_reason: str
    tokens: list[str]
    logprobs: list[float]


class ChatPrediction(TypedDict, total=False):
    generation: Message
    finish_reason: str
    tokens: list[str]
    logprobs: list[float]


class Llama:
    """A model, its tokenizer and an engine with slots for `max_batch_size` sequences."""

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = 1,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        rope_scaling: float | RopeScaling | None = None,
        adapter: str | Path | None = None,
        quantize: Recipe | None = None,
        reuse: bool = False,
        kernels: bool = True,
    ) -> "Llama":
        """Read a checkpoint into a model that is ready to answer.

        Args:
            ckpt_dir: folder with Meta's consolidated.*.pth and params.json, in any number of
                shards, or with Hugging Face's config.json and model*.safetensors; or a GGUF file,
                or the folder that holds one.
            tokenizer_path: anything blobfile opens, of any kind; None: `tokenizer.model` in
                ckpt_dir (for Llama 1 and 2 also in the folder above), `tokenizer.json` there, or
                what the GGUF file says.
            max_seq_len: tokens a sequence may have, prompt and answer; None: the model's context,
                at most 8192 of it, since the cache is allocated in advance.
            max_batch_size: sequences that run at one time; more prompts than that wait in line.
            model_parallel_size: processes that share the model; None: all that torchrun started.
            seed: starts the stream that gives a seed to each request without one.
            device: "cuda", "cuda:1", "mps", "cpu"; None: the first of cuda, mps, cpu there is.
            dtype: of weights, activations and cache, such as "float32"; None: the checkpoint's,
                bfloat16 where its weights are quantized.
            rope_scaling: factor (or RopeScaling) instead of the one that belongs to the model.
            adapter: folder of a LoRA adapter (PEFT's files), added to the weights as they are read.
            quantize: "int8", "fp8", "int4" or "mixed", or formats by part of the model, see
                llama/quantization/recipe.py; None: the weights as they are stored.
            reuse: a prompt that begins like what a free slot still holds only runs the rest, which
                makes the turns of a conversation quick; the same prompt may then differ in the last
                bit from one call to the next.
            kernels: on a single NVIDIA GPU of compute capability 8.0 or newer, run by this
                library's kernels; False: by torch alone, as everywhere else.

        Raises ValueError or FileNotFoundError, before anything is allocated, for files that do not
        make a model, limits that do not fit it, or memory that does not suffice; ImportError where
        the tokenizer of Llama 1 and 2 needs an extra that is not installed.
        """
        prepared = prepare(
            ckpt_dir,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            device=device,
            dtype=dtype,
            rope_scaling=rope_scaling,
            adapter=adapter,
            quantize=quantize,
            kernels=kernels,
        )
        checkpoint = prepared.checkpoint
        tokenizer = checkpoint.open_tokenizer(tokenizer_path)
        if tokenizer is None:
            raise FileNotFoundError(f"no tokenizer.model in {ckpt_dir}; give tokenizer_path")
        path = tokenizer_path or checkpoint.tokenizer_path or ckpt_dir
        check_vocabulary(tokenizer, checkpoint.args, path)
        tokenizer.limit(checkpoint.args.vocab_size)
        formatter = choose_format(tokenizer, checkpoint.chat_template, checkpoint.stop_token_ids)
        model = prepared.load(model_parallel_size)
        return Llama(
            model,
            tokenizer,
            seed=seed,
            formatter=formatter,
            stop_token_ids=checkpoint.stop_token_ids,
            reuse=reuse,
            kernels=kernels,
        )

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer,
        *,
        seed: int = 1,
        formatter: DialogFormat | None = None,
        stop_token_ids: Collection[int] = (),
        reuse: bool = False,
        kernels: bool = True,
    ) -> None:
        """`formatter` None: the tokenizer family's; `stop_token_ids` are added to its own; `reuse`
        and `kernels` as in `build`."""
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = formatter or chat_format(tokenizer)
        self.is_main = model.ranks.is_main
        args = model.params
        runner = runner_for(
            model,
            max_batch_size=args.max_batch_size,
            max_seq_len=args.max_seq_len,
            n_words=tokenizer.n_words,
            kernels=kernels,
        )
        self.engine = Engine(
            runner,
            stop_token_ids=tokenizer.stop_tokens | set(stop_token_ids),
            seed=seed,
            chunk=CHUNK_ROWS,
            reuse=reuse,
        )
        # who steps the engine now, for everybody: a thread, and what it holds until that is done
        self._stepping: dict[str, tuple[int, threading.Lock]] = {}
        self._turn = threading.Lock()
        self._caller: int | None = None  # of several ranks: the one thread that calls
        self._warned = False

    # ---- ids to ids

    def generate(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: Seed = None,
        stop_token_ids: Sequence[int] | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue prompts of token ids; returns (token lists, logprob lists or None), in order.

        Ids may be integers of numpy or torch, and the prompts an array or a generator. max_gen_len
        bounds the new tokens of each prompt; None: all that max_seq_len leaves; 0: none, which with
        echo and logprobs scores the prompts. With echo the lists begin with the prompt, whose first
        token has logprob 0.0. Logprobs are the model's own, before temperature
        and top_p. A stop token ends a row and is not in it; `stop_token_ids` adds to the
        tokenizer's stop_tokens. An int `seed` stands for seed, seed + 1, ... over the prompts. For
        top_k and what follows see `SamplingParams`. Raises ValueError, naming the prompt, before
        any of them is run.
        """
        logprobs, echo = _flag("logprobs", logprobs), _flag("echo", echo)
        base = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logit_bias=logit_bias,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            max_tokens=_checked(max_gen_len),
            stop_token_ids=() if stop_token_ids is None else stop_token_ids,  # type: ignore[arg-type]
            prompt_logprobs=0 if logprobs and echo else None,
        )  # fmt: skip
        requests = self._requests(_listed("prompt_tokens", prompt_tokens), base, seed)
        with closing(self._run(requests)) as events:
            for _ in events:
                pass
        tokens = [(r.prompt if echo else []) + r.tokens for r in requests]
        scores = [r.prompt_logprobs + [c.logprob for c in r.choices] for r in requests]
        return tokens, scores if logprobs else None

    # ---- text to text

    def text_completion(
        self,
        prompts: Iterable[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: Seed = None,
        stop: str | Sequence[str] | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> list[CompletionPrediction]:
        """Continue texts; returns one prediction a prompt, in order.

        `finish_reason` is "stop" (a stop token, or one of the strings in `stop`, neither of which
        is in the text) or "length". With echo the text begins with the prompt, and is otherwise
        the same: prompt and generation joined read as one text, the space between included. With
        logprobs, "tokens" and "logprobs" hold one entry a token; the begin-of-text token of an echo
        has the text "". The other arguments are those of `generate`; as in Meta's code
        max_gen_len=0 means None here.
        """
        prompts = _texts(prompts)
        pieces = self.stream_text_completion(
            prompts, temperature, top_p, max_gen_len, logprobs, echo,
            seed=seed, stop=stop, top_k=top_k, min_p=min_p, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        out = []
        with closing(pieces):
            answers = join_pieces(pieces, len(prompts))
        for text, reason, tokens, scores in answers:
            prediction = CompletionPrediction(generation=text, finish_reason=reason)
            if logprobs:
                prediction |= CompletionPrediction(tokens=tokens, logprobs=scores)
            out.append(prediction)
        return out

    def chat_completion(
        self,
        dialogs: Iterable[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: Seed = None,
        stop: str | Sequence[str] | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> list[ChatPrediction]:
        """Answer dialogs; returns one prediction a dialog, in order, whose "generation" is a
        Message.

        A dialog is a sequence of {"role": "system" | "user" | "assistant", "content": text}. A
        dialog that the model's chat format refuses (Llama 2: its tags in a text) gets an answer
        that says so, without a token, and the others are answered. The other arguments, and the
        other keys of a prediction, are those of `text_completion`.
        """
        dialogs = _listed("dialogs", dialogs)
        pieces = self.stream_chat_completion(
            dialogs, temperature, top_p, max_gen_len, logprobs,
            seed=seed, stop=stop, top_k=top_k, min_p=min_p, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        out = []
        with closing(pieces):
            answers = join_pieces(pieces, len(dialogs))
        for text, reason, tokens, scores in answers:
            answer = Message(role="assistant", content=text)
            prediction = ChatPrediction(generation=answer, finish_reason=reason)
            if logprobs:
                prediction |= ChatPrediction(tokens=tokens, logprobs=scores)
            out.append(prediction)
        return out

    def stream_text_completion(
        self,
        prompts: Iterable[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: Seed = None,
        stop: str | Sequence[str] | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> Generator[Piece, None, None]:
        """`text_completion` as an iterator of pieces, as tokens come; arguments as there.

        Bad arguments raise here, not at the first piece. Leaving the iterator early frees its
        slots.
        """
        base = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logit_bias=logit_bias,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            max_tokens=_checked(max_gen_len) or None,
        )  # fmt: skip
        ends = bool(self.tokenizer.suffix)
        ids = [self.tokenizer.encode(prompt, bos=True, eos=ends) for prompt in _texts(prompts)]
        return self.stream(ids, base, seed=seed, stop=stop, logprobs=logprobs, echo=echo)

    def stream_chat_completion(
        self,
        dialogs: Iterable[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: Seed = None,
        stop: str | Sequence[str] | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> Generator[Piece, None, None]:
        """`chat_completion` as an iterator of pieces, as tokens come; see
        `stream_text_completion`."""
        base = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logit_bias=logit_bias,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            max_tokens=_checked(max_gen_len) or None,
        )  # fmt: skip
        ids: list[list[int] | None] = []
        refused = {}
        for at, dialog in enumerate(_listed("dialogs", dialogs)):
            try:
                ids.append(self.formatter.encode_dialog_prompt(dialog))
            except RefusedDialog as error:
                refused[at] = str(error)
                ids.append(None)  # keeps the place: seeds go by index
            except ValueError as error:
                raise ValueError(f"dialog {at}: {error}") from None
        requests = self._requests(ids, base, seed)
        stops = stop_strings(stop)
        return self._pieces(requests, _flag("logprobs", logprobs), False, stops, refused)

    def stream(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        params: SamplingParams,
        *,
        seed: Seed = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Generator[Piece, None, None]:
        """Prompts of token ids to an iterator of pieces of text: what the other streams call.

        `params` holds for every prompt; `seed` (None: that of params) and the rest are as in
        `text_completion`. The pieces continue the text of their prompt. Where params.logprobs asks
        for alternatives, pieces have logprobs and top_logprobs.
        """
        logprobs, echo = _flag("logprobs", logprobs), _flag("echo", echo)
        scored = logprobs or params.logprobs is not None
        base = params
        if scored and echo and params.prompt_logprobs is None:
            base = replace(params, prompt_logprobs=params.logprobs or 0)
        requests = self._requests(_listed("prompt_tokens", prompt_tokens), base, seed)
        return self._pieces(requests, scored, echo, stop_strings(stop))

    # ---- how it is done

    def _requests(self, prompts: Sequence[Any], base: SamplingParams, seed: Seed) -> list[Request]:
        """A request for each prompt that is not None; all are checked before any is run."""
        seeds: Sequence[int | None]
        seed = base.seed if seed is None else plain_number(seed)
        if seed is None:
            seeds = [None] * len(prompts)
        elif isinstance(seed, Iterable):
            seeds = list(seed)
            if len(seeds) != len(prompts):
                raise ValueError(f"seed has {len(seeds)} values for {len(prompts)} prompts")
        else:
            first = replace(base, seed=seed).seed or 0  # a number of numpy is an int there
            seeds = range(first, first + len(prompts))
        requests = []
        for at, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
            params = replace(base, seed=own)
            try:
                if prompt is not None:
                    requests.append(self.engine.prepare(prompt, params))
            except ValueError as error:
                raise ValueError(f"prompt {at}: {error}") from None
            if prompt is not None and not self._warned:
                bos = self.tokenizer.bos_id
                self._warned = requests[-1].prompt[:2] == [bos, bos]
                if self._warned:
                    logger.warning("prompt %d begins with two begin-of-text tokens", at)
        return requests

    def _run(
        self, requests: list[Request], over: Collection[int] = ()
    ) -> Generator[tuple[int, Event], None, None]:
        """Queue requests, have the engine step until all are done, and yield each event with the
        index of its request. Raises what one of them failed with, unless its index is `over`: it
        went on behind an end that its caller found in the text.

        Several of these may be under way, in one thread or in several. A finalizer may close one
        at any moment, so what is done at the end must neither wait nor lock.
        """
        self._claim()
        left = dict(enumerate(requests))
        seen = [0] * len(requests)
        try:
            for request in requests:
                self.engine.queue(request)
            while left:
                news = [(at, event) for at, r in left.items() for event in r.news(seen[at])]
                for at, event in news:
                    error = event.request.error
                    if event.finish_reason == "error" and error is not None and at not in over:
                        raise error
                    seen[at] += 1
                    if event.finish_reason is not None:
                        del left[at]
                    yield at, event
                if not news:
                    self._step()
        finally:
            for request in requests:
                self.engine.cancel(request, "cancelled")

    def _step(self) -> None:
        """Have the engine take a step: by this thread, or by another one that is at it already.

        A thread that finds itself named was interrupted in here, and steps on. One that waits for
        long does as well, since the other may be gone; the engine has its own lock.
        """
        me, mine = threading.get_ident(), threading.Lock()
        mine.acquire()
        who, done = self._stepping.setdefault("now", (me, mine))  # one operation
        if who != me and done.acquire(timeout=PATIENCE):
            done.release()  # for the next one that waits
            return
        try:
            self.engine.step()
        finally:
            self._stepping.pop("now", None)
            mine.release()

    def _claim(self) -> None:
        """With several ranks all calls come from one thread, or ranks would see them in different
        orders: RuntimeError for another one."""
        ranks, me = self.model.ranks, threading.get_ident()
        if ranks.size > 1:
            with self._turn:
                if self._caller not in (None, me) and not self.engine.idle:
                    raise RuntimeError(
                        f"this model is cut over {ranks.size} ranks and another thread is using "
                        "it: make all calls from one thread, so that every rank sees them in the "
                        "same order"
                    )
                self._caller = me

    def _pieces(
        self,
        requests: list[Request],
        logprobs: bool,
        echo: bool,
        stop: tuple[str, ...],
        refused: Mapping[int, str] | None = None,
    ) -> Generator[Piece, None, None]:
        """The events of `_run` as text; see `Piece` and `AnswerText`.

        `refused` is None where answers continue the text of their prompts; where they begin texts
        of their own, it holds those that are known without the model, by index.
        """
        known = refused or {}
        for at, answer in known.items():
            yield Piece(at, answer, finish_reason="stop")
        places = [at for at in range(len(requests) + len(known)) if at not in known]
        texts = {
            at: AnswerText(
                self.tokenizer, stop, begins=refused is not None or self._silent(request.prompt)
            )
            for at, request in zip(places, requests, strict=True)
        }
        fresh = set(places)
        ended: set[int] = set()  # indices of requests
        with closing(self._run(requests, ended)) as events:
            for which, event in events:
                if which in ended:
                    continue
                at = places[which]
                if echo and at in fresh:
                    yield from self._echo(at, event.request)
                fresh.discard(at)
                text = texts[at]
                token = None if event.finish_reason == "stop" else event.token
                scores = (event.logprob, event.top_logprobs) if logprobs else (None, None)
                pieces = text.push(at, token, *scores)
                if text.stopped:
                    self.engine.cancel(event.request, "stop")
                if event.finish_reason is not None or text.stopped:
                    ended.add(which)
                    reason = "stop" if text.stopped else event.finish_reason
                    pieces = text.close(at, pieces, reason)
                yield from pieces

    def _silent(self, prompt: list[int]) -> bool:
        """Whether a prompt has no text, so that whatever follows begins one."""
        return not any(self.tokenizer.token_bytes(token) for token in prompt)

    def _echo(self, at: int, request: Request) -> Generator[Piece, None, None]:
        """The prompt as pieces, with the scores that were asked for."""
        decoder = IncrementalDecoder(self.tokenizer)
        scores, tops = request.prompt_logprobs, request.prompt_top_logprobs
        for place, token in enumerate(request.prompt):
            text = "" if token == self.tokenizer.bos_id else decoder.push(token)
            score = scores[place] if scores else None
            top = tops[place] if scores and request.params.prompt_logprobs else None
            yield Piece(at, text, token, score, top_logprobs=top)


def check_sampling(temperature: float, top_p: float, max_gen_len: int | None) -> None:
    """ValueError where no prompt could be answered so: for programs, before they load a model."""
    SamplingParams(temperature=temperature, top_p=top_p, max_tokens=_checked(max_gen_len))


def _checked(max_gen_len: object) -> int | None:
    """max_gen_len as an int, also from a number of numpy or torch."""
    if max_gen_len is None:
        return None
    try:
        plain = plain_number(max_gen_len)
        whole = -1 if isinstance(plain, bool) else index(plain)
    except TypeError:
        whole = -1
    if whole < 0:
        raise ValueError(f"max_gen_len is {max_gen_len!r}; it must be an int >= 0 or None")
    return whole


def _flag(name: str, value: object) -> bool:
    """A yes or no; ValueError for a number, which would ask for something else."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy has its own
        return bool(value)
    more = ""
    if name == "logprobs":
        more = (
            "; stream(ids, SamplingParams(logprobs=5)) gives that many alternatives to each token"
        )
    raise ValueError(f"{name} is {value!r:.80}; it must be True or False{more}")


def _listed(name: str, values: Iterable[Any]) -> list[Any]:
    """Several prompts or dialogs as a list: a generator, an array or a tensor of them as well."""
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r:.80}; it must be a list")
    out = values.tolist() if hasattr(values, "tolist") else list(values)
    if isinstance(out, list):
        return out
    raise ValueError(f"{name} is {values!r:.80}; it must be a list")


def _texts(prompts: Iterable[str]) -> list[str]:
    listed = [] if isinstance(prompts, str) else _listed("prompts", prompts)
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in listed):
        shown = prompts if isinstance(prompts, str) else listed
        raise ValueError(f"prompts is {shown!r:.80}; it must be a list of strings")
    return listed
