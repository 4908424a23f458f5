"""`chat`: a conversation in a terminal. Messages and commands in, answers as they come.

Ties the conversation to the engine and the terminal; refuses to know how either works. The
surprising thing: with several ranks only the first one is here. The engines of the others follow
its engine; so Ctrl-C stops all of them after the same token.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import OutOfMemoryError

from llama.commands.common import DEMO, positive
from llama.engine import Request
from llama.generation import Llama
from llama.sampling import SamplingParams
from llama.terminal.arguments import as_typed, sentence
from llama.terminal.lines import Terminal, Unseen
from llama.text.conversation import Conversation
from llama.text.streaming import IncrementalDecoder

# What /set knows: the field of SamplingParams, what it is read as, and whether it may be none.
SETTINGS: dict[str, tuple[str, Callable[[str], float], bool]] = {
    "temperature": ("temperature", float, False),
    "top_p": ("top_p", float, False),
    "top_k": ("top_k", int, False),
    "min_p": ("min_p", float, False),
    "presence_penalty": ("presence_penalty", float, False),
    "frequency_penalty": ("frequency_penalty", float, False),
    "max_gen_len": ("max_tokens", int, True),
    "seed": ("seed", int, True),
}

Steps = Generator[Request, None, None]


class Answers:
    """One request at a time, on all ranks: the first one asks, the engines of the others follow."""

    def __init__(self, llama: Llama) -> None:
        self.engine = llama.engine
        slow = llama.model.norm.weight.device.type == "cpu"
        chunk = min(self.engine.chunk, 512) if slow else None  # Ctrl-C is heard between two chunks
        self.engine.configure(reuse=True, chunk=chunk)

    def ask(self, ids: Sequence[int], params: SamplingParams) -> Steps:
        """The request, again after each step. Closing that ends it on all ranks.

        Raises ValueError, before any rank does anything, where it cannot be run.
        """
        return self._steps(self.engine.submit(ids, params))

    def _steps(self, request: Request) -> Steps:
        try:
            while request.finish_reason is None:
                self.engine.step()
                if request.error is not None:
                    raise request.error
                yield request
        finally:
            self.engine.cancel(request, "cancelled")
            if request.finish_reason is None:  # several ranks end it in the step that follows
                self.engine.step()


class Chat:
    """A conversation of a person at `terminal` with a model. `params` hold for every answer."""

    def __init__(
        self,
        llama: Llama,
        terminal: Terminal,
        params: SamplingParams,
        system: str | None = None,
    ) -> None:
        self.llama, self.terminal, self.params = llama, terminal, params
        self.talk = Conversation(llama.formatter, system)
        self.answers = Answers(llama)
        self.room = llama.engine.max_seq_len
        self.leaving = False
        self.failed = 0  # lines that did not get what they asked for
        self._answered = False  # whether the line that is taken has its place in the output
        self._own_files: set[Path] = set()

    def run(self) -> None:
        """Talk until the person leaves, or the input ends.

        Through a pipe each message, and each line that is none, has its place in the output: an
        answer, or else an empty line. Raises OSError where no answer can be shown any more.
        """
        try:
            while not self.leaving:
                try:
                    text, fenced = self.terminal.read()
                except EOFError:
                    if self.terminal.interactive:
                        self.terminal.note("")  # whatever comes next begins a line
                    break
                except KeyboardInterrupt:
                    if not self.terminal.interactive:
                        raise
                    self.terminal.note("\n(Ctrl-D or /quit leaves)")
                    continue
                self._take_whole(text, fenced)
        except Unseen as unseen:
            self.llama.engine.close()
            raise unseen.__cause__ or unseen from None
        self.llama.engine.close()

    def _take_whole(self, text: str, fenced: bool) -> None:
        """Take a line; what is wrong with it is said, and the talk goes on."""
        self._answered = False
        try:
            self.take(text, fenced)
        except (ValueError, OSError, FloatingPointError, OutOfMemoryError) as error:
            self.failed += 1
            self.terminal.note(sentence(error))
        except KeyboardInterrupt as pressed:
            if pressed.args or not self.terminal.interactive:
                raise  # twice in one answer: out of here
            self.terminal.note("\n(Ctrl-D or /quit leaves)")  # once, when it was just over
        if not self.terminal.interactive and not self._answered:
            self.terminal.show("\n")

    def take(self, text: str, fenced: bool = False) -> None:
        """A command, or a message to answer; an empty line is neither.

        Raises ValueError, OSError or FloatingPointError, after which the conversation can go on.
        """
        if text.startswith("/") and not fenced:
            name, *rest = text.split(maxsplit=1)
            if name not in COMMANDS:
                raise ValueError(
                    f"{name} is no command; /help lists them, and a blank before the / makes it a "
                    "message"
                )
            COMMANDS[name](self, "".join(rest).strip())
        elif text.strip():
            self.talk.add(text)
            self._answer()

    # ---- answers

    def _answer(self) -> None:
        """Answer the last message, and keep what was said, also where it was stopped."""
        self._make_room()
        exchange, began = self.talk.exchanges[-1], time.monotonic()
        decoder, tokens, first = IncrementalDecoder(self.llama.tokenizer), 0, 0.0
        steps = self.answers.ask(self.talk.ids(), self.params)
        try:
            with self.terminal.ctrl_c() as pressed, contextlib.closing(steps):
                for request in steps:
                    for token in request.tokens[tokens:]:
                        self.terminal.show(decoder.push(token))
                    tokens = len(request.tokens)
                    first = first or (time.monotonic() if tokens or request.finish_reason else 0.0)
                    if pressed():
                        break
        finally:
            now = time.monotonic()
            self._answered = True
            self.terminal.show(decoder.flush() + "\n")
        if tokens or request.finish_reason == "stop":
            exchange.answer = list(request.tokens)
        self._say_end(request)
        self.failed += request.finish_reason == "cancelled"  # nobody else would know through a pipe
        if self.terminal.interactive:
            self._say_speed(request, (first or now) - began, now - (first or now))

    def _make_room(self) -> None:
        """Forget the oldest exchanges where an answer would not fit, so many that it is rare.

        An answer wants a quarter of the context, or max_gen_len where that is less. Forgetting goes
        down to half of the context: all that is left has to be run again.
        """
        wanted = min(self.params.max_tokens or self.room, max(1, self.room // 4))
        least = len(self.talk.ids(len(self.talk.exchanges) - 1))
        if least >= self.room:
            self.talk.exchanges.pop()
            raise ValueError(
                f"the message was not sent: with the system prompt it has {least} tokens, and the "
                f"context of {self.room} must also hold an answer"
            )
        if len(self.talk.ids()) + wanted > self.room and self.talk.forget(self.room // 2):
            self.terminal.note(
                f"(too little of the context of {self.room} tokens is left: the model forgets "
                f"the oldest {self.talk.forgotten} of {len(self.talk.exchanges)} messages and "
                "their answers)"
            )

    def _say_end(self, request: Request) -> None:
        note = self.terminal.note
        if request.finish_reason == "cancelled":
            kept = "what was said stays" if request.tokens else "nothing was said"
            note(f"(stopped; {kept}, and /retry asks again)")
        elif request.finish_reason == "length" and len(request.tokens) == self.params.max_tokens:
            note(f"(cut here: max_gen_len is {self.params.max_tokens})")
        elif request.finish_reason == "length":
            note(f"(cut here: the context of {self.room} tokens is full)")

    def _say_speed(self, request: Request, waited: float, took: float) -> None:
        """New tokens of the prompt and how long they took; tokens after the first, by second."""
        new, tokens = len(request.prompt) - request.reused, len(request.tokens)
        speed = f", {(tokens - 1) / took:.0f} tokens/s" if tokens > 1 and took > 0 else ""
        self.terminal.note(
            f"[{tokens} tokens{speed}; {new} of {len(request.prompt)} prompt tokens were new, "
            f"{waited:.2f} s; {self._left()} tokens of context left]"
        )

    def _left(self) -> int:
        return max(0, self.room - len(self.talk.ids()))

    # ---- commands: the first line of each docstring is its help

    def _help(self, rest: str) -> None:
        """/help                  this list"""
        lines = [(command.__doc__ or "").splitlines()[0] for command in COMMANDS.values()]
        self.terminal.note(
            "\n".join(lines) + '\n"""                    begins and ends a message of several lines'
            "\nCtrl-C                 stops an answer; /retry replaces it"
            "\nCtrl-D                 leaves"
        )

    def _system(self, rest: str) -> None:
        """/system TEXT           how to answer, from now on; without TEXT: what holds now"""
        if rest:
            self.talk.set_system(rest)
        said = "there is no system prompt" if self.talk.system is None else self.talk.system
        self.terminal.note(f"(system prompt, {self.talk.system_tokens} tokens: {said})")

    def _reset(self, rest: str) -> None:
        """/reset                 forget the conversation; /reset all: the system prompt as well"""
        if rest not in ("", "all"):
            raise ValueError(f"/reset {rest}: it is /reset or /reset all")
        self.talk.reset()
        if rest == "all":
            self.talk.set_system(None)
        self.terminal.note("(a new conversation)")

    def _retry(self, rest: str) -> None:
        """/retry                 answer the last message again"""
        if not self.talk.exchanges:
            raise ValueError("there is no message yet that could be answered again")
        if self.params.temperature == 0 or self.params.seed is not None:
            fixed = "temperature is 0" if self.params.temperature == 0 else "seed is set"
            self.terminal.note(f"({fixed}: the answer will be the same)")
        self.talk.exchanges[-1].answer = None
        self._answer()

    def _save(self, rest: str) -> None:
        """/save FILE             write the conversation"""
        path = _path(rest, "/save")
        if path.exists() and path.resolve() not in self._own_files:
            raise ValueError(f"{path} is there already; choose another name")
        self.talk.save(path)
        self._own_files.add(path.resolve())
        self.terminal.note(f"(written to {path}, messages: {len(self.talk.exchanges)})")

    def _load(self, rest: str) -> None:
        """/load FILE             go on with a conversation that was saved"""
        path = _path(rest, "/load")
        self.talk.load(path)
        self._own_files.add(path.resolve())
        self.terminal.note(f"(read from {path}, messages: {len(self.talk.exchanges)})")

    def _set(self, rest: str) -> None:
        """/set NAME VALUE        such as /set temperature 0.2; without both: all of them"""
        words = rest.replace("=", " ").split()
        if not words:
            rows = [f"{name:18} {getattr(self.params, SETTINGS[name][0])}" for name in SETTINGS]
            return self.terminal.note("\n".join(rows).lower())
        if len(words) != 2 or words[0] not in SETTINGS:
            raise ValueError(f"/set {rest}: give one of {', '.join(SETTINGS)}, and its value")
        name, text = words
        field, kind, may_be_none = SETTINGS[name]
        try:
            value = None if may_be_none and text.lower() == "none" else kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            none = " or none" if may_be_none else ""
            raise ValueError(f"{name} is {text!r}; it must be {wanted}{none}") from None
        if field == "max_tokens":
            value = value or None  # 0 means none, as in Meta's code
        try:
            self.params = replace(self.params, **{field: value})  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(str(error).replace(field, name)) from None
        self.terminal.note(f"({name} is {value})".replace("None", "none"))

    def _tokens(self, rest: str) -> None:
        """/tokens                how much of the context is used"""
        exchanges, forgotten = len(self.talk.exchanges), self.talk.forgotten
        used = len(self.talk.ids())
        self.terminal.note(
            f"({used} of {self.room} tokens are used, {self._left()} are left; system prompt: "
            f"{self.talk.system_tokens}; messages: {exchanges}, forgotten: {forgotten})"
        )

    def _quit(self, rest: str) -> None:
        """/quit                  leave"""
        self.leaving = True


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/help": Chat._help,
    "/system": Chat._system,
    "/reset": Chat._reset,
    "/retry": Chat._retry,
    "/save": Chat._save,
    "/load": Chat._load,
    "/set": Chat._set,
    "/tokens": Chat._tokens,
    "/quit": Chat._quit,
}


