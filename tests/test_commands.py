"""The commands that answer once: complete, tokenize, perplexity, reshard; and chat's arguments."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_tokenizer

from llama import Llama
from llama.checkpoint import open_checkpoint, random_checkpoint, write_meta
from llama.commands.common import DEMO
from llama.names import shapes

ODD = ("1,2", "None", "{a: b}", '"x"', "[1]", "1e3", "True", "a b", "0x10", " x ", "é\n\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    args = tiny_args(vocab_size=BYTES_VOCAB, context_length=256)
    write_meta(random_checkpoint(args, dtype=torch.float32), path)
    write_tokenizer(path / "tokenizer.model")
    return path


# ---- complete


@pytest.mark.parametrize("text", ODD)
def test_complete_takes_text_as_typed_from_anywhere(shell, folder, tmp_path, text):
    given = ("--ckpt_dir", folder, "--max_gen_len", 8, "--json")
    file = tmp_path / "prompt"
    file.write_bytes(text.encode() + b"\n")
    answers = [
        shell("complete", text, *given),
        shell("complete", f"--text={text}", *given),
        shell("complete", *given, "--file", file),
        shell("complete", *given, stdin=text.encode() + b"\r\n"),
    ]
    assert {status for status, _, _ in answers} == {0}
    found = [json.loads(out) for _, out, _ in answers]
    assert found[0]["prompt"] == text
    assert found[1:] == [found[0]] * 3
    plain = Llama.build(folder).text_completion([text], max_gen_len=8, seed=1)[0]
    assert found[0]["generation"] == plain["generation"]


def test_complete_prints_the_continuation_and_one_line_end(shell, folder):
    arguments = ("complete", "ab", "--ckpt_dir", folder, "--max_gen_len", 20)
    found = json.loads(shell(*arguments, "--json")[1])
    assert found["tokens"] <= 20
    assert shell(*arguments) == (0, found["generation"] + "\n", "")


OPTIONS = {
    "max_gen_len": 3,
    "temperature": 0,
    "top_p": 0.1,
    "seed": 5,
    "max_seq_len": 30,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_complete_changes_something(shell, folder, name):
    base = {"max_gen_len": 40, "temperature": 1.0, "top_p": 1.0}

    def outcome(options):
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        return shell("complete", "ab", "--ckpt_dir", folder, "--json", *flags)[1]

    assert outcome(base) == outcome(base)
    assert outcome(base) != outcome(base | {name: OPTIONS[name]})


def test_stop_may_be_given_several_times_and_is_text_as_typed(shell, folder):
    arguments = ("complete", "ab", "--ckpt_dir", folder, "--max_gen_len", 200, "--json")
    whole = json.loads(shell(*arguments)[1])["generation"]
    first, second = whole[20:22], whole[10:12]
    for flags in (["--stop", first, "--stop", second], [f"--stop={second}", f"--stop={first}"]):
        found = json.loads(shell(*arguments, *flags)[1])
        assert found["generation"] == whole[: min(whole.find(first), whole.find(second))]
        assert found["finish_reason"] == "stop"
    for text in ("1,2", '"x"'):
        assert json.loads(shell(*arguments, "--stop", text)[1])["generation"] in whole
    assert shell("complete", "ab", "--stop")[2] == "--stop needs a text after it\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "nowhere"], "nowhere: No such file or directory"),
        (["ab", "--file", "x"], "give either a text or --file"),
        (["ab", "--temperature", "-1"], "temperature is -1; it must be a number >= 0"),
        (["ab", "--top_p", "0"], "top_p is 0; it must be a number > 0 and <= 1"),
        (["ab", "--max_gen_len", "-1"], "--max_gen_len is -1; it must be a whole number above 0"),
        (["ab", "--max_gen_len", "1.5"], "--max_gen_len is 1.5; it must be a whole number"),
        (["ab", "--seed", "x"], "--seed is 'x'; it must be a whole number"),
        (["ab", "--stop", ""], "stop is ('',); it must be a string or several, none of them empty"),
        (["ab", "--json", "3"], "--json is 3; it must be True or False"),
        (["ab", "--dtype", "int8"], "dtype='int8': use one of float32, bfloat16, float16"),
        (["x" * 300], "prompt 0: the prompt has 301 tokens and max_seq_len is 256"),
    ],
)
def test_complete_says_what_is_wrong_in_one_line(shell, folder, arguments, message):
    status, out, error = shell("complete", *arguments, "--ckpt_dir", folder)
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_bytes_that_are_no_text_are_named(shell, folder, tmp_path):
    (tmp_path / "x").write_bytes(b"ab\xffc")
    _, _, error = shell("complete", "--ckpt_dir", folder, "--file", tmp_path / "x")
    assert error == f"{tmp_path / 'x'} is not UTF-8 text: byte 2 is 0xff\n"
    _, _, error = shell("complete", "--ckpt_dir", folder, stdin=b"\xfe")
    assert error == "standard input is not UTF-8 text: byte 0 is 0xfe\n"


# ---- tokenize


@pytest.mark.parametrize("text", ODD)
def test_tokenize_and_back(shell, folder, text):
    status, out, _ = shell("tokenize", text, "--ckpt_dir", folder, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["text"] == text
    assert bytes(found["ids"]).decode() == text  # a tokenizer of bytes
    assert found["count"] == len(found["ids"]) == len(found["pieces"])
    for ids in (",".join(map(str, found["ids"])), " ".join(map(str, found["ids"]))):
        back = shell("tokenize", "--decode", ids, "--tokenizer_path", folder / "tokenizer.model")
        assert back == (0, text + "\n", "")


def test_tokenize_shows_a_line_for_each_token(shell, folder, tmp_path):
    file = tmp_path / "text"
    file.write_bytes("aé\r\n".encode())
    expected = '    256  "<|begin_of_text|>"\n     97  "a"\n    195  "\\\\xc3"\n'
    expected += '    169  "\\\\xa9"\n     13  "\\r"\n     10  "\\n"\n'
    arguments = ("tokenize", "--ckpt_dir", folder, "--bos")
    assert shell(*arguments, "--file", file) == (0, expected, "")
    assert shell(*arguments, stdin=file.read_bytes()) == (0, expected, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "1,x"], "--decode has 'x'; it must be token ids, as in 1,2 or 1 2"),
        (["--decode", "-1"], "--decode has '-1'; it must be token ids"),
        (["--decode", "99999"], "token id 99999 is outside the vocabulary, 0 to 511"),
        (["a", "--decode", "1"], "give either a text or --decode"),
        (["a", "--file", "b"], "give either a text or --file"),
        (["--file", "nowhere"], "nowhere: No such file or directory"),
    ],
)
def test_tokenize_says_what_is_wrong(shell, folder, arguments, message):
    status, out, error = shell("tokenize", "--ckpt_dir", folder, *arguments)
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_tokenize_looks_for_its_file(shell, folder, tmp_path):
    assert shell("tokenize", "a", "--ckpt_dir", tmp_path)[2].startswith("no tokenizer.model in ")
    (tmp_path / "original").symlink_to(folder)
    assert shell("tokenize", "a", "--ckpt_dir", tmp_path)[0] == 0


# ---- perplexity


def test_perplexity_prints_what_it_did(shell, folder, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(("To be, or not to be. " * 30).encode())
    status, out, _ = shell("perplexity", folder, file, "--window", 64)
    assert status == 0
    assert out.startswith("text             630 tokens, 630 bytes\n")
    assert "windows          of 64 tokens, moved on by 32\n" in out
    other = shell("perplexity", folder, file, "--window", 64, "--stride", 8)[1]
    assert "moved on by 8\n" in other
    assert other.splitlines()[2:] != out.splitlines()[2:]
    assert "windows          of 256 tokens" in shell("perplexity", folder, file)[1]
    for flags, message in (
        (["--window", 64, "--stride", 64], "stride is 64; it must be from 1 to 63"),
        (["--window", 512], "max_seq_len=512: the model's context is 256 tokens"),
        (["--window", 1], "window is 1; it must be at least 2 tokens"),
        (["--stride", "half"], "--stride is 'half'; it must be a whole number or None"),
    ):
        status, out, error = shell("perplexity", folder, file, *flags)
        assert (status, out) == (1, "")
        assert error == f"{message}{error[len(message) :]}"
    file.write_bytes(b"")
    assert shell("perplexity", folder, file)[2].startswith("the text is empty")
    assert shell("perplexity", folder, tmp_path / "no")[2].endswith(
        "no: No such file or directory\n"
    )


# ---- reshard


def tensors(folder):
    checkpoint = open_checkpoint(folder)
    return {name: tensor.read().clone() for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_reshard_there_and_back_is_the_same_and_its_checklist_holds(shell, tmp_path, tied):
    args = tiny_args(vocab_size=BYTES_VOCAB, tied=tied)
    write_meta(random_checkpoint(args), tmp_path / "a", shards=2)
    write_tokenizer(tmp_path / "a" / "tokenizer.model")
    assert shell("reshard", tmp_path / "a", tmp_path / "b", "--shards", 8)[0] == 0
    assert shell("reshard", tmp_path / "b", tmp_path / "c/d", "--shards", 1)[0] == 0
    for folder, shards in ((tmp_path / "b", 8), (tmp_path / "c/d", 1)):
        names = {f"consolidated.{n:02}.pth" for n in range(shards)}
        others = {"params.json", "tokenizer.model"}
        assert {file.name for file in folder.iterdir()} == names | others | {"checklist.chk"}
        listed = dict(
            reversed(line.split("  "))
            for line in (folder / "checklist.chk").read_text().splitlines()
        )
        assert set(listed) == names | others
        for name, digest in listed.items():
            assert hashlib.md5((folder / name).read_bytes()).hexdigest() == digest
        before, after = tensors(tmp_path / "a"), tensors(folder)
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_reshard_casts(shell, folder, tmp_path):
    assert shell("reshard", folder, tmp_path / "x", "--shards", 2, "--dtype", "bfloat16")[0] == 0
    before, after = tensors(folder), tensors(tmp_path / "x")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)


def test_convert_does_what_reshard_does(shell, folder, tmp_path):
    short = shell("reshard", folder, tmp_path / "a", 2, "--dtype", "bfloat16")
    assert short[0] == 0
    long = shell("convert", folder, tmp_path / "b", "--to", "meta", "--shards", 2, "--dtype=bf16")
    assert (long[0], long[2]) == (0, "")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["onnx"], "format 'onnx': use one of meta, hf, gguf"),
        (["hf", "--quantize", "int8"], "quantize='int8': hf is written unquantized; use meta or"),
        (["gguf", "--quantize", "int8"], "quantize='int8': for gguf use one of q8_0, q4_0"),
        (["gguf", "--type", "q5_k"], "quantize='q5_k': for gguf use one of q8_0, q4_0"),
        (["meta", "--quantize", "q8_0"], "quantize='q8_0': use one of int8, "),
        (["meta", "--quantize=int8", "--shards=2"], "shards=2: quantized weights are one file"),
        (["meta", "--quantize=int8", "--dtype=f32"], "dtype='f32': beside quantized weights"),
        (["meta", "--device", "cpu"], "device='cpu': only --to meta with --quantize computes"),
        (["hf", "--shards", "2"], "shards=2: only Meta's format is cut into shards"),
    ],
)
def test_convert_says_what_does_not_go_together(shell, folder, tmp_path, flags, message):
    status, out, error = shell("convert", folder, tmp_path / "x", *flags)
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert not (tmp_path / "x").exists()


def test_a_written_shard_is_what_torch_save_would_have_written(tmp_path):
    args = tiny_args(vocab_size=BYTES_VOCAB, tied=True)
    write_meta(random_checkpoint(args), tmp_path)
    file = tmp_path / "consolidated.00.pth"
    assert zipfile.ZipFile(file).testzip() is None
    plain = torch.load(file, weights_only=True)
    mapped = torch.load(file, weights_only=True, mmap=True)
    assert plain["output.weight"].data_ptr() == plain["tok_embeddings.weight"].data_ptr()
    assert {name: tensor.shape for name, tensor in plain.items()} == shapes(args)
    torch.save(plain, tmp_path / "saved.pth")
    for name, tensor in torch.load(tmp_path / "saved.pth").items():
        assert torch.equal(tensor, plain[name])
        assert torch.equal(tensor, mapped[name])
        assert tensor.stride() == mapped[name].stride()
        assert mapped[name].data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full", "--shards", "2"], "full is not empty; give a new or empty folder"),
        (["file", "--shards", "2"], "file is a file; give a new or empty folder"),
        (["left", "--shards", "2"], "left.part is left of a run that was interrupted; remove it"),
        (["new", "--shards", "3"], "shards=3: does not divide this model; these do: [1, 2, 4, 8"),
        (["new", "--shards", "0"], "shards=0: does not divide this model"),
        (["new", "--shards", "two"], "--shards is 'two'; it must be a whole number"),
        (["new", "--shards", "2", "--dtype", "int4"], "dtype='int4': use one of float32"),
    ],
)
def test_reshard_says_what_is_wrong_and_writes_nothing(
    shell, folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/x").touch()
    Path("file").touch()
    Path("left.part").mkdir()
    status, out, error = shell("reshard", folder, *arguments)
    assert (status, out) == (1, "")
    assert error.startswith(message)
    assert sorted(map(str, Path().rglob("*"))) == ["file", "full", "full/x", "left.part"]


def test_reshard_needs_the_room(shell, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    error = shell("reshard", folder, tmp_path / "x/y", "--shards", 1)[2]
    assert "GB, and its disk has 0.0 GB free" in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_reshard_that_is_interrupted_leaves_nothing(shell, folder, tmp_path, monkeypatch, error):
    def fail(folder, advance):
        raise error

    monkeypatch.setattr("llama.checkpoint.meta.reshard.write_checklist", fail)
    assert shell("reshard", folder, tmp_path / "x", "--shards", 1)[0] != 0
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from llama.commands.convert import reshard
rename = Path.replace
def replace(part, final):
    rename(part, final)
    if final.name == "params.json":  # the last one
        os._exit(9)
Path.replace = replace
reshard(sys.argv[1], sys.argv[2], 2)
"""


