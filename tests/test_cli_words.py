"""The words of a command line: none is dropped, none taken for what it is not."""

import inspect

import pytest

from llama import __main__

TEXTS = ("hello", "--hello", "-h", "-", "--", "--size=3", "-5", "True", "a\nb", "'", "--no-loud")


@pytest.fixture
def typed(shell):
    """A function that types words after a command: what the command got, or status and sentence."""
    got = []

    def do(text: str | None = None, *, size: int = 1, loud: bool = False, tag: str = "",
           share: float | None = 0.5, file: str | None = None, some: tuple[str, ...] = (),
           max_gen_len: int = 1) -> None:  # fmt: skip
        got.append({k: v for k, v in locals().items() if k != "got"})

    def run(*words):
        got.clear()
        status, out, error = shell("do", *words, commands={"do": do})
        assert (bool(got), out) == (status == 0, "")
        assert error.count("\n") == (status != 0)
        return got[0] if got else (status, error.rstrip("\n"))

    return run


@pytest.mark.parametrize("text", TEXTS)
def test_after_two_dashes_every_word_is_text_as_typed(typed, text):
    assert typed("--", text)["text"] == text
    assert typed("--size", "2", "--", text)["size"] == 2
    assert typed(f"--text={text}")["text"] == text
    assert typed(f"--tag={text}")["tag"] == text


def test_a_word_too_many_is_named_not_taken_for_an_option(typed):
    for words in (("hello", "world"), ("hello", "--", "world"), ("--text", "hello", "world")):
        status, error = typed(*words)
        assert status == 2
        assert error.startswith("'world' is one word more than do takes (TEXT): put words that")
    assert typed("--text", "a", "--text", "b")[1] == "--text is given twice: 'a' and 'b'"
    assert typed("--size=1", "--size", "1")[0] == 2
    assert typed("--some", "a", "--some=a")["some"] == ("a", "a")


def test_a_folder_after_the_text_is_the_one_with_the_weights(shell, tmp_path):
    status, out, _ = shell("tokenize", "hello", __main__.DEMO)
    assert (status, out) == shell("tokenize", "hello", "--ckpt_dir", __main__.DEMO)[:2]
    status, _, error = shell("tokenize", "hello", tmp_path / "nowhere")
    assert status == 2
    assert "is one word more than tokenize takes (TEXT)" in error


@pytest.mark.parametrize("words", [("--tag",), ("--tag", "--loud"), ("--tag", "--", "x")])
def test_an_option_without_its_value_says_what_it_needs(typed, words):
    status, error = typed(*words)
    assert status == 2
    assert error.startswith("--tag needs a text after it")
    assert typed("--size", *words[1:])[1].startswith("--size needs a whole number after it")
    assert typed("--some", *words[1:])[1].startswith("--some needs a text after it")
    share = typed("--share", *words[1:])[1]
    assert share.startswith("--share needs a number or None after it")


def test_every_path_of_every_command_refuses_a_variable_that_was_not_set(shell):
    """`--ckpt_dir "$DIR"` with no DIR is not the folder one stands in."""
    tried = 0
    for name, command in __main__.COMMANDS.items():
        for word, one in inspect.signature(command).parameters.items():
            if "str" in str(one.annotation) and word.endswith(
                ("dir", "path", "file", "src", "dst")
            ):
                needed = [f"--{w}=1" for w, p in inspect.signature(command).parameters.items()
                          if p.default is p.empty and w != word]  # fmt: skip
                status, out, error = shell(name, *needed, f"--{word}=")
                assert (status, out) == (1, "")
                assert error == f"--{word} is empty; it must be the name of a file or folder\n"
                tried += 1
    assert tried > 15


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True), ("True", True), ("false", False), ("FALSE", False), ("no", False),
        ("yes", True), ("off", False), ("on", True),
    ],
)  # fmt: skip
def test_switches_take_words_for_yes_and_no(typed, word, value):
    assert typed(f"--loud={word}")["loud"] is value
    assert typed("a", f"--loud={word}") == typed(f"--loud={word}", "a")
    if word.lower() in ("true", "false"):
        assert typed("--loud", word)["loud"] is value


def test_a_switch_leaves_the_text_after_it(typed):
    for text in ("hello", "3", "1,2", "yes"):
        got = typed("--loud", text)
        assert (got["loud"], got["text"]) == (True, text)
    assert typed("--loud")["loud"] is True
    assert typed("--no-loud", "hello") == typed("--noloud", "hello") == typed("hello")
    assert typed("--no-loud=3")[1] == "--no-loud takes no value: it is --no-loud or --loud"
    assert typed("hello", "--loud", "3")[1] == "--loud is 3; it must be True or False"


