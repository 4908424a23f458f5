"""Whether a path can be read as a file, said before anything waits for it or fills the memory.

Knows no format. The surprising thing: opening a pipe waits until somebody writes, and a device may
never end, so that what is not a plain file is refused by what it is, unread.
"""

import os
import stat


def check_file(path: str | os.PathLike[str], largest: int | None = None) -> None:
    """Raise where `path` is not a file, or one of more than `largest` bytes.

    FileNotFoundError where nothing is there, and ValueError else. Whether the file may be read is
    not asked.
    """
    name = os.fspath(path)
    try:
        status = os.stat(name)
    except FileNotFoundError:
        if os.path.islink(name):
            raise ValueError(f"{name} is a link to {os.readlink(name)}, which is missing") from None
        raise FileNotFoundError(f"{name} is missing") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{name} is not a file but a folder")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name} is not a file but a device or a pipe")
    if largest is not None and status.st_size > largest:
        raise ValueError(
            f"{name}: has {status.st_size} bytes, and may have {largest}: it is larger than "
            f"{largest / 2**20:g} MiB"
        )
