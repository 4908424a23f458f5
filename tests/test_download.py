"""download.sh and `python -m llama download` against a server that misbehaves.

Most of the cases run what is behind both in this process; some run the script itself, with nothing
but python3 on its PATH. `python tests/test_download.py` prints the table: what the server did, what
the user saw, the exit status, what lay on disk afterwards.
"""

import ast
import base64
import hashlib
import http.server
import io
import json
import os
import random
import re
import select
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import (
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from unittest.mock import Mock

import pytest
from pseudo_terminal import CTRL_C, Session

from llama.commands import download as program
from llama.download import models as table_of_models
from llama.download import server as network
from llama.download.models import matching
from llama.download.url import clean_url, url_problem

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "download.sh"
FILE = ROOT / "llama" / "commands" / "download.py"
SHELLS = [shell for shell in ("sh", "bash", "dash") if shutil.which(shell)]

QUERY = "?Policy=x&Signature=y&Key-Pair-Id=z"
FOLDER = "Meta-Llama-3-8B-Instruct"
SHARD = "consolidated.00.pth"
SIZE = 40_000  # bytes of a shard
PAGE = b"\n<!DOCTYPE html>\n<html><body>Please log in</body></html>\n" + b" " * SIZE


def content(path):
    return random.Random(path).randbytes(SIZE if path.endswith(".pth") else 300)


def checklist(folder, names, algorithm="md5"):
    lines = (
        f"{hashlib.new(algorithm, content(f'{folder}/{n}')).hexdigest()}  {n}\n" for n in names
    )
    return "".join(lines).encode()


def model_files(at, shards, algorithm="md5"):
    names = [f"consolidated.{i:02d}.pth" for i in range(shards)] + ["params.json"]
    names.append("tokenizer.model")
    files = {f"{at}/{name}": content(f"{at}/{name}") for name in names}
    files[f"{at}/checklist.chk"] = checklist(at, names, algorithm)
    return files


def all_files():
    llama2 = model_files("llama-2-7b", 1)
    del llama2["llama-2-7b/tokenizer.model"]
    llama2["llama-2-7b/checklist.chk"] = checklist("llama-2-7b", [SHARD, "params.json"])
    tokenizer = content("tokenizer.model")
    return {
        "LICENSE": b"the terms of the weights\n",
        "USE_POLICY": b"the policy\n",
        "USE_POLICY.md": b"the policy\n",
        "tokenizer.model": tokenizer,
        "tokenizer_checklist.chk": f"{hashlib.md5(tokenizer).hexdigest()}  tokenizer.model\n"
        .encode(),
        **llama2,
        **model_files("8b_instruction_tuned", 1),
        **model_files("70b_pre_trained", 8),
        **model_files("Llama-3.1-8B", 1),  # under its newer path only
        **model_files("Llama-3.2-1B", 1, "sha256"),
    }  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """A GET does the next word that server.modes has for the file's name; the last one stays."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.server.log.append("HEAD")
        self.send_error(403)

    def do_GET(self):
        path = self.path.split("?")[0]
        path = re.sub("^http://[^/]*", "", path).lstrip("/")  # as a proxy is asked
        name = path.rsplit("/", 1)[-1]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else None
        self.server.log.append(f"{path} {start}" if asked else path)
        modes = self.server.modes.get(name) or self.server.modes.get("*") or ["ok"]
        mode, _, argument = (modes.pop(0) if len(modes) > 1 else modes[0]).partition(":")
        amount = int(argument or 0)
        body = self.server.files.get(path.removeprefix("elsewhere/"))
        if body is None:
            mode, amount = "status", amount if mode == "status" else 404
        if mode == "status":
            page = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"
            self.head(amount, len(page), "application/xml")
            self.wfile.write(page)
        elif mode == "drop":
            self.close_connection = True
        elif mode == "page":
            self.head(200, len(PAGE), "text/html; charset=utf-8")
            self.wfile.write(PAGE)
        elif mode in ("bare page", "text"):
            page = PAGE if mode == "bare page" else b"Bad gateway, come again\n"
            self.head(200, len(page), "binary/octet-stream")
            self.wfile.write(page)
        elif mode in ("redirect", "login") and not path.startswith("elsewhere/"):
            where = f"/elsewhere/{path}" if mode == "redirect" else "/LICENSE"
            if mode == "login":
                self.server.modes["LICENSE"] = ["page"]
            self.head(302, 5, "text/html", Location=where)
            self.wfile.write(b"moved")
        elif mode == "bare 416" and start is not None:
            self.head(416, 0, "text/plain")
        elif not mode.startswith("no range") and start is not None and start >= len(body):
            self.head(416, 0, "text/plain", **{"Content-Range": f"bytes */{len(body)}"})
        else:
            self.send_body(body, start, mode, amount)

    def send_body(self, body, start, mode, amount):
        if mode == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        whole = len(body)
        headers = {}
        if start is not None and not mode.startswith("no range"):
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            body = body[start:]
        length = len(body) + (amount if mode == "length" else 0)
        if mode.endswith("no length"):
            length, self.close_connection = None, True
        self.head(206 if headers else 200, length, "binary/octet-stream", **headers)
        if mode in ("truncate", "stall"):
            body = body[:amount]
            self.close_connection = True
        step = len(body) // 10 if mode == "slow" else max(len(body), 1)
        for i in range(0, min(len(body), length or len(body)), step):
            self.wfile.write(body[i : min(i + step, length or len(body))])
            self.wfile.flush()
            time.sleep(0.03 if mode == "slow" else 0)
        if mode == "length" and amount > 0:
            self.close_connection = True
        if mode == "stall":
            gone = select.select([self.connection], [], [], 20)[0]  # the client hangs up
            self.server.log.append("hung up" if gone else "still there")

    def head(self, status, length, kind, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


@contextmanager
def serving(modes=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # a client that hangs up is part of the game
    server.modes = {name: list(words) for name, words in (modes or {}).items()}
    server.log, server.files = [], all_files()
    server.url = f"http://127.0.0.1:{server.server_port}/*{QUERY}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Place:
    """A folder that looks like the project's, and a PATH on which python3 is all that there is."""

    def __init__(self, root):
        self.work, self.tools = root / "work", root / "bin"
        self.work.mkdir()
        (self.work / "LICENSE").write_text("the project's own\n")
        self.tools.mkdir()
        self.python(f'exec {sys.executable} -S -E "$@"')

    def python(self, text):
        (self.tools / "python3").write_text(f"#!{shutil.which('sh')}\n{text}\n")
        (self.tools / "python3").chmod(0o755)

    def start(self, *args, url=None, script=SCRIPT, shell="sh", **options):
        env = {"PATH": str(self.tools), "TERM": "xterm"}
        if url is not None:
            env["PRESIGNED_URL"] = url
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "cwd": self.work,
            **options,
        }
        return subprocess.Popen([shutil.which(shell), script, *args], env=env, **options)

    def script(self, *args, text="", **options):
        """Run the script: its status, and what the user saw."""
        child = self.start(*args, stdin=subprocess.PIPE, **options)
        out, _ = child.communicate(text.encode(), timeout=60)
        return child.returncode, out.decode()

    def run(self, *args, url=None, text="", env=None):
        """Run what the script runs, in this process: its status, and what the user saw."""
        saw = io.StringIO()
        env = {**(env or {}), **({} if url is None else {"PRESIGNED_URL": url})}
        with ExitStack() as stack:
            typed = stack.enter_context(tempfile.TemporaryFile("w+"))
            typed.write(text)
            typed.seek(0)
            stack.enter_context(mock.patch.dict(os.environ, env, clear=True))
            stack.enter_context(mock.patch.object(sys, "stdin", typed))
            stack.enter_context(mock.patch.object(program, "_NAME", "download.sh"))
            stack.enter_context(redirect_stdout(saw))
            stack.enter_context(redirect_stderr(saw))
            stack.callback(os.chdir, Path.cwd())
            os.chdir(self.work)
            try:
                program.main(args)
                status = 0
            except SystemExit as end:
                status = end.code
        assert (self.work / "LICENSE").read_text() == "the project's own\n"
        return status, saw.getvalue()

    def get(self, *args, url):
        return self.run("--no-space-check", "--timeout", "1", "--retries", "2", *args, url=url)

    def lies(self, server, folder=FOLDER, at="8b_instruction_tuned"):
        """name -> 'whole', or how much of it: a name without .part must never be anything else."""
        found = {}
        for path in sorted((self.work / folder).glob("*")):
            name = path.name.removesuffix(".part")
            right = server.files.get(f"{at}/{name}", server.files.get(name))
            have = path.read_bytes() if path.is_file() else b""
            if path.suffix == ".part":
                found[path.name] = f"{len(have)} bytes"
            else:
                found[path.name] = "whole" if have == right else "WRONG"
        return found


