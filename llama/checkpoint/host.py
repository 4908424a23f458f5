"""The memory of a machine that is not Linux: macOS and Windows.

Knows what these systems call it, and nothing of models. The surprising thing: where nobody says how
much is free, there is always enough; a plan that cannot be checked is no reason not to run.
"""

import ctypes
import os

UNKNOWN = 2**62  # bytes


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
