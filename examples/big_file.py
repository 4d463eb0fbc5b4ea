"""A huge file read line by line, a thousand lines a hop, while the loop stays responsive; closed in the middle.

Run it: you see how many lines were read before we had seen enough, how often a ticker got its turn meanwhile, and the
longest time that it had to wait.
"""

import asyncio
import tempfile
import threading
import time
from pathlib import Path
from typing import BinaryIO

import offload

LINES = 2_000_000


def make(path: Path) -> None:
    block = b"".join(b"%07d: nothing to see here\n" % number for number in range(10_000))
    with path.open("wb") as file:
        for _ in range(LINES // 10_000):
            file.write(block)


async def tick(ticks: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        ticks.append(time.perf_counter() - start - 0.001)


def close(file: BinaryIO) -> None:
    print(f"closed at byte {file.tell()}, on the thread {threading.current_thread().name!r}")
    file.close()


async def main(path: Path) -> None:
    ticks: list[float] = []
    ticker = asyncio.create_task(tick(ticks))
    count = 0
    async with offload.Resource(lambda: path.open("rb"), close=close, name="huge file") as file:
        async for _ in file.iter(iter, chunk=1000, prefetch=2):
            count += 1
            if count % 1000 == 0:
                await asyncio.sleep(0)  # the lines of a chunk are here already: nothing else lets others in
            if count == LINES // 2:
                break  # the file is still open, and whatever comes next may use it
    ticker.cancel()
    print(f"{count} of {LINES} lines read")
    print(f"{len(ticks)} ticks meanwhile, the latest {max(ticks) * 1000:.1f} ms late")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        huge = Path(folder) / "huge.log"
        make(huge)
        asyncio.run(main(huge))
