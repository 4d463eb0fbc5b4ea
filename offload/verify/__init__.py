"""Ordered checks of packets, off the event loop: on threads, in processes, or on any concurrent.futures.Executor."""

from .order import Check, Verdict
from .verifier import Verifier, VerifierStats
from .workers import Digest

__all__ = ["Check", "Digest", "Verdict", "Verifier", "VerifierStats"]
