"""Checklists: what matches passes, whatever does not is named, and nothing else is touched."""

import ast
import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llama.files import checklist as module
from llama.files.checklist import verify

FILES = {
    "consolidated.00.pth": b"first shard" * 999,
    "consolidated.01.pth": b"second shard" * 999,
    "params.json": b"{}",
}


def line(name, algorithm="md5", mark="  "):
    return f"{hashlib.new(algorithm, FILES[Path(name).name]).hexdigest()}{mark}{name}\n"


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checklist.chk").write_text("".join(map(line, FILES)))
    return tmp_path


def test_all_is_well(folder):
    for name in ("LICENSE", "USE_POLICY.md", "README.md", "tokenizer.model"):
        (folder / name).write_text("not listed, and not a shard")
    assert verify(folder) == []
    assert verify(str(folder)) == []


@pytest.mark.parametrize("lines", [
    [line(n, "sha256") for n in FILES],
    [line("consolidated.00.pth"), line("consolidated.01.pth", "sha256"), line("params.json")],
    [line(n, mark=" *") for n in FILES],
    [line(f"./{n}") for n in FILES],
    [line(n).replace("\n", "\r\n") for n in FILES],
    [line(n).split()[0].upper() + f"\t{n}\n\n" for n in FILES],
    ["\ufeff", *map(line, FILES), *map(line, FILES)],
], ids=["sha256", "both", "binary mark", "paths", "crlf", "upper case", "twice"])  # fmt: skip
def test_forms_of_a_checklist(folder, lines):
    (folder / "checklist.chk").write_text("".join(lines), encoding="utf-8")
    assert verify(folder) == []
    (folder / "consolidated.01.pth").write_bytes(b"other")
    (problem,) = verify(folder)
    assert problem.startswith(f"{folder / 'consolidated.01.pth'} does not match: its ")


def test_original_is_found(folder, tmp_path_factory):
    """What `hf download --include "original/*"` leaves; in its cache the files are links."""
    outer = tmp_path_factory.mktemp("hf")
    (outer / "original").mkdir()
    for path in folder.iterdir():
        (outer / "original" / path.name).symlink_to(path)
    assert verify(outer) == []
    (folder / "params.json").unlink()
    (problem,) = verify(outer)
    assert problem == f"{outer / 'original' / 'params.json'} is missing; checklist.chk lists it"


def test_every_problem_is_named_in_order(folder):
    (folder / "consolidated.00.pth").unlink()
    shard = bytearray(FILES["consolidated.01.pth"])
    shard[-1] ^= 1
    (folder / "consolidated.01.pth").write_bytes(shard)
    (folder / "params.json").unlink()
    (folder / "params.json").mkdir()
    (folder / "consolidated.02.pth").write_bytes(b"of another model")
    (folder / "consolidated.00.pth.part").write_bytes(b"fir")
    says = [problem.removeprefix(f"{folder}/") for problem in verify(folder)]
    got = hashlib.md5(shard).hexdigest()
    assert says == [
        "consolidated.00.pth is missing; checklist.chk lists it",
        "consolidated.00.pth.part is unfinished; run the same download again to go on",
        f"consolidated.01.pth does not match: its MD5 is {got}, checklist.chk says "
        f"{line('consolidated.01.pth').split()[0]}; download it again",
        "consolidated.02.pth is in no checklist; remove it if it is of another model",
        "params.json is not a file; remove it and download the file again",
    ]


def test_the_tokenizers_own_checklist_counts(folder):
    (folder / "tokenizer.model").write_bytes(b"pieces")
    digest = hashlib.md5(b"pieces").hexdigest()
    (folder / "tokenizer_checklist.chk").write_text(f"{digest}  tokenizer.model\n")
    assert verify(folder) == []
    (folder / "tokenizer.model").write_bytes(b"others")
    (problem,) = verify(folder)
    assert f"tokenizer_checklist.chk says {digest}" in problem


def test_empty_and_cut_off_files_do_not_match(folder):
    (folder / "consolidated.00.pth").write_bytes(b"")
    (folder / "consolidated.01.pth").write_bytes(FILES["consolidated.01.pth"][:-1])
    first, second = verify(folder)
    assert f"its MD5 is {hashlib.md5(b'').hexdigest()}" in first
    assert "consolidated.01.pth does not match" in second


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    right = Path.open

    def fail(path, *args, **kwargs):
        if path.name in FILES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return right(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    assert [p.removeprefix(f"{folder}/") for p in verify(folder)] == [
        f"{name} cannot be read: Input/output error" for name in FILES
    ]


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../params.json", "a/../../params.json", "..", ".", "..\\params.json",
])  # fmt: skip
def test_a_path_outside_the_folder_is_refused_before_anything_is_read(folder, name):
    checklist = folder / "checklist.chk"
    checklist.write_text(line("params.json") + line("params.json").replace("params.json", name))
    with pytest.raises(ValueError, match=r"line 2, names .* which is not in its folder"):
        verify(folder)


@pytest.mark.parametrize("text", [
    "<!DOCTYPE html>\n<html></html>\n",
    "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "0123456789abcdef  params.json\n",
    "d41d8cd98f00b204e9800998ecf8427e\n",
    "g41d8cd98f00b204e9800998ecf8427e  params.json\n",
    "\x00\x01\x02",
])  # fmt: skip
def test_a_checklist_that_is_none(folder, text):
    (folder / "checklist.chk").write_text(text)
    with pytest.raises(ValueError, match=r"checklist\.chk, line 1, is not 'checksum  file'"):
        verify(folder)


def test_a_checklist_that_is_empty_or_contradicts_itself(folder):
    (folder / "checklist.chk").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty; download the checklist again"):
        verify(folder)
    (folder / "checklist.chk").write_text(f"{'0' * 32}  params.json\n{'1' * 32}  params.json\n")
    with pytest.raises(ValueError, match=r"lists params.json as 1+, and checklist.chk as 0+"):
        verify(folder)


def test_no_folder_and_no_checklist(folder):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; the folder that holds"):
        verify(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"params\.json is not a folder"):
        verify(folder / "params.json")
    (folder / "checklist.chk").unlink()
    with pytest.raises(FileNotFoundError, match=r"checklist\.chk is missing"):
        verify(folder)


def test_files_are_read_side_by_side_and_counted(folder, monkeypatch):
    """Two shards are being read at the same time, and the bytes counted are the bytes there are."""
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    both = threading.Barrier(2, timeout=10)
    counted = []
    original = module._check_file

    def check(path, *args):
        if path.suffix == ".pth":
            both.wait()
        return original(path, *args)

    class Counter:
        def __init__(self, desc, total, unit):
            self.total = total

        def __enter__(self):
            counted.append(-self.total)
            return counted.append

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(module, "_check_file", check)
    monkeypatch.setattr(module, "progress", Counter)
    assert verify(folder) == []
    assert sum(counted) == 0
    assert -counted[0] == sum(map(len, FILES.values()))


def test_reads_in_blocks(folder, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 1000)
    assert verify(folder) == []


def test_nothing_is_written(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from llama.files.checklist import verify; verify({str(folder)!r})",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""  # no terminal, no progress
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_it_knows_no_torch():
    tree = ast.parse(Path(module.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}  # fmt: skip
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} == {
        "llama.terminal.progress"
    }
