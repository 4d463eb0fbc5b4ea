"""INDEX and SEAL: what closes a segment."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import PacketError
from offload.packets.codec import Frame, PacketDecoder, encode
from offload.packets.format import FrameType
from offload.packets.sealed import INDEX_PLACES, Place, SealInfo, pack_index, unpack_index


def frame_of(type: FrameType, payload: bytes) -> Frame:
    (frame,) = PacketDecoder(offset=40).feed(encode(type, payload))
    return frame


steps = st.tuples(st.integers(0, 2**50), st.integers(-(2**60), 2**62), st.integers(0, 2**50))


@given(st.lists(steps, max_size=30))
def test_index_goes_both_ways(differences: list[tuple[int, int, int]]) -> None:
    """Places in rising order, with times that may fall, are read back as they were."""
    places: list[Place] = []
    offset = lines = 0
    for forward, time_ns, more in differences:
        offset, lines = offset + forward, lines + more
        places.append(Place(offset, max(0, time_ns), lines))
    assert unpack_index(frame_of(FrameType.INDEX, pack_index(places))) == places


def test_the_bytes_of_an_index() -> None:
    """As the page says: differences as LEB128, that of the time zigzag."""
    places = [Place(300, 5, 1), Place(301, 3, 1)]
    assert pack_index(places).hex(" ") == "ac 02 0a 01 01 03 00"


@given(st.binary(max_size=300))
def test_any_bytes_are_an_index_or_a_packet_error(payload: bytes) -> None:
    """Nothing else comes of them."""
    with contextlib.suppress(PacketError):
        assert len(unpack_index(frame_of(FrameType.INDEX, payload))) <= len(payload) // 3


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x80" * 12, "INDEX holds a number of more than 64 bits"),
        (b"\x01\x01", "INDEX ends inside a place, after 2 numbers"),
        (b"\x01\x01\x80", "INDEX ends inside a place, after 2 numbers"),
        (bytes(30 * INDEX_PLACES + 1), "INDEX is 983041 bytes, limit is 983040"),
    ],
)
def test_what_is_wrong_with_an_index_is_told(payload: bytes, message: str) -> None:
    """With the place of its frame; memory is bounded by how long it may be."""
    with pytest.raises(PacketError) as caught:
        unpack_index(frame_of(FrameType.INDEX, payload))
    assert (caught.value.message, caught.value.offset) == (message, 40)


def test_seal_goes_both_ways() -> None:
    """What SEAL holds is read back as it was written, and one that is cut is an error."""
    info = SealInfo(1, 2, 3, b"c" * 32)
    assert SealInfo.unpack(frame_of(FrameType.SEAL, info.pack())) == info
    with pytest.raises(PacketError, match="SEAL payload is 55 bytes, expected at least 56"):
        SealInfo.unpack(frame_of(FrameType.SEAL, info.pack()[:-1]))
