"""Many growing files in, one packet file out; and out of it again."""

from .engine import Merge, Progress
from .sources import Sources

__all__ = ["Merge", "Progress", "Sources"]