def test_reshard_that_is_killed_leaves_nothing_that_looks_finished(folder, tmp_path):
    command = [sys.executable, "-c", KILLED, folder, tmp_path / "x"]
    assert subprocess.run(command, check=False).returncode == 9
    assert [file.name for file in tmp_path.iterdir()] == ["x.part"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_reshard_holds_a_tensor_at_a_time(tmp_path):
    args = tiny_args(dim=512, n_layers=6, vocab_size=BYTES_VOCAB, hidden_dim=8192)
    write_meta(random_checkpoint(args, dtype=torch.float32), tmp_path / "a", shards=2)
    total = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from llama.checkpoint.meta import pth_write as pth\n"
        "from llama.commands.convert import reshard\n"
        "def anonymous():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', status)[1]) << 10\n"
        "most, plain = 0, pth._write\n"
        "def write(*args):\n"
        "    global most\n"
        "    plain(*args)\n"
        "    most = max(most, anonymous())\n"
        "pth._write, before = write, anonymous()\n"
        "reshard(sys.argv[1], sys.argv[2], 1)\n"
        "print((most - before) / 2**20)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held = float(done.stdout.split()[-1])
    print(f"{total / 2**20:.0f} MiB written, {held:.0f} MiB held")
    assert held < 100 < 300 < total / 2**20


# ---- chat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1; it must be a number >= 0"),
        (["--temperature", "warm"], "--temperature is 'warm'; it must be a number"),
        (["--max_gen_len", "-2"], "--max_gen_len is -2; it must be a whole number above 0"),
        (["--max_seq_len", "512"], "max_seq_len=512: the model's context is 256 tokens"),
        (["--tokenizer_path", "nowhere"], "no tokenizer file at nowhere"),
        (["--device", "abacus"], "device='abacus': use cuda, cuda:N, mps or cpu"),
    ],
)
def test_chat_says_what_is_wrong_before_it_begins(shell, folder, arguments, message):
    status, out, error = shell("chat", "--ckpt_dir", folder, *arguments)
    assert (status, out) == (1, "")
    assert error.startswith(message)


