"""The chat: what is prefilled, kept, forgotten and stopped, in this process, on pseudo-terminals
and with two ranks. `pytest -rP -k session` shows the sessions."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import BYTES_VOCAB, says, tiny_args, write_tokenizer
from pseudo_terminal import CTRL_C, CTRL_D, Session

from llama import Llama, SamplingParams
from llama.checkpoint import random_checkpoint, write_meta
from llama.commands.chat import COMMANDS, SETTINGS, Chat
from llama.terminal.lines import Terminal
from llama.text.conversation import Conversation

GREEDY = SamplingParams(temperature=0, max_tokens=12)
HEADER = len("user\n\n") + 2  # ids of a header over bytes
EOT = 256 + 9


class Typed:
    """A terminal whose lines are given; Ctrl-C comes after `stop` pieces of an answer."""

    def __init__(self, *lines, stop=None, interactive=False):
        self.lines, self.stop, self.interactive = list(lines), stop, interactive
        self.shown, self.notes, self.pieces = "", [], 0

    def read(self):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0), False

    def show(self, text):
        self.shown, self.pieces = self.shown + text, self.pieces + 1

    def note(self, text):
        self.notes.append(text)

    @contextlib.contextmanager
    def ctrl_c(self):
        self.pieces = 0
        yield lambda: self.stop is not None and self.pieces >= self.stop


def talk(llama, *lines, params=GREEDY, system=None, **options):
    """A chat that has read these lines."""
    one = Chat(llama, Typed(*lines, **options), params, system)
    one.run()
    return one


def count_rows(model):
    """A list that gets the number of tokens of every forward."""
    rows, plain = [], model.hidden

    def hidden(tokens, *rest):
        rows.append(len(tokens))
        return plain(tokens, *rest)

    model.hidden = hidden
    return rows


# ---- what is run, and that it is the same


def test_a_turn_prefills_only_its_own_tokens_and_equals_a_fresh_run(tiny_llama):
    llama = tiny_llama(max_seq_len=512, max_batch_size=1)
    one, rows, sizes = talk(llama), count_rows(llama.model), []
    for text in ("Hello there", "And now?", "A third one"):
        before = one.talk.ids() if one.talk.exchanges else []
        one.take(text)
        answer = one.talk.exchanges[-1].answer
        prompt = one.talk.ids()[: -len(answer) - 1]
        assert prompt[: len(before)] == before
        # of an answer cut by max_gen_len, the last token and its end have not been run yet
        new = len(prompt) - len(before) + (2 if before else 0)
        assert rows == [new] + [1] * (len(answer) - 1)
        sizes.append(f"{new} of {len(prompt)}")
        rows.clear()
        fresh = tiny_llama(max_seq_len=512, max_batch_size=1)
        assert fresh.generate([prompt], len(answer), 0)[0] == [answer]
    print("prompt tokens that each turn ran:", ", ".join(sizes))


def test_after_an_answer_that_ended_only_its_end_and_the_next_message_are_run(scripted):
    text = "hello"
    first = 1 + HEADER + len("one") + 1 + HEADER + len("assistant") - len("user")
    llama = scripted(lambda token, position: says(text, first)(token, position), max_seq_len=128)
    one = talk(llama, "one")
    assert one.terminal.shown == "hello\n"
    llama.model.batches.clear()
    one.take("two")
    headers = 2 * HEADER + len("assistant") - len("user")
    assert llama.model.batches[0] == [1 + headers + len("two") + 1]


def test_what_was_sampled_is_what_chat_completion_samples(tiny_llama):
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=5, max_tokens=20)
    one = talk(tiny_llama(max_seq_len=512), "Hi", "More", params=params, system="Be kind.")
    dialog = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    prompt = tiny_llama().formatter.encode_dialog_prompt(dialog)
    plain, _ = tiny_llama(max_seq_len=512).generate([prompt], 20, 1.0, 0.95, seed=5)
    assert one.talk.exchanges[0].answer == plain[0]


# ---- Ctrl-C and /retry


def letters(token, position):
    return 97 + position % 26


def test_ctrl_c_keeps_what_was_said_and_retry_replaces_it(scripted):
    llama = scripted(letters, max_seq_len=256)
    one = talk(llama, "go", stop=3)
    assert one.terminal.notes == ["(stopped; what was said stays, and /retry asks again)"]
    said = one.talk.exchanges[0].answer
    assert len(said) == 3
    assert one.terminal.shown == bytes(said).decode() + "\n"
    assert one.talk.ids()[-4:] == [*said, EOT]
    assert llama.engine.idle
    one.terminal.stop = None
    llama.model.batches.clear()
    one.take("/retry")
    assert len(one.talk.exchanges) == 1
    assert one.talk.exchanges[0].answer[:3] == said
    assert len(one.talk.exchanges[0].answer) == 12
    assert llama.model.batches == [[1]] * 12  # its prompt was still in the slot
    assert "(temperature is 0: the answer will be the same)" in one.terminal.notes


def test_ctrl_c_before_the_first_word_leaves_the_message_unanswered(scripted):
    llama = scripted(letters, max_seq_len=2048)
    one = talk(llama, "x" * 1500, stop=0)  # three chunks
    assert one.terminal.notes == ["(stopped; nothing was said, and /retry asks again)"]
    assert one.talk.exchanges[0].answer is None
    assert llama.model.batches == [[512]]
    one.terminal.stop = None
    one.take("short")
    assert [exchange.text for exchange in one.talk.exchanges] == ["short"]


def test_retry_needs_a_message_and_samples_anew(tiny_llama):
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=12)
    one = talk(tiny_llama(max_seq_len=256), "/retry", "Hi", params=params)
    assert one.terminal.notes[0] == "there is no message yet that could be answered again"
    before = one.talk.exchanges[0].answer
    one.take("/retry")
    assert one.talk.exchanges[0].answer != before


def test_an_answer_that_fails_is_one_sentence_and_the_talk_goes_on(tiny_llama):
    llama = tiny_llama(max_seq_len=256)
    one = talk(llama)
    weight = llama.model.norm.weight
    kept = weight.clone()
    one.terminal.lines = ["Hi", "/tokens"]
    weight.data.fill_(float("nan"))
    one.run()
    assert "are not finite" in one.terminal.notes[0]
    assert one.talk.exchanges[0].answer is None
    weight.data.copy_(kept)
    one.take("/retry")
    assert one.talk.exchanges[0].answer


# ---- a full context


def test_a_full_context_forgets_the_oldest_turns_and_says_so(scripted):
    llama = scripted(letters, max_seq_len=200)
    one = talk(llama, *(f"message {i}" for i in range(12)), system="S")
    assert len(one.talk.exchanges) == 12
    assert one.talk.forgotten > 6
    notes = [note for note in one.terminal.notes if "forgets" in note]
    assert len(notes) >= 3
    assert notes[0].startswith(
        "(too little of the context of 200 tokens is left: the model forgets"
    )
    start = one.talk.ids()[: one.talk.system_tokens]
    assert start == Conversation(llama.formatter, "S").ids()
    assert len(one.talk.ids()) <= 200
    one.terminal.notes.clear()
    one.take("/tokens")
    assert one.terminal.notes[0].endswith(f"messages: 12, forgotten: {one.talk.forgotten})")


def test_a_message_that_can_never_fit_is_refused_and_nothing_is_forgotten(scripted):
    one = talk(scripted(letters, max_seq_len=100), "Hi", "x" * 90, "Ho")
    assert one.terminal.notes[1].startswith("the message was not sent: with the system prompt it h")
    assert [exchange.text for exchange in one.talk.exchanges] == ["Hi", "Ho"]


def test_every_cut_answer_says_why(scripted):
    one = talk(scripted(letters, max_seq_len=100), "Hi", "/set max_gen_len none", "Ho")
    notes = [note for note in one.terminal.notes if "cut" in note]
    assert notes == [
        "(cut here: max_gen_len is 12)",
        "(cut here: the context of 100 tokens is full)",
    ]
    assert len(one.talk.ids()) == 101  # with the end that the next prompt will hold
    one.take("He")
    assert one.talk.exchanges[-1].answer


@pytest.mark.parametrize("room", range(30, 120, 7))
def test_no_length_of_message_or_context_breaks_it(scripted, room):
    lines = [n * "y" for n in (1, 5, 20, 33, 2, 60, 100, 7)]
    one = talk(scripted(letters, max_seq_len=room), *lines, params=SamplingParams(temperature=0))
    assert len(one.talk.ids()) <= room + 1


# ---- through a pipe


def test_every_line_of_a_pipe_has_its_place_in_the_output(scripted, tmp_path):
    """Answers of one line: line n of the output belongs to what was n-th in the input."""
    one = talk(
        scripted(letters, max_seq_len=256),
        *("one", "/nope", "two", f"/load {tmp_path}/no", "", "x" * 300, "/set top_k 3", "three"),
        *(f"/save {tmp_path}/no/where", "/retry", "/quit", "never read"),
    )
    places = one.terminal.shown.split("\n")
    assert places.pop() == ""
    assert [len(place) for place in places] == [12, 0, 12, 0, 0, 0, 0, 12, 0, 12, 0]
    assert one.failed == 4
    assert [exchange.text for exchange in one.talk.exchanges] == ["one", "two", "three"]


def test_an_answer_that_fails_has_one_place(tiny_llama):
    llama = tiny_llama(max_seq_len=256)
    one = talk(llama)
    llama.model.norm.weight.data.fill_(float("nan"))
    one.terminal.lines = ["Hi", "Ho"]
    one.run()
    assert one.terminal.shown == "\n\n"
    assert one.failed == 2


def test_a_person_at_a_terminal_sees_no_empty_lines(scripted):
    one = talk(scripted(letters, max_seq_len=256), "/nope", "", "/tokens", interactive=True)
    assert one.terminal.shown == ""


class Full(io.TextIOWrapper):
    """A disk that is full after `room` characters."""

    def __init__(self, room, error):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.room, self.error = room, error

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(32, "")])
@pytest.mark.parametrize("room", [0, 5, 13])
def test_where_nothing_can_be_shown_the_talk_ends(piped, monkeypatch, scripted, room, error):
    terminal, _, _ = piped(b"one\ntwo\nthree\n")
    monkeypatch.setattr(sys, "stdout", Full(room, error))
    llama = scripted(letters, max_seq_len=256)
    one = Chat(llama, terminal, GREEDY)
    with pytest.raises(OSError) as raised:  # noqa: PT011
        one.run()
    assert raised.value is error
    assert llama.engine.idle
    assert len(one.talk.exchanges) == 1 + (room == 13)
    assert sys.stdin.readline() == ("two\n", "three\n")[room == 13]


def test_notes_that_cannot_be_written_do_not_end_the_talk(piped, monkeypatch, scripted):
    terminal, out, _ = piped(b"/tokens\none\n")
    monkeypatch.setattr(sys, "stderr", Full(0, OSError(28, "No space left on device")))
    Chat(scripted(letters, max_seq_len=256), terminal, GREEDY).run()
    assert [len(line) for line in out.getvalue().splitlines()] == [0, 12]


# ---- commands


MISTAKES = {
    "/nope": "/nope is no command; /help lists them, and a blank before the / makes it a message",
    "/usr/bin": "/usr/bin is no command",
    "/set temperature hot": "temperature is 'hot'; it must be a number",
    "/set temperature -1": "temperature is -1.0; it must be a number >= 0",
    "/set temperature nan": "temperature is nan; it must be a number >= 0",
    "/set top_p 2": "top_p is 2.0; it must be a number > 0 and <= 1",
    "/set top_k 1.5": "top_k is '1.5'; it must be a whole number",
    "/set max_gen_len few": "max_gen_len is 'few'; it must be a whole number or none",
    "/set max_gen_len -3": "max_gen_len is -3; it must be an int >= 0 or None",
    "/set colour red": "/set colour red: give one of temperature, ",
    "/set temperature": "/set temperature: give one of temperature, ",
    "/load": "/load needs the name of a file",
    "/save": "/save needs the name of a file",
    "/load nowhere.json": "nowhere.json: No such file or directory",
    "/save no/where": "no/where.part: No such file or directory",
    "/load .": ".: Is a directory",
    "/reset everything": "/reset everything: it is /reset or /reset all",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_the_talk_goes_on(scripted, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    one = talk(scripted(letters, max_seq_len=256), line, "Hi")
    assert one.terminal.notes[0].startswith(MISTAKES[line])
    assert "\n" not in one.terminal.notes[0]
    assert len(one.talk.exchanges) == 1
    assert one.params == GREEDY


def test_ctrl_c_at_the_very_end_of_an_answer_does_not_end_the_talk(scripted, monkeypatch):
    """Pressed when an answer was just over, it fell between that and the prompt: chat was gone."""
    take = Chat.take

    def and_then(pressed):
        def taken(self, text, fenced=False):
            take(self, text, fenced)
            if text == "one":
                raise pressed

        monkeypatch.setattr(Chat, "take", taken)

    and_then(KeyboardInterrupt())
    one = talk(scripted(letters, max_seq_len=256), "one", "two", interactive=True)
    assert "\n(Ctrl-D or /quit leaves)" in one.terminal.notes
    assert len(one.talk.exchanges) == 2
    for pressed, interactive in ((KeyboardInterrupt("twice"), True), (KeyboardInterrupt(), False)):
        and_then(pressed)
        with pytest.raises(KeyboardInterrupt):
            talk(scripted(letters, max_seq_len=256), "one", "two", interactive=interactive)


def test_help_names_every_command(scripted):
    notes = talk(scripted(letters), "/help").terminal.notes
    for name in COMMANDS:
        assert f"{name} " in notes[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_set_and_shown(scripted, name):
    one = talk(scripted(letters), f"/set {name} 1", f"/set {name}=1", "/set")
    assert getattr(one.params, SETTINGS[name][0]) == 1
    assert one.terminal.notes[2].split(f"{name} ")[1].split()[0] in ("1", "1.0")


def test_settings_reach_the_next_answer(tiny_llama):
    one = talk(tiny_llama(max_seq_len=256), "Hi", "/set max_gen_len 5", "Hi", "/quit", "Hi")
    assert [len(exchange.answer) for exchange in one.talk.exchanges] == [12, 5]


def test_system_and_reset(scripted):
    llama = scripted(letters, max_seq_len=256)
    one = talk(llama, "/system", "/system  Say {a: b}, None ", "Hi", "/system", "/reset")
    assert one.terminal.notes[0] == "(system prompt, 1 tokens: there is no system prompt)"
    assert one.terminal.notes[1].endswith(": Say {a: b}, None)")
    assert (
        one.talk.ids()
        == llama.formatter.encode_dialog_prompt(
            [{"role": "system", "content": "Say {a: b}, None"}]
        )[: one.talk.system_tokens]
    )
    one.take("/reset all")
    assert one.talk.ids() == [256]


@pytest.mark.parametrize("text", ["1,2", "None", "{a: b}", '"x"', " /help", "<|eot_id|>", "0x10"])
def test_messages_stay_as_typed(scripted, text):
    llama = scripted(letters, max_seq_len=256)
    one = talk(llama, text)
    expected = llama.formatter.encode_message({"role": "user", "content": text})
    assert one.talk.exchanges[0].message == expected
    assert EOT not in expected[:-1]


def test_empty_lines_are_no_messages(scripted):
    assert not talk(scripted(letters), "", "  ", "\t").talk.exchanges


# ---- files


def test_a_saved_conversation_goes_on_with_its_ids(tiny_llama, tmp_path):
    file = tmp_path / "a talk.json"
    llama = tiny_llama(max_seq_len=256)
    one = talk(llama, "Hi", "Go on", f"/save {file}", system="S \N{SNOWMAN}")
    ids = one.talk.ids()
    other = talk(llama, f"/load {file}", "More")
    assert other.talk.ids()[: len(ids)] == ids
    assert other.talk.system == "S \N{SNOWMAN}"
    assert list(tmp_path.glob("*.part")) == []
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    one.take(f"/save {file}")  # its own file may be written again, another one not
    with pytest.raises(ValueError, match="is there already; choose another name"):
        talk(llama).take(f"/save {file}")


def test_plain_messages_and_those_of_another_tokenizer_are_encoded(scripted, tmp_path):
    file = tmp_path / "talk.json"
    dialog = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "ids": [1, 2, 3]},
        {"role": "user", "content": "And?"},
    ]
    file.write_text(json.dumps(dialog))
    llama = scripted(letters, max_seq_len=256)
    one = talk(llama, f"/load {file}")
    assert one.talk.ids() == llama.formatter.encode_dialog_prompt(dialog)
    one.take("/retry")
    assert len(one.talk.exchanges[1].answer) == 12


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not the JSON that /save writes"),
        ("\xff", "is not the JSON that /save writes"),
        ("[" * 100000, "is not the JSON that /save writes"),
        ("{}", "holds no list of messages"),
        ('{"messages": 3}', "holds no list of messages"),
        ("[3]", "message 0 of the dialog: a message is a dict"),
        ('[{"role": "owner", "content": "x"}]', "unknown role 'owner'"),
        ('[{"role": "user"}]', "no 'content' among its keys"),
        ('[{"role": "user", "content": 1}]', "content is a str"),
        ('[{"role": "assistant", "content": "x"}]', "user and assistant must take turns"),
        ('[{"role": "user", "content": ""}, {"role": "system", "content": ""}]', "take turns"),
    ],
)
def test_a_file_that_holds_no_conversation_changes_nothing(scripted, tmp_path, text, why):
    file = tmp_path / "talk.json"
    file.write_text(text, encoding="latin-1")
    one = talk(scripted(letters, max_seq_len=256), "Hi", f"/load {file}")
    assert why in one.terminal.notes[-1]
    assert str(file) in one.terminal.notes[-1]
    assert [exchange.text for exchange in one.talk.exchanges] == ["Hi"]


# ---- the terminal


@pytest.fixture
def piped(monkeypatch):
    """A function that gives a Terminal with these bytes on stdin, and what it wrote."""

    def make(data):
        out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", error)
        return Terminal(["/help"]), out.buffer, error.buffer

    return make


def lines_of(terminal):
    with contextlib.suppress(EOFError):
        while True:
            yield terminal.read()


def test_lines_and_fences(piped):
    terminal, _, _ = piped(b'one\n"""two\n/three\n"""\n"""four"""\n""""""\n"""five\n\nsix')
    assert list(lines_of(terminal)) == [
        ("one", False),
        ("two\n/three\n", True),
        ("four", True),
        ("", True),
        ("five\n\nsix", True),
    ]


