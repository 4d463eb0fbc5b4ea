"""Any bytes end in packets or a PacketError, in bounded memory, whoever reads them.

OFFLOAD_FUZZ  seconds for atheris, where it is installed (5), and times as many examples for Hypothesis as seconds
              over 5: OFFLOAD_FUZZ=3600 is an hour of the one and 720 times the examples of the other
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offload
from offload.packets import PacketDecoder

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("OFFLOAD_FUZZ", "5"))
TIMES = max(1, int(SECONDS / 5))


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


target = load("target")
SEEDS: list[bytes] = target.seeds()
MESSAGES: list[bytes] = target.messages()


def calm(examples: int) -> settings:
    unhurried = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(deadline=None, max_examples=examples * TIMES, suppress_health_check=unhurried)


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A real file after a few harms, with its checksums as they then are, or made right."""
    data: bytes = target.mutate(draw(st.sampled_from(SEEDS)), SEEDS, draw(st.randoms(use_true_random=False)))
    return target.seal_all(data) if draw(st.booleans()) else data


pieces = st.lists(st.integers(0, 300), max_size=6)


@given(st.one_of(hostile(), st.binary(max_size=500), st.binary(max_size=500).map(target.seal_all)), pieces)
@calm(300)
def test_decoder_ledger_and_recovery(data: bytes, pieces: list[int]) -> None:
    """PacketDecoder in any pieces, Ledger and recover: what they find is the same and complete, or a PacketError."""
    target.look_at(data, pieces)


@given(data=hostile())
@calm(100)
def test_readers_of_files(data: bytes, tmp_path: Path) -> None:
    """FrameSource, verify, stat, split and lines of a hostile file: no other error than PacketError."""
    target.look_at_file(data, tmp_path)


@given(data=hostile())
@calm(15)
def test_commands(data: bytes, tmp_path: Path) -> None:
    """cat, verify, stat and split end with one of their exit codes, and never with a traceback."""
    target.look_at_commands(data, tmp_path)


@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([b"ABAC", b"\0\0\0\x01", b"3 abc", b"\n"])),
    st.integers(0, 3),
    pieces,
)
@calm(100)
def test_streams(parts: list[bytes], which: int, pieces: list[int]) -> None:
    """The framings of streams give the same packets however they are cut, or a PacketError, and hold no more."""
    target.look_at_stream(b"".join(parts), which, pieces)


@given(st.sampled_from(MESSAGES), st.randoms(use_true_random=False), st.booleans())
@calm(300)
def test_messages(message: bytes, chance: random.Random, sound: bool) -> None:
    """What a client and a server say to each other, harmed, is read or is a PacketError."""
    data = target.mutate(message, MESSAGES, chance)
    target.look_at_message(message[:1] + target.seal_all(data[1:]) if sound else data)


@given(hostile(), st.integers(1, 400))
@calm(60)
def test_memory_is_bounded_by_what_came(data: bytes, piece: int) -> None:
    """Whatever lengths are claimed, decoding holds a few times the bytes fed and not those claimed."""
    data = data[:20_000]
    tracemalloc.start()
    decoder = PacketDecoder(on_damage=lambda damage: None)
    try:
        for at in range(0, len(data), piece):
            decoder.feed(data[at : at + piece])
        decoder.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(data) + 500_000


@given(data=hostile())
@calm(60)
def test_memory_of_readers_is_bounded(data: bytes, tmp_path: Path) -> None:
    """Whatever a file claims, who reads it holds its buffers (4.2 MB) and a few times the file."""
    tracemalloc.start()
    try:
        target.look_at_file(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(data) + 6_000_000


def test_harms_are_harms() -> None:
    """The mutations make files of every kind: unreadable ones, damaged ones, sound ones that contradict themselves."""
    chance, kinds = random.Random(1), set()
    for _ in range(300):
        data = target.mutate(chance.choice(SEEDS), SEEDS, chance)
        damage: list[object] = []
        decoder = PacketDecoder(on_damage=damage.append)
        frames = decoder.feed(data) + decoder.close()
        kinds.add((bool(frames), bool(damage)))
    assert kinds >= {(True, True), (True, False), (False, True)}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("which", ["decoder", "files", "stream", "message"])
def test_by_coverage(tmp_path: Path, which: str) -> None:
    """atheris looks for inputs that reach new code, and finds none that ends in anything else or takes 300 MB."""
    package = str(Path(offload.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, *filter(None, sys.path)])}
    options = [f"-max_total_time={SECONDS:.0f}", "-max_len=8192", "-rss_limit_mb=300", f"-artifact_prefix={tmp_path}/"]
    # By way of a shell: who is started by a process has that one's memory as the most that it ever had.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, str(HERE / "fuzz_reader.py"), which, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS + 120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr
