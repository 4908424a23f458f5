"""A small JSON file that somebody else wrote, read so that it can do no harm.

Knows no keys. The surprising thing: a key that comes twice is an error. Readers differ in which of
the two they take, and so would what they load.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llama.files.plain import check_file


def read_json(file: Path, limit: int = 2**20) -> dict[str, Any]:
    """Read the object in a JSON file of at most `limit` bytes; ValueError names the file.

    Raises FileNotFoundError where there is none.
    """
    check_file(file, limit)
    try:
        return parse_object(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not the JSON it should be: {error}") from error


def parse_object(text: str) -> dict[str, Any]:
    """Parse an object of JSON, with no key twice in any object of it; ValueError for anything
    else."""
    parsed = json.loads(text, object_pairs_hook=_once)
    if not isinstance(parsed, dict):
        raise ValueError(f"it needs to be an object of keys and values, is {parsed!r:.40}")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r:.60} comes twice")
    return found
