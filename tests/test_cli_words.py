"""The words of a command line: none is dropped, none taken for what it is not."""

import inspect
import re
import subprocess
import sys

import pytest

import llama
from llama.commands import COMMANDS
from llama.commands.common import DEMO, OPTIONS
from llama.terminal.signature import Signature, UsageError

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


@pytest.fixture
def either(shell, tmp_path, monkeypatch):
    """A function that types words after a command of [CKPT_DIR] [TEXT]: what it takes them for, or
    its sentence. The folder `there` exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    got = []

    def do(ckpt_dir: str = "demo", text: str | None = None, *, file: str | None = None,
           json: bool = False) -> None:  # fmt: skip
        got.append((ckpt_dir, text))

    def run(*words):
        got.clear()
        status, _, error = shell("do", *words, commands={"do": do})
        assert bool(got) == (status == 0)
        return got[0] if got else error

    return run


def test_a_word_by_position_is_the_text_and_of_two_the_first_is_the_folder(either):
    assert either() == ("demo", None)
    assert either("hello") == either("--json", "hello") == ("demo", "hello")
    assert either("there") == either("--", "there") == ("demo", "there")
    for words in (
        ("there", "hello"),
        ("hello", "there"),  # as it was before
        ("--ckpt_dir", "there", "hello"),
        ("hello", "--ckpt_dir", "there"),
        ("--text", "hello", "there"),
        ("there", "--text", "hello"),
        ("there", "--", "hello"),
        ("there", "--json", "hello"),
    ):
        assert either(*words) == ("there", "hello")
    assert either("there", "there") == ("there", "there")
    assert either("there", "--file", "x") == ("there", None)
    assert either("hello", "--file", "x") == ("demo", "hello")
    assert either("there", "-") == ("there", "-")
    for odd in ("x" * 5000, "a\0b", "a\udcff"):
        assert either(odd) == ("demo", odd)
        assert either("there", odd) == ("there", odd)


def test_words_that_are_neither_folder_nor_text_are_named(either):
    assert either("hello", "nowhere") == (
        "neither 'hello' nor 'nowhere' is a folder or a file, and do takes [CKPT_DIR] [TEXT]: put "
        "words that belong together in quotes\n"
    )
    assert either("the", "capital", "of").startswith(
        "'of' is one word more than do takes (CKPT_DIR TEXT): put words that belong together in "
    )
    assert either("--text", "hello", "world").startswith("'world' is one word more than do takes")
    assert either("--ckpt_dir", "there", "a", "b").startswith("'b' is one word more than do takes")


def test_the_folder_comes_first_or_after_the_text_as_before(shell, tmp_path):
    expected = shell("tokenize", "hello", "--ckpt_dir", DEMO)
    assert expected[0] == 0
    for words in (("hello", DEMO), (DEMO, "hello"), ("hello",), ("--text", "hello", DEMO)):
        assert shell("tokenize", *words) == expected
    expected = shell("complete", "hello", "--max_gen_len", 2, "--ckpt_dir", DEMO)
    assert expected[0] == 0
    for words in (("hello", DEMO), (DEMO, "hello"), ("hello",)):
        assert shell("complete", *words, "--max_gen_len", 2) == expected
    status, _, error = shell("tokenize", "hello", tmp_path / "nowhere")
    assert status == 2
    assert error.startswith("neither 'hello' nor ")


# Words as they were before, and what they are now: (command, before, now)
SPELLINGS = [
    ("convert", ["a", "b", "hf"], ["a", "b", "--to", "hf"]),
    ("convert", ["--src", "a", "--dst", "b", "--format=hf"], ["a", "b", "--to", "hf"]),
    ("convert", ["a", "b", "-f", "gguf"], ["--ckpt_dir=a", "--dst=b", "--to=gguf"]),
    ("convert", ["a", "b", "gguf", "--type=q8_0"], ["a", "b", "gguf", "--quantize", "q8_0"]),
    ("convert", ["a", "b", "gguf", "-t", "q8_0"], ["a", "b", "gguf", "--quantize", "q8_0"]),
    ("reshard", ["--src", "a", "b", "2"], ["a", "b", "--shards", "2"]),
    ("reshard", ["a", "b", "2"], ["--ckpt_dir", "a", "--dst", "b", "--shards", "2"]),
    ("quantize", ["--src", "a", "b", "int8"], ["a", "b", "--quantize", "int8"]),
    ("quantize", ["-s", "a", "b", "int8"], ["--ckpt_dir", "a", "b", "--quantize", "int8"]),
    ("perplexity", ["a", "b"], ["--ckpt_dir", "a", "--text_file", "b"]),
    ("info", ["a"], ["--ckpt_dir", "a"]),
    ("chat", ["a"], ["-c", "a"]),
    ("bench", ["a"], ["--ckpt-dir", "a"]),
    ("verify", ["a"], ["--ckpt_dir", "a"]),
]


@pytest.mark.parametrize(("name", "before", "now"), SPELLINGS)
def test_what_was_typed_before_is_still_read(name, before, now):
    signature = Signature(COMMANDS[name], name, COMMANDS.entries[name].old)
    assert sorted(signature.arranged(before)) == sorted(signature.arranged(now))


def test_an_old_name_and_its_new_one_are_the_same_option():
    signature = Signature(COMMANDS["convert"], "convert", COMMANDS.entries["convert"].old)
    with pytest.raises(UsageError, match="--ckpt_dir is given twice: 'a' and 'b'"):
        signature.arranged(["--src", "a", "--ckpt_dir", "b"])
    with pytest.raises(UsageError, match="--quantize needs a text after it"):
        signature.arranged(["a", "b", "--type"])


def test_every_command_takes_ckpt_dir_first():
    for name, command in COMMANDS.items():
        if name != "download":  # which takes the name of a model
            assert next(iter(inspect.signature(command).parameters)) == "ckpt_dir", name


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
    for name, command in COMMANDS.items():
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


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_a_page_on_standard_output_with_every_option(shell, name, flag):
    status, out, error = shell(name, flag)
    assert (status, error) == (0, "")
    assert shell(name, "--nonsense", flag) == (status, out, error)
    for word in inspect.signature(COMMANDS[name]).parameters:
        row = next(row for row in out.splitlines() if row.startswith(f"  --{word} "))
        assert len(row) > 30, "what the docstring says of it"
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_says_how_a_command_is_called_and_nothing_of_python(shell, name):
    page = shell(name, "--help")[1]
    assert page.startswith(f"python -m llama {name} ")
    assert COMMANDS.entries[name].says in page
    assert not re.search(r"FIRE|Optional|None\]|<|>|Args:|str \||\bNoneType|\\n", page)
    assert re.search(r"^  --debug +show where an error comes from$", page, re.M)
    for old, new in COMMANDS.entries[name].old.items():
        assert len(old) == 1 or f"--{old} for --{new}" in page


def test_what_commands_share_is_described_once_and_shown_on_each_page(shell):
    def plain(text):
        return re.sub(r"\s+", " ", text)

    shown = set()
    for name, command in COMMANDS.items():
        page = plain(shell(name, "--help")[1])
        own = inspect.getdoc(command).partition("Args:\n")[2]
        for word in OPTIONS.keys() & inspect.signature(command).parameters.keys():
            assert plain(OPTIONS[word]) not in plain(own), (name, word)
            if f"    {word}: " not in own:
                assert f"--{word} {plain(OPTIONS[word])}" in page
                shown.add(word)
    assert shown == OPTIONS.keys()


# ---- the list, the version, and what they do not wait for


def test_the_list_has_every_command_under_its_purpose_with_its_first_line(shell):
    status, listed, error = shell()
    assert (status, error) == (0, "")
    assert listed == shell("--help")[1] == shell("-h")[1]
    blocks = dict(re.findall(r"^(\w+):\n((?:  .*\n)+)", listed, re.M))
    named = {purpose: re.findall(r"^  (\w+)", block, re.M) for purpose, block in blocks.items()}
    assert named == {
        "talk": ["chat", "complete"],
        "look": ["info", "tokenize", "verify", "perplexity", "compare", "bench"],
        "make": ["download", "convert", "reshard", "quantize"],
    }
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(first_line(command))}$", listed, re.M), name
    assert max(map(len, listed.splitlines())) <= 100


def first_line(command):
    return inspect.getdoc(command).partition("\n")[0]


def test_the_version_is_that_of_setup_py(shell):
    assert shell("--version") == (0, f"llama {llama.__version__}\n", "")
    assert re.fullmatch(r"\d+\.\d+\.\d+", llama.__version__)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("comp", "did you mean complete or compare? "), ("perplxity", "did you mean perplexity? "),
        ("chats", "did you mean chat? "), ("zzz", ""),
    ],
)  # fmt: skip
def test_a_word_that_is_no_command_names_the_nearest(shell, word, meant):
    status, out, error = shell(word, "x", "--y")
    assert (status, out) == (2, "")
    assert error == f"there is no command {word}: {meant}it is one of {', '.join(COMMANDS)}\n"


WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(["torch", "fairscale", "tiktoken", "numpy"])  # importing one fails
from llama.commands import main
main()
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 0, "talk:"),
        (["--help"], 0, "talk:"),
        (["--version"], 0, "llama "),
        (["complte"], 2, "did you mean complete?"),
        (["verify", "--help"], 0, "checklist.chk"),
        (["verify", "--nope"], 2, "there is no option --nope"),
        (["verify"], 0, "all files are what the checklist says"),
        (["info", DEMO], 1, "torch"),
    ],
)
def test_what_needs_no_torch_runs_without_it(words, status, said):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


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
