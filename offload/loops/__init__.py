"""Threads that run an event loop, and calls between loops."""

from .call import Call, CallState, outlast
from .calls import Stats
from .thread import LoopThread

__all__ = ["Call", "CallState", "LoopThread", "Stats", "outlast"]
