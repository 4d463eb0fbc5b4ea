"""Five logs grow; a task tails each; every line goes into one packet file; the event loop stays free throughout.

Run it: you see the longest time that the loop was held up, and how many lines of each log the packet file holds.
"""

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import offload

LINES = 200


async def write_log(path: Path) -> None:
    async with offload.FileSink(path) as log:
        for number in range(LINES):
            await log.write(f"{path.stem}: line {number}\n")
            await log.flush()
            await asyncio.sleep(random.random() / 100)


async def tail(path: Path, sink: offload.PacketWriter) -> None:
    async with offload.open(path, "ab+") as log:  # makes it if its writer has not come yet
        await log.seek(0)
        for _ in range(LINES):
            line = b""
            while not line.endswith(b"\n"):
                line += await log.readline()  # b"" or a part of a line: the rest is not written yet
                await asyncio.sleep(0 if line.endswith(b"\n") else 0.01)
            await sink.write(line, source=path.name)


async def watch_loop(worst: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        worst[0] = max(worst[0], time.perf_counter() - start - 0.001)


async def main(folder: Path) -> None:
    logs = [folder / f"{name}.log" for name in ("api", "web", "queue", "billing", "mail")]
    worst = [0.0]
    watcher = asyncio.create_task(watch_loop(worst))
    async with offload.PacketWriter(folder / "merged.opk") as sink:
        await asyncio.gather(*(write_log(log) for log in logs), *(tail(log, sink) for log in logs))
    watcher.cancel()
    async with offload.PacketReader(folder / "merged.opk") as reader:
        counts = Counter([line.split(b":")[0] async for frame in reader for line in frame.packets()])
    print(f"longest hold-up of the loop: {worst[0] * 1000:.1f} ms")
    for name, count in sorted(counts.items()):
        print(f"{name.decode()}: {count} lines")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(Path(temporary)))