NAMES = ("LICENSE", "USE_POLICY", "checklist.chk", SHARD, "params.json", "tokenizer.model")
WHOLE = dict.fromkeys(NAMES, "whole")
SMALL = {name: state for name, state in WHOLE.items() if name != SHARD}
EIGHT = {f"consolidated.{i:02d}.pth": "whole" for i in range(8)}


def url_of_age(hours):
    until = int(time.time() - hours * 3600)
    policy = json.dumps({"Statement": [{"Condition": {"DateLessThan": {"AWS:EpochTime": until}}}]})
    coded = base64.b64encode(policy.encode()).decode().translate(str.maketrans("+=/", "-_~"))
    return QUERY.replace("Policy=x", f"Policy={coded}")


@dataclass(frozen=True)
class Case:
    did: str  # what the server (or the disk, or the user) did
    modes: dict[str, list[str]] = field(default_factory=dict)
    status: int = 0
    says: tuple[str, ...] = ()  # patterns of what the user reads
    files: dict[str, str] = field(default_factory=lambda: WHOLE)
    asked: tuple[str, ...] = ()  # requests that must have been made
    args: tuple[str, ...] = ("8B-instruct",)
    query: str = QUERY
    folder: str = FOLDER
    at: str = "8b_instruction_tuned"
    before: Callable[[Path, bytes], object] | None = None  # what is done to the folder first
    free: int | None = None  # bytes on the disk, which are looked at only then
    small_disk: bool = False
    interrupt: bool = False


def put(name, make):
    return lambda folder, shard: (folder / name).write_bytes(make(shard))


RESUMED = f"8b_instruction_tuned/{SHARD} 15000"
ANEW = f"8b_instruction_tuned/{SHARD}"

