"""Where ids meet text: `Llama` builds a model and answers prompts, whole or as a stream.

It turns text into ids, hands them to the engine, and turns the engine's events back into text. It
knows nothing of how a step is run. The surprising thing: there is one path. `text_completion` and
`chat_completion` join what their streaming forms yield, and `generate` reads the same events as
ids.
"""

import logging
import sys
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama.args import RopeScaling
from llama.engine import Engine, Request
from llama.engine.owner import Owner
from llama.loading import Recipe, prepare
from llama.loading.runners import runner_for
from llama.loading.settings import CHUNK_ROWS
from llama.model import Transformer
from llama.options import Sampling, Seed, lists_options, params_of, seeds_of
from llama.sampling_params import SamplingParams
from llama.text.answers import ChatPrediction as ChatPrediction
from llama.text.answers import CompletionPrediction as CompletionPrediction
from llama.text.answers import echoed, joined
from llama.text.choose import chat_format, choose_format
from llama.text.inputs import flag, listed, texts
from llama.text.llama2 import RefusedDialog
from llama.text.streaming import AnswerText, Piece, stop_strings
from llama.tokenizer import Dialog
from llama.tokenizer.protocols import DialogFormat, TextTokenizer

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


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
                makes a conversation quick; the same prompt may then differ in the last
                bit from one call to the next.
            kernels: on a single NVIDIA GPU of compute capability 8.0 or newer, run by this
                library's kernels; False: by torch alone, as everywhere else.

        Raises ValueError or FileNotFoundError, before anything is allocated, for files that do not
        make a model, limits that do not fit it, or memory that does not suffice; ImportError where
        the tokenizer of Llama 1 and 2 needs an extra that is not installed.
        """
        prepared = prepare(
            ckpt_dir, max_batch_size=max_batch_size, max_seq_len=max_seq_len, device=device,
            dtype=dtype, rope_scaling=rope_scaling, adapter=adapter, quantize=quantize,
            kernels=kernels,
        )  # fmt: skip
        checkpoint, tokenizer = prepared.checkpoint, prepared.open_tokenizer(tokenizer_path)
        formatter = choose_format(tokenizer, checkpoint.chat_template, checkpoint.stop_token_ids)
        model = prepared.load(model_parallel_size)
        return Llama(
            model, tokenizer, seed=seed, formatter=formatter,
            stop_token_ids=checkpoint.stop_token_ids, reuse=reuse, kernels=kernels,
        )  # fmt: skip

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
        self.owner = Owner(self.engine, model.ranks.size)
        self._warned = False

    # ---- ids to ids

    @lists_options
    def generate(
        self, prompt_tokens: Iterable[Iterable[int]], max_gen_len: int | None = None,
        temperature: float = 0.6, top_p: float = 0.9, logprobs: bool = False, echo: bool = False,
        *, stop_token_ids: Sequence[int] | None = None, **sampling: Unpack[Sampling],
    ) -> tuple[list[list[int]], list[list[float]] | None]:  # fmt: skip
        """Continue prompts of token ids; returns (token lists, logprob lists or None), in order.

        Ids may be integers of numpy or torch, and the prompts an array or a generator. max_gen_len
        bounds the new tokens of each prompt; None: all that max_seq_len leaves; 0: none, which with
        echo and logprobs scores the prompts. With echo the lists begin with the prompt, whose first
        token has logprob 0.0. Logprobs are the model's own, before temperature and top_p. A stop
        token ends a row and is not in it; `stop_token_ids` adds to the tokenizer's stop_tokens. An
        int `seed` stands for seed, seed + 1, ... over the prompts. For the other options see
        `SamplingParams`. Raises ValueError, naming the prompt, before any of them is run.
        """
        logprobs, echo = flag("logprobs", logprobs), flag("echo", echo)
        params, seed = params_of(sampling, temperature, top_p, max_gen_len)
        params = replace(
            params,
            stop_token_ids=() if stop_token_ids is None else stop_token_ids,  # type: ignore[arg-type]
            prompt_logprobs=0 if logprobs and echo else None,
        )
        requests = self._requests(listed("prompt_tokens", prompt_tokens), params, seed)
        with closing(self.owner.run(requests)) as events:
            for _ in events:
                pass
        tokens = [(r.prompt if echo else []) + r.tokens for r in requests]
        scores = [r.prompt_logprobs + [c.logprob for c in r.choices] for r in requests]
        return tokens, scores if logprobs else None

    # ---- text to text

    @lists_options
    def text_completion(
        self, prompts: Iterable[str], temperature: float = 0.6, top_p: float = 0.9,
        max_gen_len: int | None = None, logprobs: bool = False, echo: bool = False,
        *, stop: str | Sequence[str] | None = None, **sampling: Unpack[Sampling],
    ) -> list[CompletionPrediction]:  # fmt: skip
        """Continue texts; returns one prediction a prompt, in order.

        `finish_reason` is "stop" (a stop token, or one of the strings in `stop`, neither of which
        is in the text) or "length". With echo the text begins with the prompt, and is otherwise
        the same: prompt and generation joined read as one text, the space between included. With
        logprobs, "tokens" and "logprobs" hold one entry a token; the begin-of-text token of an echo
        has the text "". The other arguments are those of `generate`; as in Meta's code
        max_gen_len=0 means None here.
        """
        prompts = texts(prompts)
        pieces = self.stream_text_completion(
            prompts, temperature, top_p, max_gen_len, logprobs, echo, stop=stop, **sampling
        )
        answers = joined(pieces, len(prompts), logprobs)
        return [{"generation": text, **others} for text, others in answers]

    @lists_options
    def chat_completion(
        self, dialogs: Iterable[Dialog], temperature: float = 0.6, top_p: float = 0.9,
        max_gen_len: int | None = None, logprobs: bool = False,
        *, stop: str | Sequence[str] | None = None, **sampling: Unpack[Sampling],
    ) -> list[ChatPrediction]:  # fmt: skip
        """Answer dialogs; returns one prediction a dialog, in order, whose "generation" is a
        Message.

        A dialog is a sequence of {"role": "system" | "user" | "assistant", "content": text}. A
        dialog that the model's chat format refuses (Llama 2: its tags in a text) gets an answer
        that says so, without a token, and the others are answered. The other arguments, and the
        other keys of a prediction, are those of `text_completion`.
        """
        dialogs = listed("dialogs", dialogs)
        pieces = self.stream_chat_completion(
            dialogs, temperature, top_p, max_gen_len, logprobs, stop=stop, **sampling
        )
        answers = joined(pieces, len(dialogs), logprobs)
        return [{"generation": {"role": "assistant", "content": text}, **others}
                for text, others in answers]  # fmt: skip

    @lists_options
    def stream_text_completion(
        self, prompts: Iterable[str], temperature: float = 0.6, top_p: float = 0.9,
        max_gen_len: int | None = None, logprobs: bool = False, echo: bool = False,
        *, stop: str | Sequence[str] | None = None, **sampling: Unpack[Sampling],
    ) -> Generator[Piece, None, None]:  # fmt: skip
        """`text_completion` as an iterator of pieces, as tokens come; arguments as there.

        Bad arguments raise here, not at the first piece. Leaving the iterator early frees its
        slots.
        """
        params, seed = params_of(sampling, temperature, top_p, max_gen_len)
        params = replace(params, max_tokens=params.max_tokens or None)
        ends = bool(self.tokenizer.suffix)
        ids = [self.tokenizer.encode(prompt, bos=True, eos=ends) for prompt in texts(prompts)]
        return self.stream(ids, params, seed=seed, stop=stop, logprobs=logprobs, echo=echo)

    @lists_options
    def stream_chat_completion(
        self, dialogs: Iterable[Dialog], temperature: float = 0.6, top_p: float = 0.9,
        max_gen_len: int | None = None, logprobs: bool = False,
        *, stop: str | Sequence[str] | None = None, **sampling: Unpack[Sampling],
    ) -> Generator[Piece, None, None]:  # fmt: skip
        """`chat_completion` as an iterator of pieces, as tokens come; see
        `stream_text_completion`."""
        params, seed = params_of(sampling, temperature, top_p, max_gen_len)
        params = replace(params, max_tokens=params.max_tokens or None)
        ids: list[list[int] | None] = []
        refused = {}
        for at, dialog in enumerate(listed("dialogs", dialogs)):
            try:
                ids.append(self.formatter.encode_dialog_prompt(dialog))
            except RefusedDialog as error:
                refused[at] = str(error)
                ids.append(None)  # seeds go by index
            except ValueError as error:
                raise ValueError(f"dialog {at}: {error}") from None
        requests = self._requests(ids, params, seed)
        stops = stop_strings(stop)
        return self._pieces(requests, flag("logprobs", logprobs), False, stops, refused)

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
        logprobs, echo = flag("logprobs", logprobs), flag("echo", echo)
        scored = logprobs or params.logprobs is not None
        if scored and echo and params.prompt_logprobs is None:
            params = replace(params, prompt_logprobs=params.logprobs or 0)
        requests = self._requests(listed("prompt_tokens", prompt_tokens), params, seed)
        return self._pieces(requests, scored, echo, stop_strings(stop))

    # ---- how it is done

    def _requests(
        self, prompts: Sequence[Any], params: SamplingParams, seed: Seed
    ) -> list[Request]:
        """A request for each prompt that is not None; all are checked before any is run."""
        requests = []
        seeds = seeds_of(params.seed if seed is None else seed, len(prompts))
        for at, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
            own_params = replace(params, seed=own)
            if prompt is None:
                continue
            try:
                requests.append(self.engine.prepare(prompt, own_params))
            except ValueError as error:
                raise ValueError(f"prompt {at}: {error}") from None
            twice = requests[-1].prompt[:2] == [self.tokenizer.bos_id] * 2
            if twice and not self._warned:
                logger.warning("prompt %d begins with two begin-of-text tokens", at)
            self._warned = self._warned or twice
        return requests

    def _silent(self, request: Request) -> bool:
        """Whether a prompt has no text, so that whatever follows begins one."""
        return not any(map(self.tokenizer.token_bytes, request.prompt))

    def _pieces(
        self, requests: list[Request], logprobs: bool, echo: bool, stop: tuple[str, ...],
        refused: Mapping[int, str] | None = None,
    ) -> Generator[Piece, None, None]:  # fmt: skip
        """The events of requests as text; see `Piece` and `AnswerText`.

        `refused` is None where answers continue the text of their prompts; where they begin texts
        of their own, it holds those that are known without the model, by index.
        """
        known = refused or {}
        for index, answer in known.items():
            yield Piece(index, answer, finish_reason="stop")
        indices = [at for at in range(len(requests) + len(known)) if at not in known]
        answers = [
            AnswerText(self.tokenizer, stop, begins=refused is not None or self._silent(each))
            for each in requests
        ]
        begun: set[int] = set()
        ended: set[int] = set()
        with closing(self.owner.run(requests, ended)) as events:
            for at, event in events:
                if at in ended:
                    continue
                index, text, request = indices[at], answers[at], event.request
                if echo and at not in begun:
                    tops = request.prompt_top_logprobs if request.params.prompt_logprobs else []
                    scores = request.prompt_logprobs
                    yield from echoed(self.tokenizer, index, request.prompt, scores, tops)
                begun.add(at)
                token = None if event.finish_reason == "stop" else event.token
                score, top = (event.logprob, event.top_logprobs) if logprobs else (None, None)
                pieces = text.push(index, token, score, top)
                if text.stopped:
                    self.engine.cancel(request, "stop")
                if event.finish_reason is not None or text.stopped:
                    ended.add(at)
                    reason = "stop" if text.stopped else event.finish_reason
                    pieces = text.close(index, pieces, reason)
                yield from pieces


def check_sampling(temperature: float, top_p: float, max_gen_len: int | None) -> None:
    """ValueError where no prompt could be answered so: for programs, before they load a model."""
    params_of({}, temperature, top_p, max_gen_len)
