"""Follow logs, deal with their lines, stop in the middle, and go on exactly there: the positions are yours to keep.

Run it: two logs grow while a reader is stopped twice; you see that each line was dealt with once.
"""

# ruff: noqa: ASYNC240 - these files are small

import asyncio
import json
import tempfile
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import offload

LINES = 300


async def write_log(path: Path) -> None:
    for number in range(LINES):
        if number == LINES // 2:
            path.rename(path.with_name(f"{path.name}.1"))  # as logrotate does
        with path.open("a") as log:
            log.write(f"{path.stem} line {number}\n")
        await asyncio.sleep(0.001)


async def deal_with(folder: Path, state: Path, most: int, seen: Counter[bytes]) -> None:
    positions = json.loads(state.read_text()) if state.exists() else {}
    async with aclosing(offload.tail([f"{folder}/*.log"], follow=True, resume=positions)) as batches:
        async for batch in batches:
            seen.update(batch.lines)  # a database would keep lines and position in one transaction
            positions[batch.source] = batch.position
            state.write_text(json.dumps(positions))
            if seen.total() >= most:
                break


async def main(folder: Path) -> None:
    logs, state = [folder / "api.log", folder / "web.log"], folder / "positions.json"
    seen: Counter[bytes] = Counter()
    async with asyncio.TaskGroup() as tasks:
        for log in logs:
            tasks.create_task(write_log(log))
        for stop_at in (100, 350, 2 * LINES):
            await deal_with(folder, state, stop_at, seen)
            print(f"stopped at {seen.total()} lines" if stop_at < 2 * LINES else f"{seen.total()} lines")
    print("each line once" if set(seen.values()) == {1} and len(seen) == 2 * LINES else "something is wrong")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(Path(temporary)))
