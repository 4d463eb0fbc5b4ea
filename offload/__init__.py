"""Blocking resources on threads with event loops of their own.

A name is imported when it is first used, so that a program pays for what it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .debug.slow import SlowCallbackDetector as SlowCallbackDetector
    from .debug.slow import may_block as may_block
    from .debug.slow import run as run
    from .debug.slow import watch as watch
    from .errors import BrokenResourceError as BrokenResourceError
    from .errors import BusyResourceError as BusyResourceError
    from .errors import ClosedResourceError as ClosedResourceError
    from .errors import DeadlockError as DeadlockError
    from .errors import ForkedError as ForkedError
    from .errors import OffloadError as OffloadError
    from .errors import PacketError as PacketError
    from .errors import PacketTooLargeError as PacketTooLargeError
    from .errors import QueueFullError as QueueFullError
    from .files.aio import open as open
    from .files.logs import LogHandler as LogHandler
    from .files.packet_stream import PacketReader as PacketReader
    from .files.packet_stream import PacketWriter as PacketWriter
    from .files.rotation import Rotation as Rotation
    from .files.segments import Segments as Segments
    from .files.sink import FileSink as FileSink
    from .files.sink import SinkStats as SinkStats
    from .loops.call import Call as Call
    from .loops.call import CallState as CallState
    from .loops.calls import Calls as Calls
    from .loops.calls import Stats as Stats
    from .loops.resource import Handle as Handle
    from .loops.resource import Resource as Resource
    from .loops.service import Service as Service
    from .loops.service import method as method
    from .loops.thread import LoopThread as LoopThread
    from .merge.by_time import ByTime as ByTime
    from .merge.embedded import EmbeddedMerge as EmbeddedMerge
    from .merge.embedded import EmbeddedMerge as merge
    from .merge.engine import Merge as Merge
    from .merge.progress import Progress as Progress
    from .merge.sources import Sources as Sources
    from .merge.tailing import Batch as Batch
    from .merge.tailing import tail as tail
    from .net.auth import client_context as client_context
    from .net.auth import server_context as server_context
    from .net.client import Send as Send
    from .net.connection import Connection as Connection
    from .net.dial import connect as connect
    from .net.fanout import Fanout as Fanout
    from .net.limits import Limits as Limits
    from .net.server import PacketServer as PacketServer
    from .net.server import ServerStats as ServerStats
    from .packets.framer import Framer as Framer
    from .packets.framer import Packet as Packet
    from .packets.framing import LineFramer as LineFramer
    from .packets.framing import OctetFramer as OctetFramer
    from .packets.framing import PrefixFramer as PrefixFramer
    from .verify.check import Check as Check
    from .verify.check import Verdict as Verdict
    from .verify.order import VerifierStats as VerifierStats
    from .verify.verifier import Verifier as Verifier
    from .verify.workers import Digest as Digest

_WHERE = {
    # loops
    "Call": "loops.call",
    "CallState": "loops.call",
    "Calls": "loops.calls",
    "Handle": "loops.resource",
    "LoopThread": "loops.thread",
    "Resource": "loops.resource",
    "Service": "loops.service",
    "method": "loops.service",
    "Stats": "loops.calls",
    # debug
    "SlowCallbackDetector": "debug.slow",
    "may_block": "debug.slow",
    "run": "debug.slow",
    "watch": "debug.slow",
    # files
    "FileSink": "files.sink",
    "LogHandler": "files.logs",
    "PacketReader": "files.packet_stream",
    "PacketWriter": "files.packet_stream",
    "Rotation": "files.rotation",
    "Segments": "files.segments",
    "SinkStats": "files.sink",
    "open": "files.aio",
    # merge
    "Batch": "merge.tailing",
    "EmbeddedMerge": "merge.embedded",
    "ByTime": "merge.by_time",
    "Merge": "merge.engine",
    "Progress": "merge.progress",
    "Sources": "merge.sources",
    "merge": "merge",
    "tail": "merge.tailing",
    # packets
    "Framer": "packets.framer",
    "LineFramer": "packets.framing",
    "OctetFramer": "packets.framing",
    "Packet": "packets.framer",
    "PrefixFramer": "packets.framing",
    # net
    "Connection": "net.connection",
    "Fanout": "net.fanout",
    "Limits": "net.limits",
    "PacketServer": "net.server",
    "Send": "net.client",
    "ServerStats": "net.server",
    "client_context": "net.auth",
    "connect": "net.dial",
    "server_context": "net.auth",
    # verify
    "Check": "verify.check",
    "Digest": "verify.workers",
    "Verdict": "verify.check",
    "Verifier": "verify.verifier",
    "VerifierStats": "verify.order",
    # errors
    "BrokenResourceError": "errors",
    "BusyResourceError": "errors",
    "ClosedResourceError": "errors",
    "DeadlockError": "errors",
    "ForkedError": "errors",
    "OffloadError": "errors",
    "PacketError": "errors",
    "PacketTooLargeError": "errors",
    "QueueFullError": "errors",
}

__all__ = [
    "Batch",
    "BrokenResourceError",
    "BusyResourceError",
    "ByTime",
    "Call",
    "CallState",
    "Calls",
    "Check",
    "ClosedResourceError",
    "Connection",
    "DeadlockError",
    "Digest",
    "EmbeddedMerge",
    "Fanout",
    "FileSink",
    "ForkedError",
    "Framer",
    "Handle",
    "Limits",
    "LineFramer",
    "LogHandler",
    "LoopThread",
    "Merge",
    "OctetFramer",
    "OffloadError",
    "Packet",
    "PacketError",
    "PacketReader",
    "PacketServer",
    "PacketTooLargeError",
    "PacketWriter",
    "PrefixFramer",
    "Progress",
    "QueueFullError",
    "Resource",
    "Rotation",
    "Segments",
    "Send",
    "ServerStats",
    "Service",
    "SinkStats",
    "SlowCallbackDetector",
    "Sources",
    "Stats",
    "Verdict",
    "Verifier",
    "VerifierStats",
    "__version__",
    "client_context",
    "connect",
    "may_block",
    "merge",
    "method",
    "open",
    "run",
    "server_context",
    "tail",
    "watch",
]


if not TYPE_CHECKING:  # a checker should find a misspelt name

    def __getattr__(name: str) -> Any:
        where = _WHERE.get(name)
        if where is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f"{__name__}.{where}")
        value = globals()[name] = module if where == name else getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
