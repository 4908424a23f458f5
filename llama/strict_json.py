"""A small JSON file that somebody else wrote, read so that it can do no harm.

Knows no keys. The surprising thing: a key that comes twice is an error. Readers differ in which of
the two they take, and so would what they load.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any


def read_json(file: Path, limit: int = 2**20) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes, no key twice; ValueError names the file.

    Raises FileNotFoundError where there is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {key!r:.60} comes twice")
        return found

    try:
        if not file.is_file() and file.exists():
            raise ValueError("it is no file")
        if file.stat().st_size > limit:
            raise ValueError(f"it is larger than {limit / 2**20:g} MiB")
        read = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not the JSON it should be: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file}: needs to be an object of keys and values, is {read!r:.40}")
    return read
