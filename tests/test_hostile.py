"""Broken and hostile files in Meta's format, and bad arguments, through the real command lines.

Each ends with a status and one sentence that names the file and the cause, without a traceback,
soon, and with little memory. `pytest tests/test_hostile.py -s` prints the table.
"""

import contextlib
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_args, write_tokenizer

from llama.checkpoint import random_checkpoint, write_meta
from llama.commands import COMMANDS

ROOT = Path(__file__).parent.parent
EXAMPLES = ("example_chat_completion.py", "example_text_completion.py")
WORDS = [f"w{number}" for number in range(300)]
SHARD, PARAMS, TOKENIZER = "consolidated.00.pth", "params.json", "tokenizer.model"
SECOND = "consolidated.01.pth"
SECONDS, MEGABYTES = 5, 200

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


class Outcome(NamedTuple):
    status: int
    out: str
    error: str
    seconds: float
    megabytes: float


# ---- the cases: functions that break a good folder; what is wrong is their name


class Case(NamedTuple):
    kind: str
    wrong: str
    spoil: object  # what is done to the folder
    says: str  # what the sentence matches; {} is the folder
    shards: int
    command: str
    powerless: bool


CASES = []
SHOW = "info"  # reads no tokenizer
ASK = EXAMPLES[1]


def case(kind, says, shards=1, command=SHOW, powerless=False):
    def add(spoil):
        wrong = spoil.__name__.strip("_").replace("_", " ")
        CASES.append(Case(kind, wrong, spoil, says, shards, command, powerless))
        return spoil

    return add


def simple(kind, wrong, spoil, says, **options):
    spoil.__name__ = wrong
    case(kind, says, **options)(spoil)


def edit(folder, name, change):
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


# -- cut short


for cut, keep, why in (
    ("in the first bytes", 3, "is no file that torch.save writes"),
    ("in the first header", 40, "is cut short or broken"),
    ("in the data", 0.5, "is cut short or broken"),
    ("in the directory", -400, "is cut short or broken"),
    ("before the end of the directory", -20, "is cut short or broken"),
):
    simple("cut short", cut,
           lambda folder, keep=keep: edit(
               folder, SHARD, lambda d: d[: int(keep * len(d)) if 0 < keep < 1 else keep]),
           f"^{{}}/{SHARD}: {why}")  # fmt: skip