def _path(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command} needs the name of a file")
    return Path(text).expanduser()


def talk(llama: Llama, params: SamplingParams, system: str | None = None, hello: str = "") -> bool:
    """Talk at this process's terminal, or follow the rank that does; `hello` is said at first.

    Whether all went well: False where nobody is there to see that a line failed, and one did.
    """
    if not llama.is_main:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first rank says when to stop
        Answers(llama).engine.follow()
        return True
    terminal = Terminal(list(COMMANDS))
    if terminal.interactive and hello:
        terminal.note(hello)
    one = Chat(llama, terminal, params, system)
    one.run()
    if terminal.closed:
        terminal.note("standard input is closed: there is nothing to answer")
    return terminal.interactive or not (one.failed or terminal.closed)


def chat(
    ckpt_dir: str = DEMO,
    *,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_gen_len: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 1,
    system: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> None:
    """Talk with a model in the terminal, or line by line through a pipe.

    Answers stream, and Ctrl-C stops one. /help lists what else can be typed. Through a pipe each
    line is a message, and standard output has the answers only.

        python -m llama chat
        python -m llama chat Meta-Llama-3-8B-Instruct --system "Answer in one word."

    Args:
        max_seq_len: tokens of the conversation that the model sees; what Llama.build takes.
        max_gen_len: tokens of an answer at most; by default all that there is room for.
        system: the system prompt.
    """
    params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=positive(max_gen_len, "max_gen_len")
    )
    as_typed(system or "", "--system")
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
    )
    about = "The demo, which knows a very small world. " if ckpt_dir == DEMO else ""
    room = llama.model.params.max_seq_len
    hello = f"{about}{room} tokens of context. /help lists what else can be done."
    if not talk(llama, params, system, hello):
        sys.exit(1)  # stderr has the sentences
