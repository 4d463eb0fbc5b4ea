"""Bytes to packets and back: the packet file's frames. No asyncio, no threads, no open(), no clock."""

from .codec import Damage, Frame, Header, PacketDecoder, encode
from .format import Flag, FrameType, GapReason
from .recover import Ledger, Recovery, SourceState, recover

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
