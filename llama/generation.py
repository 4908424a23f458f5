"""Where ids meet text: `Llama` builds a model and answers prompts, whole or as a stream.

It turns text into ids, hands them to the engine, and turns the engine's events back into text. It
knows nothing of how a step is run. The surprising thing: there is one path. `text_completion` and
`chat_completion` join what their streaming forms yield, and `generate` reads the same events as
ids.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch

from llama.checkpoint import merge_adapter, open_checkpoint
from llama.checkpoint.plan import check_memory
from llama.engine import Engine, Event, Request
from llama.llama2 import RefusedDialog, chat_format
from llama.model import RopeScaling, Transformer
from llama.parallel import join, local_device
from llama.quantization import Recipe, check_ranks, formats_of, load, recipes_for
from llama.sampling import SamplingParams
from llama.settings import CHUNK_ROWS, as_dtype, check_vocabulary, with_limits
from llama.streaming import AnswerText, Piece, join_pieces, stop_strings
from llama.templates import choose_format
from llama.tokenizer import Dialog, DialogFormat, IncrementalDecoder, Message, TextTokenizer

logger = logging.getLogger(__name__)

Seed = int | Sequence[int] | None


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
            kernels: on a single NVIDIA GPU of compute capability 8.0 or newer, run by this
                library's kernels; False: by torch alone, as everywhere else.

        Raises ValueError or FileNotFoundError, before anything is allocated, for files that do not
        make a model, limits that do not fit it, or memory that does not suffice; ImportError where
        the tokenizer of Llama 1 and 2 needs an extra that is not installed.
        """
        where = local_device(device)
        checkpoint = open_checkpoint(ckpt_dir, rope_scaling=rope_scaling)
        if adapter is not None:
            checkpoint = merge_adapter(checkpoint, adapter)
        tokenizer = checkpoint.open_tokenizer(tokenizer_path)
        if tokenizer is None:
            raise FileNotFoundError(f"no tokenizer.model in {ckpt_dir}; give tokenizer_path")
        args = with_limits(checkpoint.args, max_batch_size, max_seq_len)
        check_vocabulary(tokenizer, args, tokenizer_path or checkpoint.tokenizer_path or ckpt_dir)
        tokenizer.limit(args.vocab_size)
        formatter = choose_format(tokenizer, checkpoint.chat_template, checkpoint.stop_token_ids)
        checkpoint = replace(checkpoint, args=args)
        kind = as_dtype(dtype) or checkpoint.dtype
        formats = checkpoint.formats if quantize is None else formats_of(quantize, args)
        ranks = join(model_parallel_size, where)
        problem = None
        try:
            check_ranks(formats, args, ranks.size)
            chunk, smaller = CHUNK_ROWS, recipes_for(args)
            check_memory(checkpoint, ranks, where, kind, chunk, formats, smaller)
            model = load(
                checkpoint,
                ranks=ranks,
                device=where,
                dtype=kind,
                formats=formats,
                show_progress=ranks.is_main,
            )
        except Exception as error:
            problem = error
        ranks.agree(problem, "loading the model")
        return Llama(
            model,
            tokenizer,
            seed=seed,
            formatter=formatter,
            stop_token_ids=checkpoint.stop_token_ids,
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
        kernels: bool = True,
    ) -> None:
        """`formatter` None: the tokenizer family's; `stop_token_ids` are added to its own;
        `kernels` as in `build`."""
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = formatter or chat_format(tokenizer)
        self.is_main = model.ranks.is_main
        args = model.params
        self.engine = Engine(
            model,
            max_batch_size=args.max_batch_size,
            max_seq_len=args.max_seq_len,
            stop_token_ids=tokenizer.stop_tokens | set(stop_token_ids),
            seed=seed,
            chunk=CHUNK_ROWS,
            kernels=kernels,
        )
        self._mail: dict[Request, list[Event]] = {}
        self._warned = False

    # ---- ids to ids

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
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

        max_gen_len bounds the new tokens of each prompt; None: all that max_seq_len leaves; 0:
        none, which with echo and logprobs scores the prompts. With echo the lists begin with the
        prompt, whose first token has logprob 0.0. Logprobs are the model's own, before temperature
        and top_p. A stop token ends a row and is not in it; `stop_token_ids` adds to the
        tokenizer's stop_tokens. An int `seed` stands for seed, seed + 1, ... over the prompts. For
        top_k and what follows see `SamplingParams`. Raises ValueError, naming the prompt, before
        any of them is run.
        """
        base = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logit_bias=logit_bias,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            max_tokens=_checked(max_gen_len), stop_token_ids=tuple(stop_token_ids or ()),
            prompt_logprobs=logprobs and echo,
        )  # fmt: skip
        prompts = [list(prompt) for prompt in prompt_tokens]
        tokens: list[list[int]] = [prompt if echo else [] for prompt in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        for index, event in self._run(prompts, self._each(prompts, base, seed)):
            if not scores[index]:
                scores[index] += event.request.prompt_logprobs
            if event.token is not None and event.logprob is not None:
                tokens[index].append(event.token)
                scores[index].append(event.logprob)
        return tokens, scores if logprobs else None

    # ---- text to text

    def text_completion(
        self,
        prompts: Sequence[str],
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
        pieces = self.stream_text_completion(
            prompts, temperature, top_p, max_gen_len, logprobs, echo,
            seed=seed, stop=stop, top_k=top_k, min_p=min_p, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        out = []
        for text, reason, tokens, scores in join_pieces(pieces, len(prompts)):
            prediction = CompletionPrediction(generation=text, finish_reason=reason)
            if logprobs:
                prediction |= CompletionPrediction(tokens=tokens, logprobs=scores)
            out.append(prediction)
        return out

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
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
        pieces = self.stream_chat_completion(
            dialogs, temperature, top_p, max_gen_len, logprobs,
            seed=seed, stop=stop, top_k=top_k, min_p=min_p, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        out = []
        for text, reason, tokens, scores in join_pieces(pieces, len(dialogs)):
            answer = Message(role="assistant", content=text)
            prediction = ChatPrediction(generation=answer, finish_reason=reason)
            if logprobs:
                prediction |= ChatPrediction(tokens=tokens, logprobs=scores)
            out.append(prediction)
        return out

    def stream_text_completion(
        self,
        prompts: Sequence[str],
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
    ) -> Iterator[Piece]:
        """`text_completion` as an iterator of pieces, as tokens come; arguments as there.

        Bad arguments raise here, not at the first piece. Leaving the iterator early frees its
        slots.
        """
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompts is {prompts!r:.80}; it must be a list of strings")
        base = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logit_bias=logit_bias,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            max_tokens=_checked(max_gen_len) or None,
        )  # fmt: skip
        ends = bool(self.tokenizer.suffix)
        ids = [self.tokenizer.encode(prompt, bos=True, eos=ends) for prompt in prompts]
        return self.stream(ids, base, seed=seed, stop=stop, logprobs=logprobs, echo=echo)

    def stream_chat_completion(
        self,
        dialogs: Sequence[Dialog],
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
    ) -> Iterator[Piece]:
        """`chat_completion` as an iterator of pieces, as tokens come; see
        `stream_text_completion`."""
        base = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, logit_bias=logit_bias,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            max_tokens=_checked(max_gen_len) or None,
        )  # fmt: skip
        ids, refused = [], {}
        for index, dialog in enumerate(dialogs):
            try:
                ids.append(self.formatter.encode_dialog_prompt(dialog))
            except RefusedDialog as error:
                refused[index] = str(error)
                ids.append([self.tokenizer.bos_id])  # keeps the place: seeds go by index
            except ValueError as error:
                raise ValueError(f"dialog {index}: {error}") from None
        params = self._each(ids, base, seed)
        return self._pieces(ids, params, logprobs, False, stop_strings(stop), refused)

    def stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seed: Seed = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Iterator[Piece]:
        """Prompts of token ids to an iterator of pieces of text: what the other streams call.

        `params` holds for every prompt; `seed` and the rest are as in `text_completion`. The pieces
        continue the text of their prompt.
        """
        ids = [list(prompt) for prompt in prompt_tokens]
        base = replace(params, prompt_logprobs=logprobs and echo)
        return self._pieces(ids, self._each(ids, base, seed), logprobs, echo, stop_strings(stop))

    # ---- how it is done

    def _each(
        self, prompts: list[list[int]], base: SamplingParams, seed: Seed
    ) -> list[SamplingParams]:
        """The parameters of each prompt; every prompt is checked before any is run."""
        seeds: Sequence[int | None]
        if seed is None:
            seeds = [None] * len(prompts)
        elif isinstance(seed, int):
            seeds = range(seed, seed + len(prompts))
        else:
            seeds = list(seed)
            if len(seeds) != len(prompts):
                raise ValueError(f"seed has {len(seeds)} values for {len(prompts)} prompts")
        params = [replace(base, seed=s) for s in seeds]
        bos = self.tokenizer.bos_id
        for index, prompt in enumerate(prompts):
            try:
                self.engine.check(prompt, params[index])
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
            if prompt[:2] == [bos, bos] and not self._warned:
                self._warned = True
                logger.warning("prompt %d begins with two begin-of-text tokens", index)
        return params

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams]
    ) -> Iterator[tuple[int, Event]]:
        """Submit, step until all are done, and yield each event with the index of its prompt.

        Several of these may be under way: whoever steps the engine leaves the others their events.
        """
        requests = [self.engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
        self._mail.update((request, []) for request in requests)
        left = dict(enumerate(requests))
        try:
            while left:
                for index, request in list(left.items()):
                    for event in self._mail[request]:
                        yield index, event
                    self._mail[request] = []
                    if request.finish_reason is not None:
                        del left[index]
                if left:
                    for event in self.engine.step():
                        if event.request in self._mail:
                            self._mail[event.request].append(event)
        finally:
            for request in requests:
                self.engine.cancel(request, "cancelled")
                del self._mail[request]

    def _pieces(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        logprobs: bool,
        echo: bool,
        stop: tuple[str, ...],
        refused: Mapping[int, str] | None = None,
    ) -> Iterator[Piece]:
        """The events of `_run` as text; see `Piece` and `AnswerText`.

        `refused` is None where answers continue the text of their prompts; where they begin texts
        of their own, it holds those that are known without the model, by index.
        """
        known = refused or {}
        for index, answer in known.items():
            yield Piece(index, answer, finish_reason="stop")
        left = [index for index in range(len(prompts)) if index not in known]
        texts = {
            i: AnswerText(
                self.tokenizer, stop, begins=refused is not None or self._silent(prompts[i])
            )
            for i in left
        }
        fresh, ended = set(left), set()
        for place, event in self._run([prompts[i] for i in left], [params[i] for i in left]):
            index = left[place]
            if index in ended:
                continue
            if echo and index in fresh:
                yield from self._echo(index, event.request)
            fresh.discard(index)
            text = texts[index]
            pieces = text.push(index, event.token, event.logprob if logprobs else None)
            if text.stopped:
                self.engine.cancel(event.request, "stop")
            if event.finish_reason is not None or text.stopped:
                ended.add(index)
                pieces = text.close(index, pieces, "stop" if text.stopped else event.finish_reason)
            yield from pieces

    def _silent(self, prompt: list[int]) -> bool:
        """Whether a prompt has no text, so that whatever follows begins one."""
        return not any(self.tokenizer.token_bytes(token) for token in prompt)

    def _echo(self, index: int, request: Request) -> Iterator[Piece]:
        decoder = IncrementalDecoder(self.tokenizer)
        scores = dict(enumerate(request.prompt_logprobs))
        for at, token in enumerate(request.prompt):
            text = "" if token == self.tokenizer.bos_id else decoder.push(token)
            yield Piece(index, text, token, scores.get(at))


def check_sampling(temperature: float, top_p: float, max_gen_len: int | None) -> None:
    """ValueError where no prompt could be answered so: for programs, before they load a model."""
    SamplingParams(temperature=temperature, top_p=top_p, max_tokens=_checked(max_gen_len))


def _checked(max_gen_len: int | None) -> int | None:
    whole = isinstance(max_gen_len, int) and not isinstance(max_gen_len, bool)
    if max_gen_len is not None and not (whole and max_gen_len >= 0):
        raise ValueError(f"max_gen_len is {max_gen_len!r}; it must be an int >= 0 or None")
    return max_gen_len
