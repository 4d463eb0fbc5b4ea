"""Threads that run an event loop, and calls between loops."""

from .call import Call, CallState, outlast
from .thread import LoopThread, Stats

__all__ = ["Call", "CallState", "LoopThread", "Stats", "outlast"]