CASES = [
    Case("nothing wrong", says=(r"Done: 1 of 1 models whole \(40.0 kB\)",)),
    Case("nothing wrong, 8 shards, 4 at a time", args=("70B", "--jobs", "4"),
         folder="Meta-Llama-3-70B", at="70b_pre_trained", files=WHOLE | EIGHT,
         says=(r"Done: 1 of 1 models whole \(320.0 kB\)",)),
    Case("403 at the start", {"*": ["status:403"]}, 1,
         (r"\(403\).*expired.*24 hours.*quota.*mangled.*Ask for a new one", r"not done: 0 of 1"),
         files={}),
    Case("403 at the start, the URL's own date is past", {"*": ["status:403"]}, 1,
         (r"\(403\).*By the date in it, it expired 5 hours ago",), query=url_of_age(5), files={}),
    Case("403 at the start, the URL's own date is to come", {"*": ["status:403"]}, 1,
         (r"\(403\).*By the date in it, it is good for 6 more hours",),
         query=url_of_age(-6.5), files={}),
    Case("403 midway, from the fourth shard on",
         {f"consolidated.0{i}.pth": ["status:403"] for i in range(3, 8)}, 1,
         (r"refused consolidated.03.pth \(403\)", r"not done: 0 of 1"), args=("70B",),
         folder="Meta-Llama-3-70B", at="70b_pre_trained",
         files=SMALL | dict(list(EIGHT.items())[:3])),
    Case("403 midway through a shard", {SHARD: ["truncate:15000", "status:403"]}, 1,
         (rf"refused {SHARD} \(403\)",), files=SMALL | {f"{SHARD}.part": "15000 bytes"},
         asked=(RESUMED,)),
    Case("a login page in place of the checklist (status 200)", {"checklist.chk": ["page"]}, 1,
         (r"web page instead of checklist.chk \(status 200\): a login page",), files={}),
    Case("a redirect to a login page", {"checklist.chk": ["login"]}, 1,
         (r"web page instead of checklist.chk \(status 200\): a login page",), files={}),
    Case("a login page in place of a shard (status 200)", {SHARD: ["page"]}, 1,
         (rf"web page instead of {SHARD}",), files=SMALL),
    Case("a web page as application/octet-stream", {SHARD: ["bare page"]}, 1,
         (rf"sent a web page instead of {SHARD}",), files=SMALL),
    Case("a web page in place of the rest of a shard", {SHARD: ["truncate:15000", "page"]}, 1,
         (rf"web page instead of {SHARD}",), files=SMALL | {f"{SHARD}.part": "15000 bytes"}),
    Case("a text in place of the checklist", {"checklist.chk": ["text"]}, 1,
         (r"not a list of checksums",), files={}),
    Case("cut off after 15000 bytes", {SHARD: ["truncate:15000", "ok"]}, asked=(RESUMED,)),
    Case("cut off at each try, 15000 bytes further", {SHARD: ["truncate:15000"]}, asked=(RESUMED,)),
    Case("cut off, then nothing more at each try", {SHARD: ["truncate:15000", "truncate:0"]}, 1,
         (rf"{SHARD} got no further than 15.0 kB of 40.0 kB in 3 tries.*same command again",),
         files=SMALL | {f"{SHARD}.part": "15000 bytes"}),
    Case("connections closed without an answer", {"*": ["drop"]}, 1,
         (r"did not deliver checklist.chk in 3 tries",), files={}),
    Case("a Content-Length that is too long", {SHARD: ["length:100", "ok"]},
         asked=(f"8b_instruction_tuned/{SHARD} 40000",)),
    Case("a Content-Length that is too short", {SHARD: ["length:-100"]}, 1,
         (rf"{SHARD} does not match checklist.chk .*twice",), files=SMALL),
    Case("no Content-Length", {SHARD: ["no length"]}),
    Case("an empty file", {"LICENSE": ["ok"], "USE_POLICY": ["length:-11"]},
         says=(r"USE_POLICY: not to be had at this URL",),
         files={n: s for n, s in WHOLE.items() if n != "USE_POLICY"}),
    Case("cut off, then the Range ignored", {SHARD: ["truncate:15000", "no range"]},
         asked=(ANEW, RESUMED, ANEW)),
    Case("cut off, then the Range ignored and no Content-Length",
         {SHARD: ["truncate:15000", "no range, no length"]}, asked=(ANEW, RESUMED, ANEW)),
    Case("416, and the .part is whole", before=put(f"{SHARD}.part", lambda shard: shard),
         asked=(f"8b_instruction_tuned/{SHARD} 40000",)),
    Case("416, and the .part is longer than the file",
         before=put(f"{SHARD}.part", lambda shard: shard + b"x"),
         asked=(f"8b_instruction_tuned/{SHARD} 40001", ANEW)),
    Case("416 without a size, and the .part is not whole", {SHARD: ["bare 416"]},
         before=put(f"{SHARD}.part", lambda shard: shard[:15000]), asked=(RESUMED, ANEW),
         says=("does not match checklist.chk; starting it anew",)),
    Case("the .part is of another file", before=put(f"{SHARD}.part", lambda shard: b"x" * 15000),
         says=("does not match checklist.chk; starting it anew",), asked=(RESUMED, ANEW)),
    Case("a file without .part that is cut off (left by another script)",
         before=put(SHARD, lambda shard: shard[:15000]), asked=(RESUMED,)),
    Case("a login page saved as the checklist (left by another script)",
         before=put("checklist.chk", lambda shard: PAGE)),
    Case("silence after 15000 bytes", {SHARD: ["stall:15000", "ok"]}, asked=("hung up", RESUMED)),
    Case("silence at each try", {SHARD: ["stall:15000", "stall:0"]}, 1,
         (rf"{SHARD} got no further than 15.0 kB of 40.0 kB",),
         files=SMALL | {f"{SHARD}.part": "15000 bytes"}),
    Case("ten drops of 4 kB, slowly", {SHARD: ["slow"]}),
    Case("302 to another place", {"*": ["redirect"]}, asked=(f"elsewhere/{ANEW}",)),
    Case("302 to another place, cut off", {SHARD: ["redirect", "truncate:15000", "redirect", "ok"]},
         asked=(f"elsewhere/{RESUMED}",)),
    Case("a flipped bit, once", {SHARD: ["corrupt", "ok"]},
         says=("does not match checklist.chk; starting it anew",)),
    Case("a flipped bit, always", {SHARD: ["corrupt"]}, 1,
         (rf"{SHARD} does not match checklist.chk \(it says [0-9a-f]{{32}}, the download has "
          r"[0-9a-f]{32}\), twice",), files=SMALL),
    Case("503 twice", {SHARD: ["status:503", "status:503", "ok"]}),
    Case("503 always", {SHARD: ["status:503"]}, 1,
         (rf"did not deliver {SHARD} in 3 tries \(status 503",), files=SMALL),
    Case("404 for LICENSE", {"LICENSE": ["status:404"]}, says=("LICENSE: not to be had",),
         files={n: s for n, s in WHOLE.items() if n != "LICENSE"}),
    Case("404 for the model", {"checklist.chk": ["status:404"]}, 1,
         (r"has no 8b_instruction_tuned/checklist.chk \(404\): is the URL for another family",),
         files={}),
    Case("the disk is full", {}, 1, (rf"cannot write .*{SHARD}.part: No space left.*make room",),
         small_disk=True, files=SMALL | {f"{SHARD}.part": "? bytes"}),
    Case("the disk is too small from the start", {}, 1,
         (r"has 5.0 MB free and about 16.1 GB are still to come",), args=("8B-instruct",), files={},
         free=5_000_000),
    Case("the user names no model that is", {}, 2, (r"there is no model '9B'", "llama-3.1-70b"),
         args=("8B-instruct,9B",), files={}),
    Case("the user presses Ctrl-C", {SHARD: ["stall:15000"]}, 130,
         ("interrupted: files that are whole stay",), interrupt=True, asked=("hung up",),
         files=SMALL | {f"{SHARD}.part": "15000 bytes"}),
]  # fmt: skip


