"""Ordered checks of packets, off the event loop: on threads, in processes, or on any concurrent.futures.Executor."""

from .check import Check, Verdict
from .order import VerifierStats
from .verifier import Verifier
from .workers import Digest

__all__ = ["Check", "Digest", "Verdict", "Verifier", "VerifierStats"]
