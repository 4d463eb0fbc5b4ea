"""`offload.merge`: a merge beside a block of the user's program.

    async with offload.merge(["logs/"], "merged.opk", follow=True) as merge:     threads: reader, writer
        …                                                                        ────────────────────────
        await merge.caught_up()        all that was there is in the file         reading, writing, fsync
    # left: drained, synced, closed                                              ended

Promises:
    - The block begins once the packet file is open; from then on the merge runs on its own threads.
    - Leaving the block stops a merge that follows as `stop()` does, and closes the packet file; one that does not
      follow is waited for, unless an exception leaves the block.
    - An error of the disk ends the merge, and is raised where the block is left, or where `run()` or `caught_up()` is
      awaited; an exception of the block's own comes first.
    - Cancelled anywhere, it ends as soon as what was read is in the file, and no thread or descriptor stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from ..errors import ClosedResourceError, OffloadError
from .engine import Merge
from .progress import Progress


class EmbeddedMerge(Merge):
    """A merge that runs while a block does; arguments as for Merge. `progress` says how far it is."""

    _running: asyncio.Task[Progress] | None = None

    async def __aenter__(self) -> Self:
        """Raises as PacketWriter.start()."""
        await self.start()
        self._running = asyncio.create_task(super().run(), name="merge")
        self._running.add_done_callback(lambda task: task.cancelled() or task.exception())  # told where the block ends
        return self

    async def run(self) -> Progress:
        """Wait until it has ended; cancelling ends only the wait.

        Raises:
            BrokenResourceError: the packet file could not be written.
            ClosedResourceError: the block was not entered.
        """
        if self._running is None:
            raise ClosedResourceError("the merge is not started; use it as `async with`")
        return await asyncio.shield(self._running)

    async def caught_up(self) -> None:
        """Return once all that is in the sources now is in the packet file.

        Raises:
            BrokenResourceError: the packet file could not be written.
        """
        await asyncio.sleep(0)  # it has begun
        if self._follow:
            with contextlib.suppress(ClosedResourceError):  # it has ended: run() says how
                return await super().caught_up()
        await self.run()
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._running is not None, "the block was entered"
        if self._follow or exc is not None:
            self.stop()
        failure: BaseException | None = exc
        try:
            await self._running  # cancelled here, it is cancelled too
        except OffloadError as error:
            failure = failure or error
        finally:
            try:
                await self.aclose()
            except OffloadError as error:
                failure = failure or error
        if failure is not None and failure is not exc:
            raise failure