def test_a_command_inside_a_fence_is_text(scripted):
    one = talk(scripted(letters, max_seq_len=256))
    one.take("/help", fenced=True)
    assert one.talk.exchanges[0].text == "/help"


def test_a_pipe_gets_answers_only_and_bad_bytes_do_no_harm(piped, scripted):
    terminal, out, error = piped(b"Hi\n\xff\xfe\n/tokens\n")
    Chat(scripted(letters, max_seq_len=256), terminal, GREEDY).run()
    assert [len(line) for line in out.getvalue().splitlines()] == [12, 12, 0]
    assert b"tokens are used" in error.getvalue()
    assert b"\x1b" not in error.getvalue()
    assert b"max_gen_len is 12" in error.getvalue()


def test_no_stdin_at_all_is_the_end_of_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(EOFError):
        Terminal().read()


# ---- sessions


WORKER = str(Path(__file__).parent / "chat_worker.py")
STATUS = r"\[(\d+) tokens.*?; (\d+) of (\d+) prompt tokens were new, .*?left\]"


def test_a_session_on_a_terminal(tmp_path):
    with Session([sys.executable, WORKER, "plain", "alphabet", str(tmp_path)]) as session:
        session.wait_for("Hello.*> ")
        session.type("one\n")
        session.wait_for("abcdefgh")
        session.type(CTRL_C)
        session.wait_for(r"\(stopped; what was said stays")
        stopped, first, _ = map(int, session.wait_for(STATUS).groups())
        assert 8 <= stopped < 60
        session.wait_for("> ")
        session.type("/retry\n")
        session.wait_for("abcdefghijklmnopqrstuvwxyzabcd")
        assert list(map(int, session.wait_for(STATUS).groups())) == [60, 1, first]
        session.wait_for("> ")
        session.type("two")
        session.wait_for("two")
        session.press(CTRL_C, "Ctrl-D or /quit leaves.*> ")
        session.type("\x1b[A" + 5 * "\x7f" + "tokens\n")  # the line before, but for its "/", edited
        session.wait_for("tokens are used.*> ")
        session.type("two\n")
        _, new, prompt = map(int, session.wait_for(STATUS).groups())
        assert prompt == first + 60 + new - 1  # all of its own, and the last token of the answer
        for _ in range(3):
            session.wait_for("> ")
            session.type('"""\n')
            session.wait_for(r"\. ")
            session.type('three\nfour"""\n')
            session.wait_for(STATUS)
        assert "too little of the context of 400 tokens is left" in session.plain
        session.wait_for("> ")
        session.type(CTRL_D)
        assert session.end() == 0
        assert "Traceback" not in session.seen
        print(session.plain)


