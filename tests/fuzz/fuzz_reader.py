"""`python tests/fuzz/fuzz_reader.py TARGET [libFuzzer's options] [corpus]`: what reads bytes of others, by coverage.

    decoder   PacketDecoder, Ledger, recover
    files     FrameSource, verify, split, stat, lines, on a file of these bytes
    stream    the framings of streams; the first byte chooses one
    message   what `offload send` and its server say to each other

Needs atheris (pip install atheris). It begins with the golden files; besides libFuzzer's own changes it makes those of
`target.mutate`, and sets checksums right: no change of single bytes would get past them. `-max_total_time=60` ends it
after a minute, `-rss_limit_mb=300` makes more memory than that a failure; what fails is written to a file that is told,
and repeated by naming that.
"""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

atheris = importlib.import_module("atheris")  # not in every environment

with atheris.instrument_imports(include=["offload"]):  # its readers, not what they stand on
    import target

SEEDS = target.seeds()
MEMORY = target.memory()


def decoder(data: bytes) -> None:
    target.look_at(data, [len(data) // 3, 1, 7])


def files(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:  # libFuzzer leaves without cleaning up
        target.look_at_file(data, Path(folder))


def stream(data: bytes) -> None:
    way, rest = (data[0] if data else 0) % len(target.FRAMERS), data[1:]
    target.look_at_stream(rest, way, [len(rest) // 3, 1, 7])


TARGETS: dict[str, Callable[[bytes], None]] = {
    "decoder": decoder,
    "files": files,
    "stream": stream,
    "message": target.look_at_message,
}


def change(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's change, ours, or both; half of them with their checksums right."""
    chance = random.Random(seed)
    way = chance.randrange(4)
    if way != 0 and data:
        data = target.mutate(data, SEEDS, chance)[:max_size]
    if way != 1:
        data = atheris.Mutate(data, max_size)
    return target.seal_all(data) if chance.random() < 0.5 else data


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"which of {', '.join(TARGETS)}?")
    name = sys.argv.pop(1)
    if name == "stream":
        atheris.Setup(sys.argv, TARGETS[name])
        atheris.Fuzz()
    with tempfile.TemporaryDirectory(dir=MEMORY) as corpus:
        for number, seed in enumerate(SEEDS if name != "message" else target.messages()):
            (Path(corpus) / str(number)).write_bytes(seed)
        seeded = [] if any(Path(each).is_file() for each in sys.argv[1:]) else [f"-seed_inputs={_inputs(corpus)}"]
        atheris.Setup([*sys.argv, *seeded, "-len_control=0"], TARGETS[name], custom_mutator=change)
        atheris.Fuzz()


def _inputs(folder: str) -> str:
    return ",".join(str(path) for path in sorted(Path(folder).iterdir()))


if __name__ == "__main__":
    main()
