"""What peers may use: of one connection, and of all of a server's together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..packets.framer import Packet
    from .connection import Connection

ALONE = 5.0  # seconds
PACKET_COST = 256  # bytes that Python needs for a Packet and its payload beside the payload's own


def cost(packet: Packet) -> int:
    """Bytes that a packet counts for."""
    return len(packet.payload) + PACKET_COST


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What peers may use. Sizes in bytes, times in seconds (None: for ever).

    Attributes:
        connections: at once; one more is closed at once and counted.
        connection_bytes, total_bytes: packets that wait, and packets under way; of one connection, of all.
        idle: a connection that is read, and from which nothing comes for so long, is closed.
        packet: so long after its first byte a packet must be whole, if it was read meanwhile.
        send: so long a peer may leave what is sent to it unread.
        handshake: for TLS, and for the answer to a challenge.
    """

    connections: int = 10_000
    connection_bytes: int = 4 << 20
    total_bytes: int = 256 << 20
    idle: float | None = None
    packet: float | None = 60.0
    send: float | None = 60.0
    handshake: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")


class Budget:
    """The memory of all connections of a server together.

    Over the limit nobody is read until half of it is free. If nobody has a packet that could be taken, then all of it
    is packets under way, and one connection after the other is read alone until its packet is whole; it has ALONE
    seconds for that.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0  # bytes, all in all
        self.takeable = 0  # of these, packets that somebody takes or will take
        self.peak = 0
        self.alone: Connection | None = None
        self._members: dict[Connection, None] = {}
        self._over = False

    def join(self, connection: Connection) -> None:
        self._members[connection] = None
        if self._over:
            connection.hold("total")

    def leave(self, connection: Connection) -> None:
        self._members.pop(connection, None)
        if self.alone is connection:
            self.alone = None
        self.settle()

    def settle(self) -> None:
        """Somebody has more or less than before."""
        if self.used > self.peak:
            self.peak = self.used
        if not self._over:
            if self.used <= self.limit:
                return
            self._over = True
            for member in self._members:
                member.hold("total")
        elif self.used <= self.limit // 2:
            self._over, self.alone = False, None
            for member in list(self._members):
                member.let_go("total")
            return
        if self.takeable:
            if self.alone is not None:
                self.alone.hold("total")
                self.alone = None
        elif self.alone is None:
            self.alone = next((m for m in self._members if m.framer.pending and not m.ended), None)
            if self.alone is not None:
                self.alone.let_go("total")
