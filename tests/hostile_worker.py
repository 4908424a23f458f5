"""Runs command lines, each in a fork of this process, which has imported torch and llama once.

One JSON object a line on standard input: `argv`; `out`, a folder for stdout and stderr; `powerless`
to lose what root may do beyond others; `unloadable` to fail where weights would be loaded. One JSON
object a line comes back: the exit status (-N: ended by signal N), seconds, and the peak of memory
in KiB above that of a process that has imported torch.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback

import torch  # noqa: F401

with_torch = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

from llama.commands import COMMANDS  # noqa: E402
from llama.loading import Prepared  # noqa: E402

for name in COMMANDS:
    if name != "download":  # which needs no torch
        COMMANDS[name]  # imports it


def powerless():
    """Drop the capabilities that let root read what its mode forbids (Linux)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def unloadable(*args, **kwargs):
    raise AssertionError("weights were to be loaded")


def command_line(argv):
    """As the interpreter does it; returns the exit status."""
    try:
        if argv[:2] == ["-m", "llama"]:
            sys.argv = argv[1:]
            runpy.run_module("llama", run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(task):
    status = 99
    try:
        signal.alarm(30)
        for target, name, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, os.path.join(task["out"], "stdout"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, os.path.join(task["out"], "stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(name, flags), target)
        if task["powerless"]:
            powerless()
        if task["unloadable"]:
            Prepared.load = unloadable
        status = command_line(task["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def measured(run):
    """(exit status, seconds, peak KiB) of a fork that runs a function."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        run()
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start, usage.ru_maxrss


def main():
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - with_torch
    nothing = measured(lambda: None)[2]
    for line in sys.stdin:
        task = json.loads(line)
        status, seconds, peak = measured(lambda task=task: child(task))
        grown = peak - nothing + imports
        print(json.dumps({"status": status, "seconds": seconds, "kib": grown}), flush=True)


if __name__ == "__main__":
    main()
