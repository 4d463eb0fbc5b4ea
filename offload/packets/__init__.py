"""Bytes to packets and back: the packet file's frames. No asyncio, no threads, no open(), no clock."""

from .codec import Damage, Frame, Header, PacketDecoder, encode
from .format import Flag, FrameType, GapReason
from .ledger import Ledger, SourceState
from .recover import Recovery, recover

__all__ = [
    "Damage",
    "Flag",
    "Frame",
    "FrameType",
    "GapReason",
    "Header",
    "Ledger",
    "PacketDecoder",
    "Recovery",
    "SourceState",
    "encode",
    "recover",
]
