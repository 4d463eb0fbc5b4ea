"""aiofiles, on a thread of the file's own.

    async with offload.open("big.log", "rb") as file:
        async for line in file: ...

aiofiles sends each call to a thread pool that the whole program shares, so a slow disk here delays a lookup there. The
file that `open` gives is aiofiles' own, with its whole API; only its calls run on one LoopThread that nobody else has.

Promises: calls on one file run in the order made; a blocked file blocks only itself; the file is closed on its own
thread too (aiofiles' context manager would close it on the shared pool), and the thread has ended when the block has.
"""

from __future__ import annotations

import asyncio
import os
from types import TracebackType
from typing import Any

import aiofiles

from ..loops import LoopThread, outlast


class open:  # named for what it does, as the function that it stands for
    """Open a file as `aiofiles.open` does; use it as `async with`.

    Args:
        file, mode, and all others: as for the built-in `open`.

    Raises (on entering):
        OSError: as `open`.
    """

    def __init__(self, file: int | str | os.PathLike[str], mode: str = "r", **options: Any) -> None:
        self._arguments = (file, mode)
        self._options = options
        self._thread = LoopThread(f"file {os.path.basename(file) if not isinstance(file, int) else file}")
        self._file: Any = None

    async def __aenter__(self) -> Any:
        await self._thread.start()
        opening = asyncio.ensure_future(self._open())
        try:
            await outlast(opening)
        except BaseException:
            try:
                if self._file is not None:  # it was opened, and only then did we learn that nobody wants it any more
                    await outlast(asyncio.ensure_future(self._file.close()))
            finally:
                await self._thread.aclose()
            raise
        return self._file

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            # Cancelled while it waits its turn, it would be dropped, and the file left to the garbage collector.
            await outlast(asyncio.ensure_future(self._file.close()))
        finally:
            await self._thread.aclose()

    async def _open(self) -> None:
        self._file = await aiofiles.open(*self._arguments, executor=self._thread, **self._options)  # type: ignore[call-overload]
