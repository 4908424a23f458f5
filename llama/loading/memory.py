"""How much memory this process may still take, on a device or of the machine itself.

Knows how Linux, its control groups, macOS, Windows and GPUs say it, and nothing of models. The
surprising thing: where nobody says how much is free, there is always enough; a plan that cannot be
checked is no reason not to run.
"""

import ctypes
import os
from pathlib import Path

import torch

UNKNOWN = 2**62  # bytes


def free_memory(device: torch.device | str, sharing: int = 1) -> int:
    """Bytes that this process may still take on `device`.

    sharing: how many processes of this run share it, each with an equal part. On a CPU the pages
    that the system can drop count as free, and a cgroup's limit holds.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = min(_system_memory(), _cgroup_memory())
    return max(0, int(free)) // sharing


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return memory_of_others()


def _cgroup_memory() -> int:
    """What the limits of the control groups above this process leave; very much where there are
    none.
    """
    left = UNKNOWN
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder == root.parent:
                break
            left = min(left, _cgroup_left(folder, *names))
    return left


def _cgroup_left(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        used = int((folder / usage).read_text(encoding="ascii"))
        stat = dict(
            line.split()
            for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        )
    except (OSError, ValueError):
        return UNKNOWN
    return UNKNOWN if most == "max" else int(most) - used + int(stat.get(reclaimable, 0))


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX, which GlobalMemoryStatusEx fills in."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "total_page", "page")),
        *((name, ctypes.c_uint64) for name in ("total_virtual", "virtual", "extended")),
    )


def memory_of_others() -> int:
    """Bytes that a process may still take, as sysconf or Windows says; UNKNOWN where neither does.

    macOS does not say what is available, and then it is all that there is.
    """
    names = getattr(os, "sysconf_names", {})
    pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
    if pages is not None:
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return UNKNOWN
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    try:
        kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
        found = kernel.GlobalMemoryStatusEx(ctypes.byref(status))
    except (AttributeError, OSError):
        return UNKNOWN
    return int(status.available) if found else UNKNOWN
