"""A program that merges its own logs while it works: nothing to start, nothing to stop, nothing lost.

Run it: three workers write logs, a merge runs beside them; you see how far it is, and what is in the packet file.
"""

import asyncio
import tempfile
from pathlib import Path

import offload

LINES = 500


async def work(log: Path) -> None:
    with log.open("a", buffering=1) as file:
        for number in range(LINES):
            file.write(f"{log.stem} did step {number}\n")
            if not number % 50:
                await asyncio.sleep(0.01)


async def main(folder: Path) -> None:
    packet_file = folder / "merged.opk"
    async with offload.merge([f"{folder}/*.log"], packet_file, follow=True) as merge:
        await asyncio.gather(*(work(folder / f"{name}.log") for name in ("api", "web", "queue")))
        await merge.caught_up()  # all that was written up to here is in the packet file
        print(f"{merge.progress.lines} lines of {merge.progress.sources} logs, {merge.progress.lag_bytes} bytes to go")
        with (folder / "api.log").open("a") as file:
            file.write("one more\n")
    # left: what came meanwhile is in it too, and it is on the disk
    async with offload.PacketReader(packet_file) as reader:
        lines = [line async for frame in reader for line in frame.packets()]
    print(
        f"{len(lines)} lines in the file, the last line of api.log among them: {b'one more' in map(bytes.strip, lines)}"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(Path(temporary)))
