"""Requests in, events out: the one loop that generates. Ids only; it knows no text."""

from llama.engine.engine import Engine
from llama.engine.protocol import Runner
from llama.engine.request import Choice, Event, Request

__all__ = ["Choice", "Engine", "Event", "Request", "Runner"]