@contextmanager
def small_disk(folder):
    """Room for the small files and a part of a shard: a tmpfs, or else a device that is full."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", folder]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
    elif Path("/dev/full").exists():
        (folder / f"{SHARD}.part").symlink_to("/dev/full")
        yield
    else:
        pytest.skip("a full disk needs root (a small tmpfs) or /dev/full")


@contextmanager
def played(case, root):
    """Play a case: (status, what the user saw, what lies in the folder, the server's log)."""
    place = Place(root)
    folder = place.work / case.folder
    if case.before:
        folder.mkdir()
        case.before(folder, content(f"{case.at}/{SHARD}"))
    args = ("--timeout", "1", "--retries", "2", *case.args)
    space = mock.patch.object(shutil, "disk_usage", return_value=Mock(free=case.free))
    if case.free is None:
        args, space = ("--no-space-check", *args), nullcontext()
    disk = small_disk(folder) if case.small_disk else nullcontext()
    with serving(case.modes) as server, disk:
        url = server.url.replace(QUERY, case.query)
        if case.interrupt:
            child = place.start("--timeout", "30", *args[3:], "--no-space-check", url=url)
            part = folder / f"{SHARD}.part"
            wait_until(lambda: part.exists() and part.stat().st_size == 15000)
            child.send_signal(signal.SIGINT)
            saw = child.communicate(timeout=5)[0].decode()
            status = child.returncode
            wait_until(lambda: "hung up" in server.log)  # nothing of it runs on
        else:
            with space:
                status, saw = place.run(*args, url=url)
        yield status, saw, place.lies(server, case.folder, case.at), server.log


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.did)
def test_a_misbehaving_server(case, tmp_path):
    with played(case, tmp_path) as (status, saw, files, log):
        for pattern in case.says:
            assert re.search(pattern, saw), saw
        assert status == case.status, saw
        if case.small_disk:
            files = {n: "? bytes" if n.endswith(".part") else s for n, s in files.items()}
        assert files == case.files
        left = iter(log)
        assert all(request in left for request in case.asked), log  # in this order
        # a checksum finds only what nothing before it could have known
        assert ("does not match" in saw) == any("does not match" in p for p in case.says)
        assert "HEAD" not in log
        assert QUERY not in saw  # the URL is a secret
        assert "Traceback" not in saw  # no message of Python itself
        if status == 0:
            assert saw.splitlines()[-1].startswith("Done: 1 of 1 models")


def test_what_is_whole_is_not_asked_for_again(tmp_path):
    place = Place(tmp_path)
    with serving() as server:
        assert place.get("8B-instruct", url=server.url)[0] == 0
        server.log.clear()
        status, saw = place.get("8B-instruct", url=server.url)
        assert (status, server.log) == (0, [])
        assert "everything is there and matches checklist.chk" in saw

        (place.work / FOLDER / "params.json").write_text("{}")
        assert place.get("8B-instruct", url=server.url)[0] == 0
        assert place.lies(server) == WHOLE
        assert not any(request.endswith(".pth") for request in server.log)


def test_an_interrupted_download_goes_on(tmp_path):
    place = Place(tmp_path)
    with serving({SHARD: ["stall:15000", "ok"]}) as server:
        child = place.start("8B-instruct", "--no-space-check", url=server.url)
        part = place.work / FOLDER / f"{SHARD}.part"
        wait_until(lambda: part.exists() and part.stat().st_size == 15000)
        child.terminate()
        child.communicate(timeout=5)
        assert child.returncode == 143
        assert place.get("8B-instruct", url=server.url)[0] == 0
        assert RESUMED in server.log
        assert place.lies(server) == WHOLE


