"""Command lines of this library in a Python without what only Linux or only Unix has, but that each
runs in a fork of this process, which imports torch for all of them.

`other_system.py JSON`: a list of command lines; what comes back is a list of their outcomes."""

import builtins
import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback

MODULES = ("termios", "fcntl", "resource", "pwd", "grp", "tty", "pty", "readline")
GONE = {
    os: ("sysconf", "sysconf_names", "sched_getaffinity", "getuid", "geteuid", "killpg", "getpgid",
         "tcgetpgrp", "uname", "pread", "posix_fadvise", "statvfs", "mkfifo", "getloadavg", "nice",
         "setsid"),
    signal: ("SIGALRM", "SIGUSR1", "SIGHUP", "SIGKILL", "SIGPIPE", "alarm", "setitimer"),
    time: ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC", "clock_gettime"),
}  # fmt: skip


def refusing(real):
    def read(path, *args, **kwargs):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, *args, **kwargs)

    return read


def outcome(argv, main):
    """Status, stdout and stderr of a command line to which somebody types a greeting."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        files[0].write("hello\n")
        files[0].seek(0)
        child = os.fork()
        if child == 0:
            for number, file in enumerate(files):
                os.dup2(file.fileno(), number)
            os._exit(status_of(argv, main))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in files:
            file.seek(0)
        return status, files[1].read(), files[2].read()


def status_of(argv, main):
    sys.argv, status = ["llama", *argv], 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.modules |= dict.fromkeys(MODULES)
    import torch  # noqa: F401  # which has its own ways on each system

    for module, names in GONE.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    builtins.open = io.open = refusing(open)
    pathlib.Path.read_text = refusing(pathlib.Path.read_text)
    from llama.__main__ import main

    print(json.dumps([outcome(argv, main) for argv in json.loads(sys.argv[1])]))
