"""Digests of one connection's packets, checked off the loop by a Verifier, in order.

    framer ─► Checks ─► queue of the connection
                └─ payloads from CHECK_BYTES up: on the Verifier's threads or processes; below, the framer has checked

Promises:
    - Packets come out in the order in which they went in, whatever is checked first, and none before it is found right.
    - A wrong digest is the framer's fault like any other: with "close" what stood before it is given out, and nothing
      behind it; otherwise that packet alone is left out. The error names the packet's byte.
    - What is here counts as the connection's memory. When the connection ends, what no worker has is dropped; what one
      has under way (2 MiB for each worker at most) is let go when that is through.

All on the connection's loop, which the Verifier's workers only wake.

This is for a loop that goes on. A digest as quick as sha256 (64 KiB in 30 µs, with the CPU's own instructions) gains
no throughput: where a sender and the server share two cores a third was lost. A costly one is worth the way.
"""

from __future__ import annotations

import asyncio
from collections import deque

from ..errors import BrokenResourceError
from ..packets.framer import Framer, Packet
from ..verify import Check, Verdict, Verifier
from .limits import cost

CHECK_BYTES = 8 << 10  # below, a digest by name costs less than the way to another thread (bench_verify.py)


class Checks:
    """The packets of one connection that are checked, or wait behind one that is.

    Args:
        verifier: opened; it must give what the framer's digest is.
        framer: of the connection.

    Attributes:
        bytes: what is here counts for.
    """

    def __init__(self, verifier: Verifier[bytes], framer: Framer) -> None:
        self.bytes = 0
        self._verifier = verifier
        self._framer = framer
        # A function may take any time, whatever the packet's size.
        framer.check_below = CHECK_BYTES if isinstance(framer.digest, str) else 0
        self._packets: deque[tuple[Packet, Check[Verdict[bytes]] | None]] = deque()

    def __len__(self) -> int:
        return len(self._packets)

    def put(self, packets: list[Packet]) -> None:
        """Have them checked. Raises OffloadError: the verifier takes none; nor is the first that it refused here."""
        below, check = self._framer.check_below, self._verifier.check
        for packet in packets:
            doing = None if len(packet.payload) < below else check(packet.payload, packet.digest)
            self._packets.append((packet, doing))
            self.bytes += cost(packet)

    async def wait(self) -> None:
        """Wait until the first one is checked; cancelling it leaves all as it is."""
        check = self._packets[0][1]
        if check is not None and not check.done():
            await asyncio.wait([check])

    def take(self) -> tuple[list[Packet], Exception | None]:
        """Those that are found right, as far as they are checked, and what ends the stream behind them."""
        good: list[Packet] = []
        while self._packets and ((check := self._packets[0][1]) is None or check.done()):
            packet, _ = self._packets.popleft()
            self.bytes -= cost(packet)
            try:
                if check is None or (verdict := check.result()):
                    good.append(packet)
                    continue
                self._framer.reject(packet, f"digest is {_hex(verdict.found)}, expected {_hex(verdict.expected)}")
            except (Exception, asyncio.CancelledError) as exc:
                if isinstance(exc, asyncio.CancelledError):
                    exc = BrokenResourceError(f"the check of the packet at byte {packet.offset} was cancelled")
                self.drop()
                return good, exc
        return good, None

    def drop(self) -> None:
        """Nobody wants them any more."""
        for _, check in self._packets:
            if check is not None and not check.cancel() and not check.cancelled():
                check.exception()  # asyncio tells of errors that nobody has looked at
        self._packets.clear()
        self.bytes = 0


def _hex(digest: object) -> str:
    return digest.hex() if isinstance(digest, bytes) else repr(digest)