def test_other_layouts(tmp_path):
    """Llama 2's tokenizer at the root, 3.1 under its newer path, SHA-256, no checklist at all."""
    place = Place(tmp_path)
    with serving() as server:
        status, saw = place.get("7B,llama-3.1-8b,1b", url=server.url)
        assert status == 0, saw
        assert saw.splitlines()[-1].startswith("Done: 3 of 3 models whole (120.0 kB)")
        seven = place.lies(server, "llama-2-7b", "llama-2-7b")
        assert set(seven.values()) == {"whole"}
        assert {"tokenizer.model", "tokenizer_checklist.chk", SHARD, "LICENSE"} < set(seven)
        assert place.lies(server, "Meta-Llama-3.1-8B", "Llama-3.1-8B")[SHARD] == "whole"
        assert f"  {SHARD}: 40.0 kB, matches its checksum" in saw
        assert not list(place.work.rglob("*.part"))

        del server.files["Llama-3.1-8B/checklist.chk"]
        shutil.rmtree(place.work / "Meta-Llama-3.1-8B")
        status, saw = place.get("llama-3.1-8b", url=server.url)
        assert status == 0
        assert "no checksum is known for it" in saw
        assert "lengths only were checked" in saw
        server.log.clear()
        assert place.get("llama-3.1-8b", url=server.url)[0] == 0
        assert f"Llama-3.1-8B/{SHARD} 40000" in server.log  # its length is asked, no more


def test_a_jobs_worker_that_is_refused_ends_the_others(tmp_path):
    place = Place(tmp_path)
    modes = {"consolidated.00.pth": ["stall:15000"], "consolidated.02.pth": ["status:403"]}
    with serving(modes) as server:
        began = time.monotonic()
        status, saw = place.script(
            "70B", "--jobs", "3", "--timeout", "20", "--no-space-check", url=server.url
        )
        assert status == 1
        assert saw.count("(403)") == 1
        assert time.monotonic() - began < 10
        wait_until(lambda: "hung up" in server.log)


URL = f"https://download.example/*{QUERY}"
MANGLED = {
    "&amp;": URL.replace("&", "&amp;"),
    "&amp;amp;": URL.replace("&", "&amp;amp;"),
    "spaces around": f"  {URL} \t",
    "a line end": f"{URL}\r\n",
    "wrapped": "\n".join(re.findall(".{1,20}", URL)),
    "wrapped and indented": "\r\n   ".join(re.findall(".{1,20}", URL)),
    "double quotes": f'"{URL}"',
    "single quotes": f"'{URL}'",
    "typographic quotes": f"“{URL}”",
    "angle brackets": f"<{URL}>",
    "a no-break space": f"\u00a0{URL}\u200b",
    "a full stop": f"{URL}.",
    "words before": f"URL: {URL}",
    "pasted twice": f"{URL}{URL}",
    "lost asterisk": URL.replace("*", ""),
    "lost asterisk and slash": URL.replace("/*", ""),
    "%2A": URL.replace("*", "%2A"),
    "backslashes of a shell": re.sub(r"([*?=&])", r"\\\1", URL),
    "percent-encoded": URL.replace("?", "%3F").replace("=", "%3D").replace("&", "%26"),
    "quoted-printable": "=\n".join(re.findall(".{1,20}", URL.replace("=", "=3D"))),
    "a mail filter": "https://eur01.safelinks.example/?url="
    + URL.replace(":", "%3A").replace("/", "%2F").replace("?", "%3F").replace("=", "%3D")
    .replace("&", "%26") + "&data=05%7C02",
}  # fmt: skip


@pytest.mark.parametrize("how", MANGLED)
def test_a_mangled_url_is_put_right(how):
    assert clean_url(MANGLED[how]) == URL
    assert url_problem(URL) == ""


def test_a_mangled_url_works(tmp_path):
    place = Place(tmp_path)
    with serving() as server:
        url = "\n ".join(re.findall(".{1,20}", server.url.replace("&", "&amp;")))
        status, saw = place.get("8B-instruct", url=f"<{url}>")
        assert status == 0
        assert "has been put right" in saw
        assert place.lies(server) == WHOLE


BROKEN = {
    "": "no URL was given",
    "llama.com": "'llama.com' is not a URL that begins with https://",
    "ftp://host/*?Policy=x&Signature=y": "is not a URL that begins with https://",
    "https://host/*": "no '?Policy=...&Signature=...' after its path: it was cut off",
    "https://host/*?Policy=x": "no 'Signature=': it was cut off at the first '&'",
    "https://host/LICENSE?Policy=x&Signature=y": "no '*', where a file's path goes",
    "https://host/*?a=b": "no 'Policy=' and 'Signature='",
    "https://host/**?Policy=x&Signature=y": "more than one '*'",
}


@pytest.mark.parametrize("url", BROKEN)
def test_a_url_that_cannot_be_put_right_is_refused_before_anything_is_asked(url, tmp_path):
    place = Place(tmp_path)
    status, saw = place.run("8B-instruct", url=url)
    assert BROKEN[url] in saw
    assert len(saw.splitlines()) == 1
    assert status == 2
    assert [p.name for p in place.work.iterdir()] == ["LICENSE"]


