"""Checksums of stretches from running ones, and the decoder that finds frames with them in linear time."""

from __future__ import annotations

import importlib
import random
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.packets import Damage, FrameType, PacketDecoder, encode
from offload.packets.codec import pack_header
from offload.packets.sums import STEP, Sums, shifted

calm = settings(deadline=None, max_examples=60)


@given(st.binary(max_size=300), st.binary(max_size=300))
@calm
def test_shifted_is_what_more_bytes_make_of_a_checksum(one: bytes, other: bytes) -> None:
    """The CRC of two strings follows from their CRCs and the length of the second."""
    assert crc32(one + other) == shifted(crc32(one), len(other)) ^ crc32(other)


def test_shifted_takes_the_longest_payload() -> None:
    """Lengths of 16 MiB, and around each place of the tables."""
    for count in (0, 1, 255, 256, 257, 65535, 65536, 65537, (1 << 24) - 1, 1 << 24, (1 << 24) + 1):
        assert crc32(b"abc" + bytes(count)) == shifted(crc32(b"abc"), count) ^ crc32(bytes(count))


@given(st.integers(0, 2**40), st.integers(0, 3 * STEP), st.lists(st.integers(0, 2**30), min_size=2, max_size=20))
@calm
def test_sums_of_any_stretches(start: int, more: int, numbers: list[int]) -> None:
    """Each stretch has the CRC that zlib has for it, also when what is behind us was let go of."""
    data = random.Random(more).randbytes(2 * STEP + more)
    sums, base, place = Sums(start), start, start
    for a, b in zip(numbers[::2], numbers[1::2], strict=False):
        low = place + a % (start + len(data) - place + 1)
        high = low + b % (start + len(data) - low + 1)
        view = memoryview(data)[base - start :]
        assert sums.crc(view, base, low, high) == crc32(data[low - start : high - start])
        place = min(low, place + a % STEP)
        kept = sums.forget(view, base, place)
        assert base <= kept <= place
        assert place - kept < STEP
        base = kept


def false_headers(count: int, claim: int) -> bytes:
    """Headers that are sound, behind one another, each of which claims a payload of `claim` bytes that is none."""
    return pack_header(FrameType.LINES, claim, 1) * count


@pytest.mark.parametrize("piece", [1000, 70_000, 1 << 22])
@pytest.mark.parametrize("sound_between", [False, True])
def test_search_among_false_headers_is_linear(piece: int, sound_between: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text made of headers that claim half of all the bytes each: a byte is summed and moved a few times, and not once
    for each of them; the frames that stand among them are found."""
    summed = moved = 0

    def counted(data: memoryview, before: int = 0) -> int:
        nonlocal summed
        summed += len(data)
        return crc32(data, before)

    class Counting(bytearray):
        def __getitem__(self, key: slice) -> Counting:  # type: ignore[override]
            nonlocal moved
            part = Counting(super().__getitem__(key))
            moved += len(part)
            return part

    for name in ("codec", "sums"):
        monkeypatch.setattr(importlib.import_module(f"offload.packets.{name}"), "crc32", counted)
    small, large = encode(FrameType.NOTE, b""), encode(FrameType.LINES, b"x" * 3 * STEP)
    count, claim = (1 << 20) // 64, 1 << 19
    if sound_between:
        part = false_headers(count // 4, claim)
        data, frames = (part + small) * 2 + large + (part + small) * 2 + large, 6
    else:
        data, frames = false_headers(count, claim) + large, 1
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    decoder._buffer = Counting()  # the one thing that cannot be counted from outside
    found = [frame for at in range(0, len(data), piece) for frame in decoder.feed(data[at : at + piece])]
    found += decoder.close()
    assert len(found) == frames
    assert sum(d.end - d.start for d in damage) + sum(f.header.frame_len for f in found) == len(data)
    headers = 64 * (count + frames)
    # A payload ends anywhere, so up to a STEP behind the last mark is summed for each of the false headers.
    assert summed < 8 * len(data) + headers + 2 * STEP * count
    assert moved < 8 * len(data)


def test_alternating_false_and_sound_frames_are_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound frame behind each false header ends its damage; what was summed for the one serves for the next."""
    summed = 0

    def counted(data: memoryview, before: int = 0) -> int:
        nonlocal summed
        summed += len(data)
        return crc32(data, before)

    for name in ("codec", "sums"):
        monkeypatch.setattr(importlib.import_module(f"offload.packets.{name}"), "crc32", counted)
    pair = false_headers(1, 1 << 19) + encode(FrameType.NOTE, b"")
    count = (1 << 20) // len(pair)
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    found = decoder.feed(pair * count) + decoder.close()
    assert (len(found), len(damage)) == (count, count)
    assert summed < (8 << 20) + 2 * STEP * count


def test_memory_while_searching_is_two_frames_at_most() -> None:
    """False headers fed in small pieces: never more is held than twice what one of them claims, and the last feed."""
    claim, piece = 1 << 18, 4096
    data = false_headers((1 << 20) // 64, claim)
    decoder = PacketDecoder(on_damage=lambda damage: None)
    held = 0
    for at in range(0, len(data), piece):
        decoder.feed(data[at : at + piece])
        held = max(held, len(decoder._buffer))
    assert claim < held <= 2 * claim + 2 * piece + STEP