@case("cut short", f"^{{}}/{SHARD}: is cut short or broken")
def bytes_lost_in_the_middle(folder):
    edit(folder, SHARD, lambda d: d[: len(d) // 2] + d[len(d) // 2 + 5000 :])


@case("cut short", f"^{{}}/{SECOND}: is cut short or broken", shards=2)
def the_rest_is_zeros(folder):
    edit(folder, SECOND, lambda d: d[: len(d) // 2] + bytes(len(d) - len(d) // 2))


@case("cut short", f"^{{}}/{SHARD}: is cut short or broken")
def terabyte_of_nothing_behind_it(folder):
    os.truncate(folder / SHARD, 2**40)


# -- something else in place of a shard


for wrong, data, why in (
    ("a web page", b"<!DOCTYPE html>\n<html><title>Log in</title></html>", "is a web page or XML"),
    ("an error in XML", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    ("a page with a byte order mark", b"\xef\xbb\xbf\r\n<html></html>", "is a web page or XML"),
    ("an error in JSON", b'{"error": "expired"}', "is no file that torch.save writes"),
    ("a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
):
    simple("not a shard", wrong, lambda folder, data=data: (folder / SHARD).write_bytes(data),
           f"^{{}}/{SHARD}: .*{why}")  # fmt: skip


# -- what would execute, or exhaust


class Calls:
    """Pickled as the call of a function, with a state, and items of a dict."""

    def __init__(self, function, *arguments, state=None, items=None):
        self.call = (function, arguments, state, None, items and iter(items.items()))

    def __reduce__(self):
        return self.call


def forge(folder, change, name=SHARD):
    """Save the tensors again after a change, or what the change returns in their place."""
    tensors = torch.load(folder / name)
    changed = change(tensors)
    torch.save(tensors if changed is None else changed, folder / name)


def rezip(folder, change):
    """Write the archive again with other instructions."""
    shard, other = folder / SHARD, folder / "other"
    with zipfile.ZipFile(shard) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if "data.pkl" in entry.filename else data)
    other.replace(shard)


REFUSED = f"^{{}}/{SHARD}: holds something other than plain tensors, or is broken; nothing in it"


@case("would execute", REFUSED)
def os_system(folder):
    forge(folder, lambda t: {**t, "norm.weight": Calls(os.system, f"touch {folder}/effect")})


@case("would execute", REFUSED)
def open_of_a_class_with_reduce(folder):
    forge(folder, lambda t: {**t, "extra": Calls(open, f"{folder}/effect", "w")})


@case("would execute", REFUSED)
def builtins_eval(folder):
    code = f"open({str(folder / 'effect')!r}, 'w')"
    forge(folder, lambda t: Calls(eval, code, items=t))


@case("would execute", REFUSED)
def eval_behind_a_name_that_torch_allows(folder):
    code = f"open({str(folder / 'effect')!r}, 'w')"
    forge(folder, lambda t: {**t, "extra": [Calls(eval, code)]})
    rezip(folder, lambda d: d.replace(b"c__builtin__\neval\n", b"ctorch.storage\neval\n"))


@case("would execute", REFUSED)
def torch_load_of_another_file(folder):
    torch.save(Calls(os.system, f"touch {folder}/effect"), folder / "other")
    forge(folder, lambda t: {**t, "extra": Calls(torch.load, str(folder / "other"))})


@case("would execute", f"^{{}}/{SHARD}: is no file that torch.save writes")
def a_pickle_without_an_archive(folder):
    data = pickle.dumps(Calls(os.system, f"touch {folder}/effect"), protocol=2)
    (folder / SHARD).write_bytes(data)


@case("would execute", f"^{{}}/{SHARD}: is cut short or broken .*pickle protocol 4")
def instructions_of_a_later_protocol(folder):
    data = pickle.dumps(Calls(os.system, f"touch {folder}/effect"), protocol=4)
    rezip(folder, lambda d: data)


@case("would execute", f"^{{}}/{SHARD}: is cut short or broken .*TorchScript")
def a_compiled_program(folder):
    with zipfile.ZipFile(folder / SHARD, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/constants.pkl", pickle.dumps((), protocol=2))


@case("would exhaust", REFUSED)
def sixteen_gigabytes_of_zeros_in_a_few_bytes(folder):
    forge(folder, lambda t: {**t, "extra": Calls(bytearray, 2**34)})


@case("would exhaust", REFUSED)
def a_tensor_made_to_order(folder):
    rebuild = torch._utils._rebuild_meta_tensor_no_storage
    huge = Calls(rebuild, torch.bfloat16, (2**40, 2**10), (2**10, 1), False)
    forge(folder, lambda t: {**t, "norm.weight": huge})


@case("would exhaust", f"^{{}}/{SHARD}: is cut short or broken .*has 2147483648 bytes")
def two_gigabytes_of_instructions(folder):
    """A hole in the file: the directory says 2 GiB."""
    with zipfile.ZipFile(folder / SHARD) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data.pkl"))
        sizes = entry.file_size.to_bytes(4, "little") * 2
    edit(folder, SHARD, lambda d: d.replace(sizes, (2**31).to_bytes(4, "little") * 2))


@case("hostile tensor", f"^{{}}/{SHARD}: layers.0.ffn_norm.weight is not stored as a plain")
def strides_that_repeat_one_number(folder):
    forge(folder, lambda t: t.update({"layers.0.ffn_norm.weight": torch.ones(1).expand(64)}))


@case("hostile tensor", REFUSED)
def a_value_that_hides_a_method(folder):
    norm = torch.ones(64)
    norm.is_contiguous = True
    forge(folder, lambda t: t.update({"norm.weight": norm}))


@case("hostile tensor", f"^{{}}/{SHARD}: holds tensors that this model does not have: extra$")
def a_dictionary_that_hides_its_items(folder):
    extra = {"extra": torch.ones(1)}
    forge(folder, lambda t: Calls(OrderedDict, state={"items": 5}, items=t | extra))


@case("hostile tensor", f"^{{}}/{SHARD}: is broken: its tensors claim more bytes than it has")
def a_storage_longer_than_its_record(folder):
    norm = b"K\x40t"  # 64 numbers
    rezip(folder, lambda d: d.replace(norm, b"M\x80\x0ct", 1))  # 3200


@case("hostile tensor", f"^{{}}/{SHARD}: is cut short or broken")
def a_tensor_larger_than_its_storage(folder):
    rezip(folder, lambda d: d.replace(b"K\x40\x85", b"J\xff\xff\xff\x7f\x85"))


@case("hostile tensor", f"^{{}}/{SHARD}: is cut short or broken")
def a_tensor_of_negative_size(folder):
    rezip(folder, lambda d: d.replace(b"K\x40\x85", b"J\xff\xff\xff\xff\x85"))


@case("hostile tensor", f"^{{}}/{SHARD}: is cut short or broken .*twice")
def two_sets_of_instructions_under_one_name(folder):
    with zipfile.ZipFile(folder / SHARD, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        archive.writestr(name.replace("data.pkl", "DATA.pkl"), archive.read(name))


@case("hostile tensor", r"does not have: \\n\\x1b\[2J\\x1b\[31m, xxx.*\.\.\. and 1 more$")
def names_that_would_rule_the_terminal(folder):
    names = ["\n\x1b[2J\x1b[31m", *("x" * 10**5 + end for end in "abc")]
    forge(folder, lambda t: t.update({name: torch.ones(1) for name in names}))


# -- shards


@case("shards", rf"^{{}}/{SHARD} is missing, of 2 shards", shards=2)
def first_one_missing(folder):
    (folder / SHARD).unlink()


@case("shards", rf"^{{}}/{SECOND} is missing, of 4 shards", shards=4)
def second_of_four_missing(folder):
    (folder / SECOND).unlink()


@case("shards", rf"^{{}}/{SECOND} is missing: 1 of 2 shards are here", shards=2)
def last_one_missing(folder):
    (folder / SECOND).unlink()


@case("shards", rf"^{{}}/{SHARD} is missing; it belongs beside the others")
def none_there(folder):
    (folder / SHARD).unlink()


@case("shards", rf"^{{}}/{SECOND} is too many: the model is cut into 1; remove it")
def copy_under_the_next_number(folder):
    shutil.copy(folder / SHARD, folder / SECOND)


@case("shards", rf"^{{}}/{SECOND} is the same as {SHARD}, under another number", shards=2)
def one_in_place_of_another(folder):
    shutil.copy(folder / SHARD, folder / SECOND)


@case("shards", rf"^{{}}/consolidated\.1\.pth and {SECOND} are both shard 1", shards=2)
def two_spellings_of_a_number(folder):
    shutil.copy(folder / SECOND, folder / "consolidated.1.pth")


@case("shards", r"^{}/consolidated\.xx\.pth: shards are named consolidated\.00\.pth")
def name_without_a_number(folder):
    shutil.copy(folder / SHARD, folder / "consolidated.xx.pth")


@case("other model", rf"^{{}}/{SECOND} is of another model than {SHARD}: its norms", shards=2)
def other_weights_of_the_same_shape(folder):
    write(folder / "other", shards=2, seed=1)
    os.replace(folder / "other" / SECOND, folder / SECOND)


@case("other model", r"^{}: layers\.0\.feed_forward\.w1\.weight should be", shards=2)
def shards_of_two_shapes(folder):
    write(folder / "other", shards=2, hidden_dim=96)
    os.replace(folder / "other" / SECOND, folder / SECOND)


@case("other model", rf"^{{}}/{SHARD}: holds 1 layers, and params\.json says n_layers 2")
def shard_with_fewer_layers(folder):
    write(folder / "other", n_layers=1)
    os.replace(folder / "other" / SHARD, folder / SHARD)


@case("other model", r"^{}: tok_embeddings\.weight should be \(812, 64\)")
def params_of_another_size(folder):
    write(folder / "other", dim=32)
    os.replace(folder / "other" / SHARD, folder / SHARD)


# -- tensors


def put(name, tensor):
    return lambda t: t.update({name: tensor})


for wrong, dtype in (("int8", torch.int8), ("float64", torch.float64),
                     ("float8", torch.float8_e5m2)):  # fmt: skip
    simple("dtype", wrong,
           lambda folder, d=dtype: forge(folder, put("norm.weight", torch.ones(64).to(d))),
           f"^{{}}/{SHARD}: norm.weight is {dtype}; these are read: torch.bfloat16")  # fmt: skip


@case("dtype", r"^{}: .* has another dtype in some shards", shards=2)
def shards_of_two_dtypes(folder):
    forge(folder, lambda t: {name: tensor.float() for name, tensor in t.items()}, SECOND)


@case("tensors", rf"^{{}}/{SHARD}: lacks layers\.1\.ffn_norm\.weight$")
def one_missing(folder):
    forge(folder, lambda t: t.pop("layers.1.ffn_norm.weight") is None or None)


@case("tensors", rf"^{{}}/{SECOND}: lacks layers\.0\.attention\.wq\.weight$", shards=2)
def one_missing_in_one_shard(folder):
    forge(folder, lambda t: t.pop("layers.0.attention.wq.weight") is None or None, SECOND)


@case("tensors", rf"^{{}}/{SHARD}: its tensors have 'model\.' before the names .*rename them.*$")
def names_with_a_prefix(folder):
    forge(folder, lambda t: {f"model.{name}": tensor for name, tensor in t.items()})


@case("tensors", rf"^{{}}/{SHARD}: holds tensors that this model does not have: lora\.weight$")
def one_that_is_unknown(folder):
    forge(folder, put("lora.weight", torch.ones(2)))


@case("tensors", rf"^{{}}/{SHARD}: norm\.weight is no tensor but str$")
def text_in_place_of_one(folder):
    forge(folder, put("norm.weight", "ones"))


@case("tensors", rf"^{{}}/{SHARD}: holds no tensors by name$")
def list_of_them(folder):
    forge(folder, lambda t: list(t.values()))


# -- params.json


def set_params(folder, **changes):
    params = json.loads((folder / PARAMS).read_text()) | changes
    (folder / PARAMS).write_text(json.dumps({k: v for k, v in params.items() if v != "gone"}))


for wrong, changes, why in (
    ("unknown keys", {"rope_type": "yarn"}, "unknown keys rope_type; known are dim"),
    ("a key that rules the terminal", {"\x1b[2J\n": 1}, r"unknown keys \\x1b\[2J\\n; known are"),
    ("negative", {"dim": -64}, "dim needs to be a whole number above 0 .*, is -64"),
    ("zero", {"n_heads": 0}, "n_heads needs to be a whole number above 0"),
    ("huge", {"dim": 10**30}, "dim needs to be a whole number above 0 and below"),
    ("as large as allowed", {"n_layers": 2**31 - 1}, "n_layers 2147483647"),
    ("many heads", {"n_heads": 2**30, "head_dim": 2}, "should be"),
    ("missing keys", {"dim": "gone", "norm_eps": "gone"}, "lacks dim, norm_eps"),
    ("text for a number", {"dim": "64"}, "dim needs to be a whole number, is '64'"),
    ("not a number", {"norm_eps": float("nan")}, "norm_eps needs to be a number above 0"),
    ("heads that do not divide", {"n_kv_heads": 3}, "n_heads=8 is no multiple of n_kv_heads=3"),
    ("another model's", {"dim": 128}, "should be"),
    ("quantized weights", {"quantization_args": {}}, "quantization_args marks quantized weights"),
):
    simple("params.json", wrong, lambda folder, c=changes: set_params(folder, **c), f"^{{}}.*{why}")

for wrong, text, why in (
    ("empty", "", "is not the JSON it should be"),
    ("a list", "[1, 2]", "is not the JSON it should be: it needs to be an object"),
    ("not JSON", "dim: 64", "is not the JSON it should be"),
    ("duplicate keys", '{"dim": 64, "dim": 128}', ".*the key 'dim' comes twice"),
    ("nested without end", "[" * 10**5, "is not the JSON it should be"),
    ("number of a million digits", '{"dim": ' + "9" * 10**6 + "}", "is not the JSON it should be"),
    ("two megabytes", " " * 2**21, "has 2097152 bytes, and may have 1048576"),
):
    simple("params.json", wrong, lambda folder, t=text: (folder / PARAMS).write_text(t),
           f"^{{}}/{PARAMS}: {why}")  # fmt: skip


# -- tokenizer.model


def tokenizer(wrong, change, why):
    simple("tokenizer", wrong, lambda folder: edit(folder, TOKENIZER, change),
           f"^{{}}/{TOKENIZER}.*{why}", command=ASK)  # fmt: skip


def lines(change):
    return lambda data: b"".join(change(data.splitlines(keepends=True)))


tokenizer("bad base64", lambda d: d.replace(b"dzA= 256", b"d!A= 256"), "line 257: bad base64")
tokenizer("a gap in the ranks", lines(lambda x: x[:300] + x[301:]), "line 301: gap in the ranks")
tokenizer("a rank twice", lines(lambda x: [*x, b"eHl6 7\n"]), "duplicate rank 7")
tokenizer("a token twice", lines(lambda x: [*x, b"YQ== 556\n"]), "duplicate token b'a'")
tokenizer("a rank of 5000 digits", lambda d: d + b"eHl6 " + b"5" * 5000, "line 557: not `base64 r")
tokenizer("too few ranks for the model", lines(lambda x: x[:290]),
          "the tokenizer has 546 tokens and the model 812: they belong to ")  # fmt: skip
tokenizer("too many ranks for the model", lambda d: d + b"eHl6 556\n", "has 813 tokens and the mod")
tokenizer("cut in the bytes", lines(lambda x: x[:200]), "has the single byte 0xc8")
tokenizer("cut in a line", lambda d: d[:-7], "line 556: (not `base64 rank`|bad base64)")
tokenizer("a web page", lambda d: b"<html>Log in</html>", "this is an HTML page")
tokenizer("JSON", lambda d: b'{"version": "1.0"}', "this is JSON")
tokenizer("noise", lambda d: bytes(range(256)) * 64, "line 1: not `base64 rank`")


@case("tokenizer", rf"^{{}}/{TOKENIZER}: has 17179869184 bytes", command=ASK)
def sixteen_gigabytes(folder):
    os.truncate(folder / TOKENIZER, 2**34)


@case("tokenizer", "^no tokenizer.model in {}; give tokenizer_path", command=ASK)
def missing(folder):
    (folder / TOKENIZER).unlink()


# -- files that are none


for name, why, command in (
    (SHARD, "is empty", SHOW),
    (TOKENIZER, "line 1: the file is empty", ASK),
):
    simple("empty", name, lambda folder, name=name: (folder / name).write_bytes(b""),
           f"^{{}}/{name}.*{why}", command=command)  # fmt: skip


@case("empty", r"^{}: neither params\.json nor consolidated\.00\.pth is in this folder")
def folder_without_files(folder):
    for file in folder.iterdir():
        file.unlink()


def instead(make):
    def spoil(folder, name):
        (folder / name).unlink()
        make(folder / name)

    return spoil


for kind, make, whys in (
    ("a folder", Path.mkdir, ("not a file but a folder",) * 2 + ("is a directory",)),
    ("a broken link", lambda file: file.symlink_to("gone"),
     ("is a link to gone, which is missing",) * 2 + ("^no tokenizer file at .*",)),
    ("a link to itself", lambda file: file.symlink_to(file.name),
     ("Too many levels of symbolic links",) * 3),
    ("a pipe", os.mkfifo, ("not a file but a device or a pipe",) * 3),
    ("an endless device", lambda file: file.symlink_to("/dev/zero"),
     ("not a file but a device or a pipe",) * 3),
):  # fmt: skip
    for name, why, command in zip((SHARD, PARAMS, TOKENIZER), whys, (SHOW, SHOW, ASK), strict=True):
        simple(kind, name, lambda folder, name=name, make=make: instead(make)(folder, name),
               f"{{}}/{name}.*{why}" if why[0] != "^" else f"{why}{{}}/{name}",
               command=command)  # fmt: skip

for name, command in ((SHARD, SHOW), (PARAMS, SHOW), (TOKENIZER, ASK)):
    simple("unreadable", name, lambda folder, name=name: (folder / name).chmod(0),
           f"^{{}}/{name}: cannot be read: Permission denied", command=command,
           powerless=True)  # fmt: skip


@case("unreadable", "^{}: Permission denied$", powerless=True)
def the_folder(folder):
    folder.chmod(0)


@case("unreadable", f"^{{}}/{SHARD}: cannot be read: Input/output error")
def shard_on_a_failing_disk(folder):
    if not Path("/proc/self/mem").exists():
        pytest.skip("no file here fails to be read")
    instead(lambda file: file.symlink_to("/proc/self/mem"))(folder, SHARD)


# ---- how they are run


def write(folder, shards=1, seed=0, **changes):
    args = tiny_args(**{"vocab_size": 256 + len(WORDS) + 256, "context_length": 512} | changes)
    write_meta(random_checkpoint(args, seed=seed), folder, shards=shards)
    write_tokenizer(folder / TOKENIZER, WORDS)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Whole checkpoints by their number of shards."""
    return {n: write(tmp_path_factory.mktemp("good") / str(n), n) for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def worker():
    """The process of which each command line is a fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hostile_worker.py"))],
        cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


@pytest.fixture
def shell(worker, tmp_path_factory):
    """A function that runs a command line and returns its `Outcome`."""

    def run(*argv, powerless=False, unloadable=False):
        out = tmp_path_factory.mktemp("said")
        task = {"argv": [*map(str, argv)], "out": str(out), "powerless": powerless,
                "unloadable": unloadable}  # fmt: skip
        print(json.dumps(task), file=worker.stdin, flush=True)
        done = json.loads(worker.stdout.readline())
        said = [(out / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return Outcome(done["status"], *said, done["seconds"], done["kib"] / 1024)

    return run


@pytest.fixture(scope="module")
def table():
    """Rows to print at the end: what is wrong, what the user saw, exit status, seconds, MB."""
    rows = []
    yield rows
    print("\n| what is wrong | what the user saw | exit | seconds | MB |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")


def argv_of(command, folder):
    if command == SHOW:
        return "-m", "llama", "info", folder
    return command, "--ckpt_dir", folder


def check_sentence(outcome, pattern):
    assert outcome.status == 1, outcome
    assert outcome.out == ""
    assert re.search(pattern, outcome.error), (pattern, outcome.error)
    assert outcome.error.endswith("\n")
    assert outcome.error.count("\n") == 1
    assert outcome.error[:-1].isprintable()
    assert len(outcome.error) < 600
    assert "Traceback" not in outcome.error
    assert outcome.seconds < SECONDS
    assert outcome.megabytes < MEGABYTES


def record(table, folder, wrong, outcome):
    said = outcome.error.strip().replace(str(folder), "DIR")
    table.append(
        (wrong, said, outcome.status, f"{outcome.seconds:.2f}", f"{outcome.megabytes:.0f}")
    )


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_what_the_cases_break_is_whole(shell, good, shards):
    for command in (SHOW, ASK):
        outcome = shell(*argv_of(command, good[shards]))
        assert (outcome.status, outcome.error) == (0, "")
        assert outcome.out


@pytest.mark.parametrize("one", CASES, ids=lambda one: f"{one.kind}: {one.wrong}")
def test_a_broken_folder_is_one_sentence(shell, good, tmp_path, table, one):
    folder = tmp_path / "weights"
    shutil.copytree(good[one.shards], folder)
    one.spoil(folder)
    if one.powerless and os.geteuid() == 0 and not sys.platform.startswith("linux"):
        pytest.skip("root reads everything, and only on Linux can it be made to lose that")
    try:
        outcome = shell(*argv_of(one.command, folder), powerless=one.powerless)
    finally:
        folder.chmod(0o755)
    record(table, folder, f"{one.kind}: {one.wrong}", outcome)
    check_sentence(outcome, one.says.replace("{}", re.escape(str(folder))))
    assert not (folder / "effect").exists()


def test_there_are_enough_of_each_kind():
    kinds = [one.kind for one in CASES]
    assert len(kinds) >= 25
    for kind in set(kinds):
        assert kinds.count(kind) >= 3, kind
    assert len({(one.kind, one.wrong) for one in CASES}) == len(CASES)


@pytest.mark.parametrize("gadget", [os_system, open_of_a_class_with_reduce, builtins_eval])
def test_the_gadgets_are_live(good, tmp_path, gadget):
    folder = tmp_path / "weights"
    shutil.copytree(good[1], folder)
    gadget(folder)
    with contextlib.suppress(TypeError):  # what eval returns is no dict to put tensors in
        torch.load(folder / SHARD, weights_only=False)
    assert (folder / "effect").exists()


@pytest.mark.parametrize(
    ("command", "name", "says"),
    [
        (SHOW, SHARD, f"^{{}}/{SHARD}: is a web page or XML"),
        (EXAMPLES[0], TOKENIZER, f"^{{}}/{TOKENIZER}, line 1: this is an HTML page"),
        (EXAMPLES[1], PARAMS, f"^{{}}/{PARAMS}: is not the JSON it should be"),
    ],
)
def test_a_process_of_its_own_says_the_same(good, tmp_path, table, command, name, says):
    """The seconds are the processor's: most are for the import of torch, while others may run."""
    folder = tmp_path / "weights"
    shutil.copytree(good[1], folder)
    (folder / name).write_text("<!DOCTYPE html>")
    least = fresh(tmp_path, "-c", "import torch")
    outcome = fresh(tmp_path, *argv_of(command, folder))
    outcome = outcome._replace(megabytes=outcome.megabytes - least.megabytes)
    record(table, folder, f"its own process: a web page as {name}", outcome)
    check_sentence(outcome, says.replace("{}", re.escape(str(folder))))


LAUNCH = """
import json, os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[2:]])
_, status, used = os.wait4(pid, 0)
seconds = used.ru_utime + used.ru_stime
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), seconds, used.ru_maxrss], file)
"""


def fresh(scratch, *argv):
    """The outcome of a new interpreter, with the seconds of the processor and its whole memory.

    A small one starts it: the peak of a process counts what it was a copy of before it began.
    """
    file = scratch / "used"
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCH, str(file), *map(str, argv)],
                          cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)  # fmt: skip
    status, seconds, kib = json.loads(file.read_text())
    return Outcome(status, done.stdout, done.stderr, seconds, kib / 1024)


@pytest.mark.parametrize("command", [SHOW, *EXAMPLES])
def test_debug_lets_the_traceback_through(shell, command):
    plain = shell(*argv_of(command, "nowhere"))
    assert (plain.status, plain.error) == (1, "nowhere: there is no such folder\n")
    outcome = shell(*argv_of(command, "nowhere"), "--debug")
    assert outcome.status == 1
    assert outcome.error.startswith("Traceback (most recent call last):\n")
    assert outcome.error.endswith("\nFileNotFoundError: nowhere: there is no such folder\n")


# ---- bad arguments


PROGRAMS = {
    **{("-m", "llama", name): COMMANDS[name] for name in COMMANDS if name != "download"},
    **{(script,): runpy.run_path(str(ROOT / script))["main"] for script in EXAMPLES},
}
TEXT = None  # nothing that is typed is of the wrong kind
ANY = None  # every number works

# For each option of any program: a value of the wrong kind, one out of range, and their sentences
OPTIONS = {
    "ckpt_dir": (
        TEXT,
        ("nowhere", "^nowhere(: there is no such folder$| does not exist;)|.* in nowhere; give"),
    ),
    "tokenizer_path": (
        ("no://where", "^no://where: cannot be read: "),
        ("nowhere", "^no tokenizer file at nowhere$"),
    ),
    "temperature": (
        ("warm", "^--temperature is 'warm'; it must be a number$"),
        ("-1", "^temperature is -1; it must be a number >= 0"),
    ),
    "top_p": (
        ("most", "^--top_p is 'most'; it must be a number$"),
        ("1.5", r"^top_p is 1\.5; it must be a number > 0 and <= 1$"),
    ),
    "max_seq_len": (
        ("1.5", r"^--max_seq_len is 1\.5; it must be a whole number"),
        ("0", "^max_seq_len=0: must be a positive whole number$"),
    ),
    "max_batch_size": (
        ("many", "^--max_batch_size is 'many'; it must be a whole number$"),
        ("-4", "^max_batch_size=-4: must be a positive whole number$"),
    ),
    "max_gen_len": (
        ("1,2", r"^--max_gen_len is \(1, 2\); it must be a whole number or None$"),
        ("-1", "max_gen_len is -1; it must be "),
    ),
    "seed": (("dice", "^--seed is 'dice'; it must be a whole number$"), ANY),
    "device": (TEXT, ("tpu:x", "^device='tpu:x': use cuda, cuda:N, mps or cpu$")),
    "system": (TEXT, TEXT),
    "text": (TEXT, TEXT),
    "file": (TEXT, ("nowhere", "^nowhere: No such file or directory$")),
    "text_file": (TEXT, ("nowhere", "^nowhere: No such file or directory$")),
    "stop": (TEXT, TEXT),
    "json": (("2", "^--json is 2; it must be True or False$"), ANY),
    "bos": (("2", "^--bos is 2; it must be True or False$"), ANY),
    "decode": (("1,two", "^--decode has 'two'; it must be token ids"), ("9999", "9999 is outside")),
    "window": (
        ("wide", "^--window is 'wide'; it must be a whole number or None$"),
        ("1", "window.* 1[,;:]"),
    ),
    "stride": (
        ("1.5", r"^--stride is 1\.5; it must be a whole number or None$"),
        ("0", "stride.* 0[,;:]"),
    ),
    "shape": (TEXT, ("9B", "^--shape is '9B'; it must be one of 1B, 3B, 8B, 70B$")),
    "rows": (
        ("many", "^--rows is 'many'; it must be whole numbers above 0, as in 1,8,32$"),
        ("8,0", "^--rows is '8,0'; it must be whole numbers above 0, as in 1,8,32$"),
    ),
    "contexts": (
        ("1.5", r"^--contexts is '1\.5'; it must be whole numbers above 0"),
        ("-1", "^--contexts is '-1'; it must be whole numbers above 0"),
    ),
    "lengths": (
        ("long", "^--lengths is 'long'; it must be whole numbers above 0"),
        ("0", "^--lengths is '0'; it must be whole numbers above 0"),
    ),
    "steps": (
        ("few", "^--steps is 'few'; it must be a whole number or None$"),
        ("0", "^--steps is 0; it must be a whole number above 0$"),
    ),
    "to": (TEXT, ("pdf", "^format 'pdf': use one of meta, hf, gguf$")),
    "adapter": (TEXT, ("nowhere", "^nowhere")),
    "dst": (TEXT, (".", r"^\. is not empty; give a new or empty folder$")),
    "shards": (
        ("two", "^--shards is 'two'; it must be a whole number$"),
        ("3", r"^shards=3: does not divide this model; these do: \[1, 2, 4"),
    ),
    "quantize": (TEXT, ("int3", "^quantize='int3': use one of int8, fp8, int4, ")),
    "against": (TEXT, ("nowhere", "^nowhere: there is no such folder$")),
    "plot": (TEXT, ("nowhere/x.png", "^nowhere: there is no such folder$")),
    "kernels": (("2", "^--kernels is 2; it must be True or False$"), ANY),
    "dtype": (TEXT, ("int8", "^dtype='int8': use one of float32, bfloat16, float16$")),
    "model_parallel_size": (
        ("two", "^--model_parallel_size is 'two'; it must be a whole number$"),
        ("3", r"^model_parallel_size=3: these numbers .* can share this model: \[1, 2, 4, 8\]$"),
    ),
}


@pytest.mark.parametrize(
    ("program", "option"),
    [(program, name) for program, main in PROGRAMS.items() for name in signature(main).parameters],
    ids=lambda part: part[-1] if isinstance(part, tuple) else part,
)
def test_a_bad_argument_is_one_sentence_and_nothing_is_loaded(
    shell, good, tmp_path, program, option
):
    """A new option without an entry in OPTIONS fails here."""
    works = {"ckpt_dir": good[1], "dst": tmp_path / "new", "shards": 2,
             "text_file": ROOT / "README.md", "text": "Hello", "to": "meta",
             "quantize": "int8"}  # fmt: skip
    left_out = {option} | ({"text"} if option in ("file", "decode") else set())
    if program[-1] == "convert":  # quantized weights are one file, in the checkpoint's own dtype
        left_out |= {"quantize"} if option != "device" else {"shards"}
        left_out |= {"shards"} if option == "quantize" else set()
    for name in left_out:
        works.pop(name, None)
    names = signature(PROGRAMS[program]).parameters
    base = [f"--{name}={value}" for name, value in works.items() if name in names]
    for bad in OPTIONS[option]:
        if bad is not None:
            outcome = shell(*program, *base, f"--{option}={bad[0]}", unloadable=True)
            check_sentence(outcome, bad[1])


def test_every_case_of_an_option_is_of_an_option_that_is_there():
    there = {name for main in PROGRAMS.values() for name in signature(main).parameters}
    assert set(OPTIONS) <= there
