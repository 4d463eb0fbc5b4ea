"""Segments of a packet file: when one is sealed and the next begun, and what becomes of those that are sealed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segments:
    """When a packet file is sealed and the next segment begun, and what becomes of sealed segments.

    Not on Windows, where a file that is open cannot get another name. A segment with its frames of content alone is at
    most `max_bytes`, unless one frame is larger (a merge reads up to 1 MiB at once); what closes it comes on top. One
    that would hold little but the states of very many sources may grow to twice those.

    Args:
        max_bytes: a segment is sealed before it would grow over this; None: however large.
        max_age: seconds from its first frame to its seal; None: however old. One that holds nothing new is not sealed.
        compress: sealed segments are packed with zstd (needs the extra `offload[zstd]`).
        keep_bytes: of sealed segments together, as they are on the disk; the oldest go first. None: all are kept.
        keep_age: seconds since its seal for which a segment is kept; None: for ever.
    """

    max_bytes: int | None = None
    max_age: float | None = None
    compress: bool = False
    keep_bytes: int | None = None
    keep_age: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_age", "keep_bytes", "keep_age"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")

    @property
    def are_kept(self) -> bool:
        """Whether anything is done about segments that are sealed."""
        return self.compress or self.keep_bytes is not None or self.keep_age is not None