def test_asked_for_url_and_models(tmp_path):
    """As people know it: the URL (wrapped, here), then the models; a pipe may answer."""
    place = Place(tmp_path)
    with serving() as server:
        wrapped = "\n".join(re.findall(".{1,20}", server.url))
        status, saw = place.run("--no-space-check", text=f"{wrapped}\n8B-instruct, 1B\n")
        assert status == 0, saw
        assert saw.startswith("Enter the URL from email: ")
        assert saw.index("llama-3.1-8b-instruct") < saw.index("Enter for all")
        assert saw.splitlines()[-1].startswith("Done: 2 of 2 models whole (80.0 kB)")

        for text in (f"{server.url}\n\n", f"{server.url}\n\nno\n", f"{server.url}\n"):
            status, saw = place.run(text=text)
            assert status == 2
            assert "name the models" in saw or "name it" in saw
        assert place.run("8B-instruct", text="")[0] == 2  # nobody there to give a URL


@pytest.mark.parametrize(("args", "says"), [
    (("--frobnicate",), "there is no option '--frobnicate'"),
    (("--jobs",), "--jobs needs a value"),
    (("--jobs", "0"), "--jobs must be a whole number from 1 to 32, not '0'"),
    (("--jobs=four",), "--jobs must be a whole number from 1 to 32, not 'four'"),
    (("--timeout", "-1"), "--timeout must be a whole number from 1 to 3600, not '-1'"),
    (("--retries", "1.5"), "--retries must be a whole number from 0 to 1000, not '1.5'"),
    (("--target", "", "8B"), "--target needs the name of a folder"),
    (("-",), "there is no option '-'"),
    (("8B,-",), "there is no model '-'"),
    (("*",), "there is no model '*'"),
    (("8B;70B",), "there is no model '8B;70B'"),
])  # fmt: skip
def test_bad_arguments(args, says, tmp_path):
    status, saw = Place(tmp_path).run(*args, url=URL)
    assert (status, saw.splitlines()[-1][: len(f"download.sh: {says}")]) == (
        2,
        f"download.sh: {says}",
    )


def test_list_dry_run_and_help_need_no_url_and_touch_nothing(tmp_path):
    place = Place(tmp_path)
    status, saw = place.run("--list")
    assert status == 0
    assert re.search(r"llama-3-8b-instruct +8b-instruct +16.1 GB +1  Meta-Llama-3-8B-Instruct", saw)
    assert len(saw.splitlines()) == 28
    status, saw = place.run("--dry-run", "70b-Instruct", "meta-llama/Llama-3.2-1B", "7B")
    assert status == 0
    assert "  70b_instruction_tuned/consolidated.07.pth -> ./Meta-Llama-3-70B-Instruct" in saw
    assert "  tokenizer.model -> ./llama-2-7b/tokenizer.model" in saw
    assert saw.count(" -> ") == 13 + 6 + 7
    assert place.run("--dry-run", "all")[1].count("consolidated.00.pth") == 27 * 2
    assert "PRESIGNED_URL" in place.run("--help")[1]
    assert [p.name for p in place.work.iterdir()] == ["LICENSE"]


@pytest.mark.parametrize(("word", "means"), [
    ("8B", "llama-3-8b"),
    ("70b-Instruct", "llama-3-70b-instruct"),
    ("Meta-Llama-3-8B", "llama-3-8b"),
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
    ("3.3-70B-instruct", "llama-3.3-70b-instruct"),
    ("7B-chat", "llama-2-7b-chat"),
    ("llama-3.2", "llama-3.2-1b llama-3.2-1b-instruct llama-3.2-3b llama-3.2-3b-instruct"),
    ("llama-3", "llama-3-8b llama-3-8b-instruct llama-3-70b llama-3-70b-instruct"),
    ("llama-guard", "llama-guard-7b llama-guard-2-8b llama-guard-3-8b llama-guard-3-1b"),
    ("405B", ""),
    ("-", ""),
])  # fmt: skip
def test_what_a_name_means(word, means):
    assert [model.name for model in matching(word)] == means.split()


def test_no_model_has_the_short_name_folder_or_path_of_another():
    rows = table_of_models.models()
    assert len(rows) == 27
    for column in ("name", "folder"):
        assert len({getattr(row, column) for row in rows}) == len(rows)
    short = [row.short for row in rows if row.short != "-"]
    assert len(set(short)) == len(short)
    for row in rows:
        assert matching(row.name) == [row]
    assert rows[0].paths == ("llama-2-7b",)
    assert matching("llama-3.1-8b")[0].paths == ("Meta-Llama-3.1-8B", "Llama-3.1-8B")


# ---- the network


def test_a_proxy_of_the_environment_is_used_and_no_proxy_goes_around_it(tmp_path):
    place = Place(tmp_path)
    with serving() as server, serving() as proxy:
        address = f"http://127.0.0.1:{proxy.server_port}"
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            proxy.log.clear()
            shutil.rmtree(place.work / FOLDER, ignore_errors=True)
            url = f"http://weights.example/*{QUERY}"
            args = ("--no-space-check", "8B-instruct")
            status, saw = place.run(*args, url=url, env={name: address})
            assert status == 0, saw
            assert ANEW in proxy.log
        proxy.log.clear()
        shutil.rmtree(place.work / FOLDER)
        env = {"http_proxy": address, "no_proxy": "127.0.0.1"}
        status, saw = place.run("--no-space-check", "8B-instruct", url=server.url, env=env)
        assert (status, proxy.log) == (0, []), saw


