"""Where the processes of a run find each other, what is said while some have not come, and the end
of one that would wait for another that is gone.

Knows sockets and torch's key-value store; refuses to know models, devices and where ranks and
addresses come from. The surprising thing: a rank waits for all the others before there is any
group, and a process that was never meant to be a rank, but found the variables of an earlier run in
its environment, waits for ever; so a wait is said after seconds, with names.
"""

import atexit
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

QUIET = 5.0  # seconds of waiting for ranks that have not started, before this is said
ARRIVAL = 300.0  # seconds in which all of them must have started
BEAT = 1.0  # seconds between two signs of life
PATIENCE = timedelta(seconds=6)  # without one from everybody, a rank is taken for gone
GRACE = 2.0  # seconds that a step may take to end or fail by itself after that


class RankError(OSError, RuntimeError):
    """Another rank failed, or never came: nothing is wrong with what this one was given."""


@dataclass(frozen=True)
class Place:
    """One process of a run, and where all of them meet."""

    rank: int
    world: int  # how many ranks there are
    host: str  # of rank 0
    port: int  # on which rank 0 listens
    hint: str  # what a person can do about a wait


def meet(at: Place, torchrun_listens: bool) -> Store:
    """Wait until every rank has come. Raises RankError where some do not, ValueError where rank 0
    cannot listen."""
    wait = _Wait(at)
    store = _store(at, torchrun_listens, wait)
    store.set(f"llama/{at.rank}", "here")
    absent = list(range(at.world))
    while absent := [each for each in absent if not store.check([f"llama/{each}"])]:
        wait.pause(f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}")
    return store


class _Wait:
    """A wait for other ranks, reported after some seconds and each minute, that ends with an error
    after ARRIVAL seconds."""

    def __init__(self, at: Place) -> None:
        self.who = f"rank {at.rank} of {at.world}"
        self.address = f"{at.host}:{at.port}"
        self.hint = at.hint
        self.began = time.monotonic()
        self.said = QUIET - 60

    def pause(self, whom: str) -> None:
        seconds = time.monotonic() - self.began
        if seconds > ARRIVAL:
            raise RankError(
                f"{self.who} waited {seconds:.0f} s at {self.address} for {whom}: {self.hint}"
            )
        if seconds - self.said >= 60:
            self.said = seconds
            self.say(whom)
        time.sleep(0.02)

    def say(self, whom: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(f"{self.who} waits at {self.address} for {whom}: {self.hint}\n")
            sys.stderr.flush()


def _store(at: Place, torchrun_listens: bool, wait: _Wait) -> Store:
    """The key-value store of the run: torchrun's, or that of rank 0.

    torch's own wait for whoever listens there is silent, deaf to Ctrl-C, and ends in a page of C++
    frames; so it begins when somebody does.
    """
    patience = timedelta(seconds=ARRIVAL)
    if torchrun_listens:
        store: Store = next(rendezvous("env://", timeout=patience))[0]
        return store
    listening = None if at.rank else _listen(at.port)
    while True:
        try:
            socket.create_connection((at.host, at.port), 1.0).close()
            break
        except OSError as error:
            wait.pause(f"{'rank 0' if at.rank else 'itself'} ({error.strerror or error})")
    silent = "rank 0, but something else seems to listen there"
    stranger = threading.Timer(QUIET, wait.say, [silent])
    stranger.daemon = True
    stranger.start()
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            at.host,
            at.port,
            at.world,
            is_master=at.rank == 0,
            timeout=patience,
            wait_for_workers=False,
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except RuntimeError as error:
        raise RankError(f"{wait.who} found no other at {wait.address}: {at.hint}") from error
    finally:
        stranger.cancel()


def _listen(port: int) -> socket.socket:
    """A socket that listens on every address of this machine."""
    why: object = None
    for family in (socket.AF_INET6, socket.AF_INET):
        both = family == socket.AF_INET6
        if both and not socket.has_dualstack_ipv6():
            continue
        try:
            return socket.create_server(
                ("", port), family=family, backlog=1024, dualstack_ipv6=both
            )
        except OSError as error:
            why = os.strerror(error.errno or 0)
    raise ValueError(
        f"MASTER_PORT={port} stands in the environment, and rank 0 cannot listen there ({why}): "
        "choose another, or start with torchrun, which finds one"
    )


class Watch(threading.Thread):
    """Ends this process where it would wait for ever for a rank that is gone.

    A collective of gloo fails when its partner dies. One of NCCL, or one over a cable that was cut,
    just waits. So the ranks exchange a sign of life every second; when one is missing, and this
    rank waits for the others and does not get on, nothing can come any more, and the process exits.
    Where it does not wait for anybody nothing is done: it will notice when it does. With the sign
    of life each rank says whether it `failed` in a step, in which the others wait for it as well.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        super().__init__(name="llama-watch", daemon=True)
        self.rank, self.size, self.group = rank, size, group
        self.waiting_since: float | None = None
        self.failed = False
        self._leaving = threading.Event()
        atexit.register(self.leave)

    def run(self) -> None:
        try:
            while not self._leaving.wait(BEAT):
                dist.monitored_barrier(self.group, PATIENCE, wait_all_ranks=True)
                failed = torch.tensor([self.rank if self.failed else self.size], device="cpu")
                dist.all_reduce(failed, dist.ReduceOp.MIN, self.group)
                if int(failed) < self.size and not self.failed:
                    raise RuntimeError(f"rank {int(failed)} failed in a step")
        except RuntimeError as error:
            began = self.waiting_since
            while not self._leaving.wait(GRACE):
                if began is not None and began == self.waiting_since:
                    self.end(str(error))
                began = self.waiting_since

    def end(self, error: str) -> None:
        sys.stderr.write(lost(self.rank, self.size, error) + "\n")
        sys.stderr.flush()
        os._exit(1)  # the main thread waits inside a driver and cannot be told

    def leave(self) -> None:
        """Wait for the last beat: a thread inside gloo when Python ends aborts the process."""
        self._leaving.set()
        self.join()  # a beat, or PATIENCE where another rank hangs
        time.sleep(0.2)  # gloo's own threads may still be letting go of the last tensors


def lost(rank: int, size: int, error: str) -> str:
    """The sentence for a rank that finds itself alone."""
    first = error.split("\n")[0]
    return f"rank {rank} of {size} lost another rank, whose own output says why: {first}"