@pytest.mark.parametrize(
    ("text", "number"), [("1e1", 10), ("10.0", 10), ("0x10", 16), ("1_000", 1000), ("-3", -3)]
)
def test_whole_numbers_may_be_written_in_other_ways(typed, text, number):
    for words in (("--size", text), (f"--size={text}",)):
        got = typed(*words)["size"]
        assert (type(got), got) == (int, number)
    assert typed("--share", text)["share"] == number


@pytest.mark.parametrize(
    "text", ["1.5", "1e400", "nan", "-inf", "two", "", "(", "[" * 99, "9" * 200]
)
def test_what_is_no_whole_number_is_one_sentence(typed, text):
    status, error = typed(f"--size={text}")
    assert status == 1
    assert error.startswith("--size is ")
    assert error.endswith("; it must be a whole number")
    assert len(error) < 140


def test_none_is_none_for_numbers_and_text_for_text(typed):
    assert typed("--share", "none")["share"] is typed("--share=None")["share"] is None
    assert typed("None", "--tag", "none")["tag"] == "none"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--siz", "--size"), ("--sise", "--size"), ("-t", "--text or --tag"), ("--te", "--text"),
        ("--max_tokens", "--max_gen_len"), ("--prompt", "--text"), ("--gen", "--max_gen_len"),
        ("--s", "--size, --share or --some"), ("--files", "--file"), ("--max-gen", "--max_gen_len"),
    ],
)  # fmt: skip
def test_an_unknown_flag_names_the_nearest(typed, flag, meant):
    for words in ((flag, "0"), (f"{flag}=0",), ("hello", flag)):
        status, error = typed(*words)
        assert status == 2
        assert error.startswith(
            f"there is no option {flag}: did you mean {meant}? do takes --text,"
        )
    assert typed("--elsewhere")[1].startswith("there is no option --elsewhere: do takes --text, ")


def test_one_letter_stands_for_the_only_option_that_begins_with_it(typed):
    assert typed("-l")["loud"] is True
    assert typed("-f", "x")["file"] == "x"
    assert typed("-m=3")["max_gen_len"] == 3


def test_commands_are_named(shell):
    def do(first: str, second: int, third: str = "") -> None:
        """Does it.

        Args:
            first: one thing,
                and more of it.
            third: another.
        """

    status, out, error = shell("doo", commands={"do": do})
    assert (status, out) == (2, "")
    assert error == "there is no command doo: did you mean do? it is one of do\n"
    assert shell("--first", "x", commands={"do": do})[0] == 2
    told = shell("do", commands={"do": do})
    assert told == (2, "", "do needs --first and --second; --help says what may be given\n")
    for words in ((), ("--help",), ("-h",)):
        assert "  do          Does it.\n" in shell(*words, commands={"do": do})[1]


@pytest.mark.parametrize("name", __main__.COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_a_page_on_standard_output_with_every_option(shell, name, flag):
    status, out, error = shell(name, flag)
    assert (status, error) == (0, "")
    assert shell(name, "--nonsense", flag) == (status, out, error)
    for word in inspect.signature(__main__.COMMANDS[name]).parameters:
        row = next(row for row in out.splitlines() if row.startswith(f"  --{word} "))
        assert len(row) > 30, "what the docstring says of it"
    assert max(map(len, out.splitlines())) <= 100


# ---- complete and tokenize


def test_a_dash_or_nothing_is_standard_input(shell):
    texts = ["The capital of Italy is", "- a", "--x"]
    for text in texts:
        given = ("--json", "--max_gen_len", "3")
        expected = shell("complete", *given, "--", text)
        assert expected[0] == 0
        for words in (("-",), (), ("--file", "-"), ("--text", "-")):
            assert shell("complete", *given, *words, stdin=text.encode() + b"\n") == expected
        for words in (("-",), (), ("--file=-",)):
            told = shell("tokenize", "--json", *words, stdin=text.encode())
            assert told == shell("tokenize", "--json", "--", text)


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n"])
def test_an_empty_beginning_is_one_sentence_where_it_was_not_typed(shell, tmp_path, data):
    file = tmp_path / "empty"
    file.write_bytes(data)
    for words, where in (
        ((), "standard input"),
        (("-",), "standard input"),
        (("--file", file), file),
    ):
        status, out, error = shell("complete", *words, stdin=data)
        assert (status, out) == (1, "")
        assert error.startswith(f"{where} is empty: give a text")
    assert shell("complete", "", "--max_gen_len", 2)[0] == 0
    assert shell("tokenize", stdin=data)[0] == 0


def test_bytes_of_the_shell_that_are_no_text_are_named(shell):
    odd = "a\udcff"  # how Python hands on the byte 0xff
    for words, what in (
        (("complete", odd), "the text"),
        (("complete", "a", "--stop", odd), "--stop"),
        (("tokenize", odd), "the text"),
        (("chat", "--system", odd), "--system"),
    ):
        assert shell(*words) == (1, "", f"{what} is not UTF-8 text: its byte 0xff is none\n")
