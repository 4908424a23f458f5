"""Llama weights on disk to tokens: the public names."""

from llama.generation import Llama
from llama.model import ModelArgs, Transformer
from llama.sampling import SamplingParams
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

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
