"""A program on a pseudo-terminal: what a person would type into it, and what they would see."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CTRL_C, CTRL_D = "\x03", "\x04"


class Session:
    """`command` with a terminal of its own, as its controlling one; `seen` is all it has shown."""

    def __init__(self, command, **environment):
        self.keyboard, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {**os.environ, "TERM": "xterm", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**settings, **environment},
            cwd=ROOT,
        )
        os.close(there)
        self.seen, self._read = "", 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)

    def type(self, text):
        os.write(self.keyboard, text.encode())

    def wait_for(self, pattern, seconds=60):
        """The match of `pattern` in what has come since the last one; fails with all that came."""
        deadline = time.monotonic() + seconds
        while not (match := re.compile(pattern, re.S).search(self.seen, self._read)):
            assert self._more(deadline), f"no {pattern!r} in\n{self.seen}"
        self._read = match.end()
        return match

    def press(self, key, pattern, times=10):
        """Press a key until `pattern` comes, as a person does: readline sleeps over a Ctrl-C that
        falls between its prompt and its select."""
        for _ in range(times - 1):
            self.type(key)
            try:
                return self.wait_for(pattern, 5)
            except AssertionError:
                continue
        self.type(key)
        return self.wait_for(pattern)

    def end(self, seconds=60):
        """Read to the end; the exit status."""
        deadline = time.monotonic() + seconds
        while self._more(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _more(self, deadline):
        if not select.select([self.keyboard], [], [], max(0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self.keyboard, 65536)
        except OSError:  # nobody holds the other end any more
            return False
        self.seen += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)

    @property
    def plain(self):
        """What was seen, without the codes for colours and the like."""
        return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07)", "", self.seen)
