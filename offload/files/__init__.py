"""Resources on disk, each on its own loop thread."""

from .aio import open
from .packet_file import FrameSource, PacketFile
from .packet_stream import PacketReader, PacketWriter
from .sink import FileSink

__all__ = ["FileSink", "FrameSource", "PacketFile", "PacketReader", "PacketWriter", "open"]
