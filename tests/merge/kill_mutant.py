"""The offload command with one promise broken, to show that the kill tests would notice.

python kill_mutant.py sidecar merge -f LOGS -o OUT     where each source was read up to stands in OUT.offsets, a
                                                       JSON file put in place by a rename, as in most log shippers;
                                                       nothing else differs, and the packet file is sound
python kill_mutant.py uncut merge -f LOGS -o OUT       a torn tail is left in place and written behind
python kill_mutant.py by-time merge -f LOGS -o OUT     no promise is broken: the lines go by their times
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from offload import cli
from offload.files import append, rolling
from offload.files.packet_file import PacketFile, Piece
from offload.files.reading import Step
from offload.files.rotated import Resume
from offload.merge import batches, engine
from offload.merge.by_time import ByTime

INTERVAL = 0.1  # seconds between two savings, as often as the merge itself writes a COMMIT


class Sidecar:
    """Offsets beside the packet file: source path -> how far it was read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._saved = time.monotonic()
        self.offsets: dict[str, int] = {}
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.offsets = json.load(file)

    def save(self, *, every: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._saved >= every:
            self._saved = now
            with open(f"{self._path}.tmp", "w", encoding="utf-8") as file:
                json.dump(self.offsets, file)
            os.replace(f"{self._path}.tmp", self._path)


def use_sidecar() -> None:
    """Let the merge go on from a side file, instead of from the frames; all of it runs on the writer's thread."""
    sidecars: dict[PacketFile, Sidecar] = {}
    learn, pieces, tick, close = engine.Merge._learn, batches.pieces, PacketFile.tick, PacketFile.close

    def learn_from_sidecar(merge: engine.Merge, file: PacketFile) -> None:
        learn(merge, file)
        sidecar = sidecars[file] = Sidecar(f"{file.path}.offsets")
        for path, resume in merge._known._resumes.items():
            # The frames' guard belongs to the frames' offset; without one, a file is taken for what its name says.
            entry = resume.entry._replace(resume_off=sidecar.offsets.get(path, 0), guard_len=0, head_len=0)
            merge._known._resumes[path] = Resume(resume.info, entry)

    def pieces_as_they_come(file: PacketFile, steps: Iterable[Step]) -> Iterator[Piece]:
        sidecar = sidecars[file]
        for step in pieces(file, steps):
            state = file.ledger.sources[step.source_id]
            yield replace(step, source_off=state.resume_off)
            sidecar.offsets[os.fsdecode(state.path)] = step.source_off + len(step.payload)

    def tick_and_save(file: PacketFile) -> None:
        tick(file)
        sidecars[file].save(every=INTERVAL)

    def save_and_close(file: PacketFile, *, broken: bool = False) -> None:
        close(file, broken=broken)
        sidecars[file].save()

    patch(engine.Merge, "_learn", learn_from_sidecar)
    patch(batches, "pieces", pieces_as_they_come)
    patch(PacketFile, "tick", tick_and_save)
    patch(PacketFile, "close", save_and_close)


def leave_torn_tails() -> None:
    """Let opening a packet file keep what stands behind its last whole frame."""

    class Uncut(append.AppendFile):
        def cut(self, end: int) -> None:
            """The promise that is broken."""

        def rewrite(self, start: int, end: int, check: Callable[[bytes], object]) -> None:
            """What would notice, before anything behind it is called durable."""

    patch(rolling, "AppendFile", Uncut)


def order_by_time() -> None:
    """Let the merge order by time, and hold lines back all the while."""
    original = engine.Merge.__init__

    def ordered(self: engine.Merge, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options | {"by_time": ByTime(lateness=0.3)})

    patch(engine.Merge, "__init__", ordered)


def patch(owner: Any, name: str, value: object) -> None:
    getattr(owner, name)  # a mutant that replaces nothing would be no mutant
    setattr(owner, name, value)


if __name__ == "__main__":
    {"sidecar": use_sidecar, "uncut": leave_torn_tails, "by-time": order_by_time}[sys.argv.pop(1)]()
    cli.main()
