"""The merge shown on a live example: five programs write logs, one packet file takes them in, and a proof follows."""

from __future__ import annotations

import asyncio
import filecmp
import os
import random
import shutil
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

from ..loops import LoopThread
from .audit import verify
from .engine import Merge
from .sources import Sources
from .split import split

NAMES = ("api", "web", "queue", "billing", "mail")
_MARK = "offload-demo"


def clear(folder: Path) -> None:
    """Make the folder ready for a demo.

    Raises:
        FileExistsError: something else than a former demo is in it.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise FileExistsError(17, "the folder holds other files; give an empty or a new one", str(folder))
    for former in ("logs", "split"):
        shutil.rmtree(folder / former, ignore_errors=True)
    (folder / "merged.opk").unlink(missing_ok=True)
    (folder / "logs").mkdir(parents=True)
    (folder / _MARK).write_text("made by `offload demo`, which may empty this folder\n")


def write_log(path: Path, lines: int, seed: int, stop: threading.Event) -> None:
    """What a program does: append lines, now and then a pause, now and then a line in two pieces."""
    chance = random.Random(seed)
    with path.open("ab", buffering=0) as log:
        for number in range(lines):
            line = f"{time.time():.6f} {path.stem} request {number} took {chance.randrange(1, 900)} ms\n".encode()
            cut = len(line) if chance.random() < 0.8 else chance.randrange(1, len(line))
            log.write(line[:cut])
            if chance.random() < 0.06:
                stop.wait(chance.random() * 0.05)
            log.write(line[cut:])
            if stop.is_set():
                return


async def demo(folder: Path, *, lines: int = 2000) -> AsyncIterator[str]:
    """Run it; gives out what happened, a sentence each.

    Raises:
        AssertionError: a line is missing, doubled or out of order: a bug of ours.
    """
    logs, merged = folder / "logs", folder / "merged.opk"
    yield f"Five programs write {lines} lines each into {logs}{os.sep}*.log, with random pauses."
    yield f"At the same time they are merged into {merged}, as `offload merge -f` does."
    merge = Merge(Sources([str(logs)]), merged, follow=True)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(merge)
        running = asyncio.ensure_future(merge.run())
        stop = threading.Event()
        programs = [(name, await stack.enter_async_context(LoopThread(f"program {name}"))) for name in NAMES]
        stack.callback(stop.set)  # first of all, however we leave
        calls = [t.call(write_log, logs / f"{name}.log", lines, i, stop) for i, (name, t) in enumerate(programs)]
        written = asyncio.ensure_future(asyncio.wait(calls))
        started = time.monotonic()
        while not written.done() and not running.done():
            await asyncio.wait([written, running], timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            seconds, now = time.monotonic() - started, merge.progress
            yield f"  {seconds:4.1f} s  {now.sources} sources, {now.lines:6} lines merged"
        await written
        for call in calls:
            call.result()
        merge.stop()
        progress = await running
    yield f"Merged: {progress.lines} lines, {progress.bytes} bytes."
    async with LoopThread("proof") as proof:  # not on this loop, or Ctrl-C would wait for it, and end nothing then
        audit = await proof.call(verify, merged)
        if not audit.ok or audit.lines != lines * len(NAMES):
            raise AssertionError(f"{merged} does not verify: {audit}")
        yield f"Verified: {audit.frames} frames, every checksum and every sequence holds."
        await proof.call(split, merged, folder / "split")
    for name in NAMES:
        one, other = logs / f"{name}.log", folder / "split" / f"{name}.log"
        if not filecmp.cmp(one, other, shallow=False):
            raise AssertionError(f"{other} differs from {one}")
    yield f"Split again into {folder / 'split'}: all {len(NAMES)} files are the same, byte for byte."
    yield "So every line of every file is in the packet file once, and in order."
    yield ""
    yield f"The packet file is {merged}. Try:"
    yield f"  offload cat --prefix {merged} | head"
    yield f"  offload stat {merged}"
