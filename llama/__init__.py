"""Llama weights on disk to tokens: the public names.

The surprising thing: they are imported when they are first used, and torch with them, so that a
command line, or a word of help, need not wait for it.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.generation import Llama
    from llama.model import ModelArgs, Transformer
    from llama.sampling import SamplingParams
    from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

__version__ = "0.1.0"

__all__ = [
    "ChatFormat",
    "Dialog",
    "Llama",
    "Message",
    "ModelArgs",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
]

_HOMES = {
    "Llama": "generation",
    "ModelArgs": "model",
    "SamplingParams": "sampling",
    "Transformer": "model",
}


def __getattr__(name: str) -> object:
    """A public name, or a module of this package, on its first use."""
    if name in __all__:
        home = importlib.import_module(f"llama.{_HOMES.get(name, 'tokenizer')}")
        value: object = getattr(home, name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"llama.{name}"):
        return importlib.import_module(f"llama.{name}")
    raise AttributeError(f"module 'llama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