def test_a_session_with_rich_and_prompt_toolkit(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("prompt_toolkit")
    command = [sys.executable, WORKER, "alphabet", str(tmp_path)]
    with Session(command, PROMPT_TOOLKIT_NO_CPR="1") as session:
        session.wait_for(r"\?25h.*\?25h")
        session.type("/to\t")
        session.wait_for("/tokens")
        session.type("\r")
        session.wait_for("tokens are used.*?25h")
        session.type("one\r")
        session.wait_for("abcdefgh")
        session.type(CTRL_C)
        session.wait_for(r"\(stopped.*?25h")
        session.type("/quit\r")
        assert session.end() == 0
        print(session.plain)


@pytest.fixture
def folder(tmp_path):
    args = tiny_args(vocab_size=BYTES_VOCAB, context_length=2048)
    write_meta(random_checkpoint(args, seed=3, dtype=torch.float32), tmp_path)
    write_tokenizer(tmp_path / "tokenizer.model")
    return tmp_path


def test_a_session_with_two_ranks(folder):
    """Rank 0 talks, the other follows; Ctrl-C stops both after the same token, or they hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", WORKER, "plain", "chat", "--ckpt_dir", str(folder), "--temperature", "0"]
    with Session(command) as session:
        session.wait_for("> ", 120)
        session.type("/set max_gen_len 8\n")
        session.wait_for("> ")
        session.type("Hello\n")
        _, new, prompt = session.wait_for(STATUS).groups()
        assert new == prompt
        session.wait_for("> ")
        session.type("/set max_gen_len none\n")
        session.wait_for("> ")
        session.type("Go on\n")
        session.wait_for("Go on\n[^\n]*?.{5}")
        session.type(CTRL_C)
        session.wait_for("stopped; what was said stays")
        session.wait_for(STATUS)
        session.wait_for("> ")
        session.type(f"/save {folder}/talk.json\n")
        session.wait_for("> ")
        session.type("/quit\n")
        assert session.end() == 0, session.seen
        print(session.plain)
    first, second = json.loads((folder / "talk.json").read_text())["messages"][1::2]
    alone = talk(
        Llama.build(folder, device="cpu"),
        "Hello",
        f"/set max_gen_len {len(second['ids'])}",
        "Go on",
        params=SamplingParams(temperature=0, max_tokens=8),
    )
    assert [exchange.answer for exchange in alone.talk.exchanges] == [first["ids"], second["ids"]]
