"""A command line of this library in a Python without what only Linux or only Unix has."""

import builtins
import io
import os
import pathlib
import signal
import sys
import time

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

    main()