@pytest.mark.parametrize(("proxy", "says"), [
    ("socks5://127.0.0.1:9", "http_proxy or all_proxy names a SOCKS proxy"),
    ("http://127.0.0.1:9", r"did not deliver .*refused.*: check the network and http_proxy"),
    ("asks", "the proxy of http_proxy wants a name and a password: write them into it, as in"),
])  # fmt: skip
def test_a_proxy_that_does_not_work_is_named(proxy, says, tmp_path):
    with serving({"*": ["status:407"]}) as server:
        proxy = f"http://127.0.0.1:{server.server_port}" if proxy == "asks" else proxy
        args = ("--no-space-check", "--retries", "0", "8B-instruct")
        status, saw = Place(tmp_path).run(
            *args, url=f"http://a.example/*{QUERY}", env={"http_proxy": proxy}
        )
    assert re.search(says, saw)
    assert status == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    made = shutil.which("openssl") and subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], capture_output=True,
    )  # fmt: skip
    if not made or made.returncode:
        pytest.skip("needs openssl")
    return folder / "cert.pem", folder / "key.pem"


def test_a_certificate_that_is_not_trusted_says_what_to_do(certificate, tmp_path, monkeypatch):
    """Where Python knows no certificates, as on macOS, those of the system are taken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    place = Place(tmp_path)
    with serving() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http:", "https:")
        began = time.monotonic()
        status, saw = place.get("8B-instruct", url=url)
        assert "is not trusted" in saw
        assert "Install Certificates.command" in saw
        assert "SSL_CERT_FILE" in saw
        assert status == 1
        assert time.monotonic() - began < 5  # it is not tried again

        args = ("--no-space-check", "8B-instruct")
        status, saw = place.run(*args, url=url, env={"SSL_CERT_FILE": str(certificate[0])})
        assert status == 0, saw

        shutil.rmtree(place.work / FOLDER)
        monkeypatch.setattr(network, "_SYSTEM_CERTIFICATES", certificate[0])
        nothing = {"SSL_CERT_FILE": str(tmp_path / "none"), "SSL_CERT_DIR": str(tmp_path / "none")}
        status, saw = place.run(*args, url=url, env=nothing)
        assert status == 0, saw


def test_no_error_of_a_connection_shows_the_url():
    for error in (OSError("no http://host/a?Policy=x&Signature=y"), http.client.InvalidURL(URL)):
        assert "Policy" not in network._words(error)
        assert network._words(error)


def test_the_url_is_a_secret(tmp_path):
    """No other user of the machine can read it: command lines are public, environments are not."""
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("needs /proc")
    place = Place(tmp_path)
    with serving({SHARD: ["stall:15000"]}) as server:
        child = place.start("8B-instruct", "--no-space-check", url=server.url)
        part = place.work / FOLDER / f"{SHARD}.part"
        wait_until(lambda: part.exists() and part.stat().st_size == 15000)
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                lines.append(path.read_bytes())
        child.terminate()
        child.communicate(timeout=5)
    assert any(b"download.py" in line for line in lines)
    assert not any(b"Signature=y" in line for line in lines)


# ---- the script


@pytest.mark.parametrize("python", [
    "exit 127",
    'case "$*" in --version) echo Python 3.8.18 ;; *) exit 1 ;; esac',
], ids=["none", "old"])  # fmt: skip
def test_without_a_python_that_works_it_says_so_in_one_sentence(python, tmp_path):
    place = Place(tmp_path)
    place.python(python)
    status, saw = place.script("8B", url=URL)
    here = "Python 3.8.18" if "3.8" in python else "none"
    assert saw == (
        "download.sh: this needs python3, of version 3.9 or later and with SSL, and here is "
        f"{here}: install it from https://www.python.org\n"
    )
    assert status == 1
    (place.tools / "python3").unlink()
    if here == "none":
        assert place.script("8B", url=URL) == (status, saw)


def test_it_runs_from_anywhere_by_any_shell_and_through_links(tmp_path):
    place = Place(tmp_path)
    (place.tools / "readlink").symlink_to(shutil.which("readlink"))
    (tmp_path / "far").symlink_to(SCRIPT)
    (tmp_path / "near").symlink_to("far")
    (tmp_path / "there").symlink_to(ROOT)
    scripts = [SCRIPT, tmp_path / "near", tmp_path / "there" / "download.sh", "../near"]
    runs = [(script, "sh") for script in scripts] + [(SCRIPT, shell) for shell in SHELLS]
    for script, shell in runs:
        status, saw = place.script("--dry-run", "8B", script=script, shell=shell)
        assert (status, saw.splitlines()[0]) == (0, "Meta-Llama-3-8B (llama-3-8b, about 16.1 GB)")
    assert place.script("--dry-run", "8B", script="download.sh", cwd=ROOT)[0] == 0
    status, saw = place.script("--jobs", "0", "8B", script=tmp_path / "near")
    assert (status, saw) == (
        2,
        "download.sh: --jobs must be a whole number from 1 to 32, not '0'\n",
    )


def test_the_whole_script_asks_and_downloads(tmp_path):
    place = Place(tmp_path)
    with serving() as server:
        os.umask(mask := os.umask(0o077))
        status, saw = place.script("--no-space-check", text=f"{server.url}\n8B-instruct\n")
        assert status == 0, saw
        assert saw.startswith("Enter the URL from email: NAME")
        assert place.lies(server) == WHOLE
        modes = {path.stat().st_mode & 0o777 for path in (place.work / FOLDER).iterdir()}
        assert modes == {0o666 & ~mask}


def test_what_the_script_is_told_to_ignore_does_not_end_it(tmp_path):
    """nohup: the terminal may go."""
    place = Place(tmp_path)
    with serving({SHARD: ["stall:15000", "ok"]}) as server:
        ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
        args = ("8B-instruct", "--no-space-check", "--timeout", "1")
        child = place.start(*args, url=server.url, preexec_fn=ignore)
        part = place.work / FOLDER / f"{SHARD}.part"
        wait_until(lambda: part.exists() and part.stat().st_size == 15000)
        child.send_signal(signal.SIGHUP)
        assert "Done" in child.communicate(timeout=20)[0].decode()
        assert child.returncode == 0


def test_a_reader_who_leaves_ends_it_without_a_traceback(tmp_path):
    child = Place(tmp_path).start("--list", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 1


def test_on_a_terminal_progress_is_drawn_and_ctrl_c_ends_it(tmp_path):
    """Ctrl-C typed at a real terminal, of which the script is the foreground."""
    place = Place(tmp_path)
    with serving({SHARD: ["stall:15000"]}) as server:
        command = [
            shutil.which("sh"),
            SCRIPT,
            "8B-instruct",
            "--no-space-check",
            "--target",
            place.work,
        ]
        env = {"PATH": str(place.tools), "PRESIGNED_URL": server.url}
        with Session(command, **env) as session:
            session.wait_for(f"{FOLDER}: 0 %, 15.0 kB of 16.1 GB, ")
            session.type(CTRL_C)
            session.wait_for("interrupted: files that are whole stay")
            assert session.process.wait(timeout=5) == 130
        wait_until(lambda: "hung up" in server.log)
        assert place.lies(server) == SMALL | {f"{SHARD}.part": "15000 bytes"}


def test_it_runs_in_an_environment_without_any_package():
    for python in [sys.executable, *filter(None, [shutil.which("python3.9")])]:
        command = [python, "-S", "-E", FILE, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        if done.returncode == 127:
            continue  # a stand-in for a Python that is not installed
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: download.sh [options] [model ...]")
        assert "  --target DIR      where the models' folders go (default: here)\n" in done.stdout


def test_it_imports_the_standard_library_and_files_of_ours_without_torch():
    """All that is imported, by it and by what it imports, at the top and anywhere else."""
    seen, todo = set(), ["llama.commands.download"]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        file = ROOT / (module.replace(".", "/") + ".py")
        tree = ast.parse(
            (file if file.exists() else file.with_suffix("") / "__init__.py").read_text()
        )
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] == "llama":
                    todo.append(name)
                else:
                    assert name.split(".")[0] in sys.stdlib_module_names, (module, name)
    assert seen == {
        "llama.commands.download", "llama.files.checklist", "llama.terminal.progress",
        *(f"llama.download.{name}" for name in ("folder", "job", "models", "server", "url")),
    }  # fmt: skip
    command = [sys.executable, "-X", "importtime", "llama/commands/download.py", "--list"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in said.splitlines()}
    assert not {"torch", "fire", "numpy", "tiktoken"} & loaded


def test_as_a_function_it_does_the_same(tmp_path, capsys, monkeypatch):
    """What `python -m llama download` calls."""
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        monkeypatch.setenv("PRESIGNED_URL", server.url)
        target = str(tmp_path / "here")
        program.download("8B-instruct,1b", target=target, jobs=2, no_space_check=True)
        assert "Done: 2 of 2 models whole (80.0 kB)" in capsys.readouterr().out
        assert (tmp_path / "here" / FOLDER / SHARD).stat().st_size == SIZE
    for options, says in [
        ({"jobs": 0}, "--jobs must be a whole number from 1 to 32, not '0'"),
        ({"target": ""}, "--target needs the name of a folder"),
        ({"models": "9B"}, "there is no model '9B'"),
    ]:
        with pytest.raises(SystemExit) as end:
            program.download(**options)
        assert end.value.code == 2
        assert f"download: {says}" in capsys.readouterr().err


def test_every_option_has_a_line_of_help():
    words = re.findall(r"^  --(\S+)", program._usage(), re.M)
    options = program.download.__kwdefaults__
    assert words == [*(name.replace("_", "-") for name in options), "help"]
    assert "  --jobs N          download N files at a time (default 1)\n" in program._usage()


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_is_executable_and_parses():
    assert os.access(SCRIPT, os.X_OK)
    for shell in SHELLS:
        subprocess.run([shell, "-n", SCRIPT], check=True)
    assert len(SCRIPT.read_text().splitlines()) < 40


def table(out):
    """The closing note's table, in Markdown."""

    def row(*cells):
        out.write("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |\n")

    row("what happened", "what the user saw", "exit", "on disk afterwards")
    row("---", "---", "---", "---")
    for case in CASES:
        with tempfile.TemporaryDirectory() as root:
            with played(case, Path(root)) as (status, saw, files, _):
                said = [line for line in saw.splitlines() if line.startswith("download.sh: ")]
                said = said[:1] or saw.splitlines()[-1:]
                text = said[0].removeprefix("download.sh: ")
                text = re.sub(r"127\.0\.0\.1:\d+", "HOST", text)
            whole = sum(state == "whole" for state in files.values())
            rest = [f"{n} {s}" for n, s in files.items() if s != "whole"]
            left = ", ".join([f"{whole} of {len(case_files(case))} files whole", *rest])
            row(case.did, text, str(status), left)


def case_files(case):
    return WHOLE | EIGHT if case.folder != FOLDER else WHOLE


if __name__ == "__main__":
    table(sys.stdout)