def test_chat_through_a_pipe(shell, folder):
    flags = ("--ckpt_dir", folder, "--max_gen_len", 6, "--max_seq_len", 128)
    typed = b'/set temperature 0\nHello\n"""\nseveral\nlines\n"""\n/system None\n\n1,2\n/nope\n'
    status, out, error = shell("chat", *flags, "--system", "{a: b}", stdin=typed)
    assert status == 1  # for /nope
    assert shell("chat", *flags, stdin=typed.removesuffix(b"/nope\n"))[0] == 0
    assert error.count("(cut here: max_gen_len is 6)") + out.count("\n") >= 3
    assert "(system prompt, 16 tokens: None)" in error
    assert "/nope is no command" in error
    assert shell("chat", *flags, "--temperature", 0, stdin=b"Hello")[1].endswith("\n")
    seeds = {shell("chat", *flags, "--seed", n, stdin=b"Hello")[1] for n in range(4)}
    assert len(seeds) > 1


def test_a_reader_who_leaves_ends_a_command_without_words(folder):
    command = [sys.executable, "-m", "llama", "complete", "ab", "--ckpt_dir", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_verify_names_the_files_that_differ(shell, tmp_path):
    status, out, err = shell("verify")  # the demo
    assert (status, err) == (0, "")
    assert "all files are what the checklist says" in out
    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (copy / "params.json").write_text("{}")
    status, out, err = shell("verify", copy)
    assert (status, out) == (1, "")
    assert "params.json does not match" in err
