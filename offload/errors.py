"""Every error that offload raises, in one tree.

    OffloadError
    ├── ClosedResourceError   you closed it (also a ValueError, as for a closed file in `io`)
    ├── BrokenResourceError   its thread, loop or disk is gone; `__cause__` says why
    │   └── ForkedError       it belongs to the parent process
    ├── BusyResourceError     somebody else has it
    ├── QueueFullError        no room, and the call asked for no wait
    ├── DeadlockError         the wait could never end
    └── PacketError           bad bytes, and where (also a ValueError)
        └── PacketTooLargeError

An exception raised by your own function is never wrapped: it reaches the caller as it is.
A message says what was found, what was expected and what to do.
"""


class OffloadError(RuntimeError):
    """The base of the tree: `except OffloadError` catches all of offload's own errors."""


class ClosedResourceError(OffloadError, ValueError):
    """The resource was closed by its user; the call was not begun."""


class BrokenResourceError(OffloadError):
    """The resource's thread, event loop or disk is gone. `__cause__` says why, where that is known."""


class ForkedError(BrokenResourceError):
    """The resource's thread lives in the parent process; a forked child must open its own."""


class BusyResourceError(OffloadError):
    """Somebody else uses what can have one user only, for example a packet file's second writer."""


class QueueFullError(OffloadError):
    """The queue is at its bound and the call asked not to wait; nothing was queued."""


class DeadlockError(OffloadError):
    """A blocking wait on the very thread that would have to do the work."""


class PacketError(OffloadError, ValueError):
    """Bytes that are no packet.

    Attributes:
        offset: where the fault begins, in bytes from the start of the file or stream.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message, offset)
        self.message = message
        self.offset = offset

    def __str__(self) -> str:
        return f"byte {self.offset}: {self.message}"


class PacketTooLargeError(PacketError):
    """A payload over the limit; nothing was written."""
