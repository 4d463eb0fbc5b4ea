"""`offload send`: sources in the server's packet file once and in order, whichever end dies, and what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from offload.errors import BrokenResourceError, PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile
from offload.files.packet_stream import PacketWriter
from offload.loops import LoopThread
from offload.merge.audit import verify
from offload.merge.split import split
from offload.net import client as module
from offload.net import wire
from offload.net.client import RefusedError, Send
from offload.net.dial import connect
from offload.net.limits import Limits
from offload.net.receiver import Receiver
from offload.net.server import PacketServer
from offload.packets.codec import SourceInfo, encode
from offload.packets.format import NONE_U64, Compression, Flag, FrameType, GapReason
from offload.packets.framing import PrefixFramer

PATIENCE = 60.0


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What hangs here would hang for ever: say where, and end."""
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=2)
    yield
    faulthandler.cancel_dump_traceback_later()


class Collector:
    """A server that writes a packet file, to be started, stopped and broken."""

    def __init__(self, packet: Path, **options: Any) -> None:
        self.packet = packet
        self._options = options
        self._stack = contextlib.AsyncExitStack()
        self.address = "127.0.0.1:0"

    async def __aenter__(self) -> Collector:
        self.writer = await self._stack.enter_async_context(PacketWriter(self.packet))
        self.receiver = Receiver(self.writer, sends=True)
        self.server = PacketServer(self.receiver.handle, **{"max_packet": 4 << 20, **self._options})
        self.address = await self.server.listen(self.address)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.server.aclose()
        await self._stack.aclose()


async def send(paths: list[str], address: str, name: str = "me", **options: Any) -> Send:
    async with Send(paths, address, name=name, **options) as sending:
        await sending.run()
    return sending


def told(packet: Path, folder: Path) -> dict[str, bytes]:
    """What each source has in the file; every checksum and sequence holds."""
    found = verify(packet)
    assert found.faults == []
    split(packet, folder, force=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another thread
            await asyncio.sleep(0.001)


# --- once and in order ------------------------------------------------------------------------------------------------


async def test_files_arrive_byte_for_byte(tmp_path: Path) -> None:
    """Text, CRLF, NUL, bytes that are no UTF-8, an empty file, lines over a frame, a last line without end."""
    logs = tmp_path / "logs"
    logs.mkdir()
    contents = {
        "a.log": b"one\ntwo\r\n\0\xff\n\nrest",
        "b.log": b"",
        "c.log": b"x" * 3_000_000 + b"\n" + b"y" * 2_500_000,
        "d.log": b"".join(b"%d\n" % n for n in range(100_000)),
    }
    for name, content in contents.items():
        (logs / name).write_bytes(content)
    async with Collector(tmp_path / "out.opk") as collector:
        sending = await send([str(logs)], collector.address)
        assert sending.progress.bytes == sum(map(len, contents.values()))
        again = await send([str(logs)], collector.address)
        assert again.progress.bytes == 0
    got = told(tmp_path / "out.opk", tmp_path / "back")
    assert {Path(name).name: content for name, content in got.items() if content} == {
        name: content for name, content in contents.items() if content
    }


async def test_what_is_acknowledged_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` returns behind an fsync that came after the last frame was written."""
    synced: list[int] = []
    sync = PacketFile.sync

    def watched(self: PacketFile) -> None:
        end = self.end
        sync(self)
        synced.append(end)

    monkeypatch.setattr(PacketFile, "sync", watched)
    (tmp_path / "a.log").write_bytes(b"line\n" * 1000)
    async with Collector(tmp_path / "out.opk") as collector:
        await send([str(tmp_path / "a.log")], collector.address)
        synced_upto = max(synced)
        with FrameSource(tmp_path / "out.opk") as source:
            ends = [frame.end for frame in source if frame.header.type is FrameType.LINES]
        assert ends
        assert ends[-1] <= synced_upto


async def test_two_senders_and_plain_clients_share_a_file(tmp_path: Path) -> None:
    """Sources of two senders with the same path are two sources; a plain client's packets are a third."""
    log = tmp_path / "a.log"
    log.write_bytes(b"one\n")
    async with Collector(tmp_path / "out.opk") as collector:
        await asyncio.gather(*(send([str(log)], collector.address, name=name) for name in ("m1", "m2")))
        async with connect(collector.address, PrefixFramer) as plain:
            await plain.send(b"\x80\x04pickle")
            plain.close()
            await plain.closed
        await until(lambda: collector.receiver.received.packets == 1)
    got = told(tmp_path / "out.opk", tmp_path / "back")
    assert sorted(got.values()) == [b"one\n", b"one\n", b"\x80\x04pickle"]


async def test_rotated_file_is_known_again_by_the_next_connection(tmp_path: Path) -> None:
    """A log renamed between two connections is read to its end, then the new one: nothing twice, nothing lost."""
    log, old = tmp_path / "app.log", tmp_path / "app.log.1"
    log.write_bytes(b"one\ntwo\n")
    async with Collector(tmp_path / "out.opk") as collector:
        await send([str(log)], collector.address, follow=False)
        with log.open("ab") as file:
            file.write(b"three\n")
        log.rename(old)
        log.write_bytes(b"four\n")
        sending = Send([str(log)], collector.address, name="me", follow=True)
        async with sending:
            running = asyncio.ensure_future(sending.run())
            await until(lambda: sending.progress.lines == 2)
            sending.stop()
            await running
        await send([str(tmp_path / "app.log*")], collector.address)
    got = told(tmp_path / "out.opk", tmp_path / "back")
    assert sorted(got.values()) == [b"four\n", b"one\ntwo\nthree\n"]
    with FrameSource(tmp_path / "out.opk") as source:
        begun = [SourceInfo.unpack(frame) for frame in source if frame.header.type is FrameType.SOURCE]
    (left,) = [info.before for info in begun if info.before is not None]
    assert (left.size, left.mtime_ns) == (14, old.stat().st_mtime_ns)  # although it was read together with the next


async def test_log_that_lost_its_end_is_compared_with_what_the_server_has(tmp_path: Path) -> None:
    """The sender's machine lost power: what its logs still have of what was sent is not sent again."""
    logs = [tmp_path / name for name in ("a.log", "b.log")]
    before = b"".join(b"%d was written before the power cut\n" % n for n in range(9000))
    for log in logs:
        log.write_bytes(before)
    async with Collector(tmp_path / "out.opk") as collector:
        await send([str(log) for log in logs], collector.address)
        for log, cut in zip(logs, (5_000, 250_000), strict=True):
            os.truncate(log, cut)
            with log.open("ab") as file:
                file.write(b"\nwritten after it\n")
        for lines in (4, 0):  # of each the one that was torn, and the new one
            sending = await send([str(log) for log in logs], collector.address)
            assert (sending.progress.lines, sending.progress.gaps) == (lines, 0)
        late = tmp_path / "c.log"  # of another sender, which began since the server was asked first
        late.write_bytes(before)
        await send([str(late)], collector.address, name="you")
        os.truncate(late, 5_000)
        with late.open("ab") as file:
            file.write(b"\nwritten after it\n")
        sending = await send([str(late)], collector.address, name="you")
        assert (sending.progress.lines, sending.progress.gaps) == (2, 0)
    logs.append(late)
    found = verify(tmp_path / "out.opk")
    assert found.complete
    assert len(found.regressions) == 3
    got = told(tmp_path / "out.opk", tmp_path / "back")
    assert sorted(got.values()) == sorted([before, before, before, *(log.read_bytes() for log in logs)])


async def test_sender_that_asks_for_what_is_not_its_own_is_refused(tmp_path: Path) -> None:
    """A source that was not begun, or more than a message holds, ends the connection with a reason."""
    async with Collector(tmp_path / "out.opk") as collector:
        for want in (wire.want(0, 0, 1, None), wire.want(0, 0, wire.WANT_BYTES + 1, None), wire.WANT + b"short"):
            async with connect(collector.address, PrefixFramer) as plain:
                await plain.send(wire.hello("me"))
                await plain.send(want)
                answers = [packet.payload async for packet in plain]
            assert answers[0] == wire.READY
            assert answers[1].startswith(wire.REFUSED)


async def test_broken_connection_is_told_and_the_next_goes_on(tmp_path: Path) -> None:
    """A connection that breaks while following ends `run` with BrokenResourceError; another Send goes on there."""
    log = tmp_path / "a.log"
    log.write_bytes(b"one\n")
    async with Collector(tmp_path / "out.opk") as collector:
        async with Send([str(log)], collector.address, name="me", follow=True) as sending:
            running = asyncio.ensure_future(sending.run())
            await until(lambda: collector.receiver.received.batches == 1)
            (connection,) = collector.server.connections
            connection.abort()
            with pytest.raises(BrokenResourceError, match="connection"):
                await running
        with log.open("ab") as file:
            file.write(b"two\n")
        await send([str(log)], collector.address)
    assert list(told(tmp_path / "out.opk", tmp_path / "back").values()) == [b"one\ntwo\n"]


async def test_new_connection_takes_the_name_of_a_dead_one(tmp_path: Path) -> None:
    """A second connection of the same name ends the first: that may be a machine that died without a word."""
    log = tmp_path / "a.log"
    log.write_bytes(b"one\n")
    collector = Collector(tmp_path / "out.opk")
    async with collector, Send([str(log)], collector.address, name="me", follow=True) as first:
        running = asyncio.ensure_future(first.run())
        await until(lambda: collector.receiver.received.batches == 1)
        await send([str(log)], collector.address)
        with pytest.raises(RefusedError, match="another sender is called 'me' now"):
            await running
    assert list(told(tmp_path / "out.opk", tmp_path / "back").values()) == [b"one\n"]


async def test_only_one_connection_of_a_name_writes(tmp_path: Path) -> None:
    """A connection that was replaced and lives on cannot send the same lines again: they are in the file once."""
    async with (
        Collector(tmp_path / "out.opk") as collector,
        connect(collector.address, PrefixFramer) as first,
    ):
        await first.send(wire.hello("me"))
        for message in (source(), lines(b"a\n"), END):
            await first.send(message)
        async with asyncio.timeout(PATIENCE), connect(collector.address, PrefixFramer) as second:
            told_first = [packet.payload for _ in range(2) if (packet := await first.packet()) is not None]
            assert told_first == [wire.READY, wire.durable(1)]
            await second.send(wire.hello("me"))
            while (packet := await second.packet()) is not None and packet.payload != wire.READY:
                pass
            for connection in (second, first):
                with contextlib.suppress(BrokenResourceError):
                    await connection.send(lines(b"b\n", source_off=2, seq=1))
                    await connection.send(END)
            packet = await second.packet()
            assert packet is not None
            assert packet.payload == wire.durable(1)
            first.send_eof()
            with contextlib.suppress(BrokenResourceError):
                assert [packet.payload async for packet in first] == [wire.REPLACED]
    assert list(told(tmp_path / "out.opk", tmp_path / "back").values()) == [b"a\nb\n"]


async def test_server_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """A server that takes the connection and says nothing does not keep `start` for ever."""

    async def silent(connection: Any) -> None:
        while await connection.batch():
            pass

    async with PacketServer(silent) as server:
        limits = Limits(handshake=0.05)
        with pytest.raises(BrokenResourceError, match=r"no answer for 0\.05 s"):
            await send([str(tmp_path)], await server.listen("127.0.0.1:0"), limits=limits)


async def test_small_limit_for_packets_is_none_for_send(tmp_path: Path) -> None:
    """The server's limit for packets is for plain clients: the frames of `offload send` have one of their own."""
    log = tmp_path / "a.log"
    log.write_bytes(b"x" * 99_999 + b"\n")
    async with Collector(tmp_path / "out.opk", max_packet=1000) as collector:
        await send([str(log)], collector.address)
    assert list(told(tmp_path / "out.opk", tmp_path / "back").values()) == [log.read_bytes()]


async def test_window_bounds_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is acknowledged the client sends as much as its window allows, then waits."""
    monkeypatch.setattr(module, "WINDOW_BYTES", 3 << 20)
    log = tmp_path / "a.log"
    log.write_bytes((b"x" * 99 + b"\n") * 100_000)
    go = asyncio.Event()
    async with Collector(tmp_path / "out.opk") as collector:
        sync = collector.receiver._sync

        async def held() -> None:
            await go.wait()
            await sync()

        monkeypatch.setattr(collector.receiver, "_sync", held)
        async with Send([str(log)], collector.address, name="me") as sending:
            running = asyncio.ensure_future(sending.run())
            await until(lambda: collector.receiver.received.batches == 2)
            for _ in range(50):
                await asyncio.sleep(0)
            assert sending._link._window <= 3 << 20
            assert collector.receiver.received.batches == 2
            go.set()
            await running
    assert list(told(tmp_path / "out.opk", tmp_path / "back").values()) == [log.read_bytes()]


# --- what cannot be ---------------------------------------------------------------------------------------------------


async def test_nobody_listens(tmp_path: Path) -> None:
    """An address where nobody listens is an OSError, and no thread stays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(OSError, match="Connect call failed"):
            await send([str(tmp_path)], address)


async def test_server_that_is_none_is_refused(tmp_path: Path) -> None:
    """A server that says something else is told from ours."""

    async def other(connection: Any) -> None:
        await connection.send(b"220 mail.example ESMTP")
        await connection.batch()

    async with PacketServer(other) as server:
        with pytest.raises(RefusedError, match="no packet file server for `send`: it said b'220 mail"):
            await send([str(tmp_path)], await server.listen("127.0.0.1:0"))


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "x" * 256, "\udc80"])
def test_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    """A name holds no colon and nothing that cannot be printed."""
    with pytest.raises(ValueError, match=r"name is '.*', expected 1 to 255 bytes"):
        Send([str(tmp_path)], "127.0.0.1:1", name=name)


def source(number: int = 0, generation: int = 0, path: bytes = b"/p", start: int = 0) -> bytes:
    info = SourceInfo(1, 2, 0, start, Compression.NONE, path)
    if generation:
        return wire.FRAME + encode(
            FrameType.SOURCE, info.pack(), source_id=number, generation=0, source_off=start, seq=generation
        )
    return wire.FRAME + encode(FrameType.SOURCE, info.pack(), source_id=number, source_off=start)


def lines(data: bytes, **fields: int) -> bytes:
    return wire.FRAME + encode(FrameType.LINES, data, **({"count": data.count(b"\n")} | fields))


END = wire.batch({})
WRONG: dict[str, list[bytes]] = {
    "unknown message": [b"?"],
    "empty message": [b""],
    "no frame": [wire.FRAME + b"x" * 64],
    "half a frame": [lines(b"a\n")[:-1]],
    "wrong checksum": [lines(b"a\n")[:-1] + b"?"],
    "two frames": [lines(b"a\n") + lines(b"a\n")[1:]],
    "a COMMIT": [wire.FRAME + encode(FrameType.COMMIT, b""), END],
    "packets with a table": [wire.FRAME + encode(FrameType.LINES, b"\0\0\0\0", flags=Flag.TABLE), END],
    "lines of no source": [lines(b"a\n"), END],
    "gap in the offsets": [source(), lines(b"a\n", source_off=1), END],
    "gap in the lines": [source(), lines(b"a\n", seq=1), END],
    "wrong count": [source(), lines(b"a\n", count=2), END],
    "another generation": [source(), lines(b"a\n", generation=1), END],
    "source out of turn": [source(1), END],
    "source twice": [source(0), source(0), END],
    "same path twice": [source(0), source(1), END],
    "no path": [source(path=b""), END],
    "long path": [source(path=b"x" * 100_000), END],
    "beginning where no file does": [source(start=(1 << 62) + 1), END],
    "gap where no file ends": [
        source(),
        wire.FRAME + encode(FrameType.GAP, struct.pack("<QQQB7x", 0, NONE_U64 - 1, 0, 1)),
        END,
    ],
    "gap of a damaged packet file": [
        source(),
        wire.FRAME + encode(FrameType.GAP, struct.pack("<QQQB7x", 0, 5, NONE_U64 - 1, GapReason.DAMAGED)),
        END,
    ],
    "seen of no source": [wire.seen(3, b"", b""), END],
    "seen cut": [wire.SEEN + b"x", END],
    "seen too long": [source(), wire.seen(0, b"x" * 2000, b""), END],
    "batch cut": [END + b"x"],
    "size of no source": [wire.batch({9: (1, 1)})],
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_messages_are_refused_and_leave_the_file_sound(name: str, tmp_path: Path) -> None:
    """What does not go on where the file stands ends the connection with a reason; the file stays sound."""
    async with Collector(tmp_path / "out.opk") as collector:
        async with connect(collector.address, PrefixFramer) as connection:
            await connection.send(wire.hello("me"))
            for message in WRONG[name]:
                await connection.send(message)
            packets = [packet.payload async for packet in connection]
        assert packets[0] == wire.READY
        assert packets[-1][:1] == wire.REFUSED
        assert collector.server.stats.bad == 1
        (tmp_path / "good.log").write_bytes(b"good\n")
        await send([str(tmp_path / "good.log")], collector.address, name="good")
    assert b"good\n" in told(tmp_path / "out.opk", tmp_path / "back").values()


@pytest.mark.parametrize("seed", range(5))
async def test_noise_of_a_client_raises_nothing_but_packet_errors(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages with flipped bytes, cut or out of order end in PacketErrors; the file stays sound."""
    chance = random.Random(seed)
    good = [m for messages in WRONG.values() for m in messages] + [source(), lines(b"a\nb\n"), lines(b"c\n"), END] * 5
    async with Collector(tmp_path / "out.opk") as collector:
        for _ in range(60):
            with contextlib.suppress(BrokenResourceError, PacketError):
                async with connect(collector.address, PrefixFramer) as connection:
                    await connection.send(wire.hello(f"me{seed}"))
                    for _ in range(chance.randrange(1, 12)):
                        message = bytearray(chance.choice(good))
                        if message and chance.random() < 0.3:
                            message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
                        await connection.send(message)
                    connection.close()
        await until(lambda: not collector.server.connections)
    assert [r for r in caplog.records if r.name == "offload" and r.exc_info] == []
    assert verify(tmp_path / "out.opk").faults == []


async def test_client_refuses_what_a_server_must_not_say(tmp_path: Path) -> None:
    """An acknowledgement of what was not sent ends the client's connection."""

    async def liar(connection: Any) -> None:
        assert await connection.packet() is not None
        await connection.send(wire.READY)
        await connection.send(wire.durable(5))
        await connection.batch()

    (tmp_path / "a.log").write_bytes(b"one\n")
    async with PacketServer(liar) as server:
        with pytest.raises(BrokenResourceError, match="batch 5 is acknowledged, expected 1 to"):
            await send([str(tmp_path / "a.log")], await server.listen("127.0.0.1:0"), follow=True)


@pytest.mark.parametrize(
    "reader", [wire.read_known, wire.read_seen, wire.read_batch, wire.read_durable, wire.read_frame]
)
def test_messages_that_cannot_be_read_are_packet_errors(reader: Callable[[bytes], object]) -> None:
    """Any bytes are a message or a PacketError."""
    chance = random.Random(0)
    refused = 0
    for _ in range(2000):
        try:
            reader(chance.randbytes(chance.choice([0, 1, 5, 9, 17, 96, 97, 100, 161, 300])))
        except PacketError:
            refused += 1
    assert refused


# --- a machine of connections, pauses, rotations and kills ------------------------------------------------------------


folders = itertools.count()


class SendMachine(RuleBasedStateMachine):
    """Logs grow and rotate, connections break, the server loses its end without a word; each line arrives once."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(os.environ["OFFLOAD_TEST_FOLDER"]) / str(next(folders))
        (self.folder / "logs").mkdir(parents=True)
        self.thread = LoopThread("machine")
        self.thread.__enter__()
        self.expected: dict[str, bytes] = {}
        self.count = 0
        self.rotations = 0
        self.collector: Collector | None = None
        self._run(self._start)

    def _run(self, function: Callable[[], Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(function(), self.thread.submit(asyncio.get_running_loop).result())
        return future.result(PATIENCE)

    async def _start(self) -> None:
        self.collector = await Collector(self.folder / "out.opk").__aenter__()

    @rule(name=st.sampled_from(["a.log", "b.log"]), size=st.sampled_from([1, 10, 5000]), end=st.booleans())
    def append(self, name: str, size: int, end: bool) -> None:
        self.count += 1
        data = b"%d %s" % (self.count, b"x" * size) + (b"\n" if end else b"")
        with (self.folder / "logs" / name).open("ab") as file:
            file.write(data)
        self.expected[name] = self.expected.get(name, b"") + data

    @rule(name=st.sampled_from(["a.log", "b.log"]))
    def rotate(self, name: str) -> None:
        path = self.folder / "logs" / name
        if path.exists() and path.stat().st_size:
            self.rotations += 1
            target = f"{name}.old{self.rotations}"
            path.rename(self.folder / "logs" / target)
            self.expected[target] = self.expected.pop(name)

    @rule()
    def send_all(self) -> None:
        async def run() -> None:
            assert self.collector is not None
            await send([str(self.folder / "logs")], self.collector.address)

        self._run(run)

    @rule(batches=st.integers(0, 3))
    def send_and_break(self, batches: int) -> None:
        async def run() -> None:
            assert self.collector is not None
            collector = self.collector
            upto = collector.receiver.received.batches + batches
            async with Send([str(self.folder / "logs")], collector.address, name="me", follow=True) as sending:
                running = asyncio.ensure_future(sending.run())
                for _ in range(20):
                    if collector.receiver.received.batches >= upto:
                        break
                    await asyncio.sleep(0.001)
                for connection in collector.server.connections:
                    connection.abort()
                await running

        with contextlib.suppress(BrokenResourceError):
            self._run(run)

    @rule(cut=st.integers(0, 300))
    def server_dies(self, cut: int) -> None:
        """As a power cut: what was written last is gone, acknowledged or not makes no difference to the outcome."""

        async def run() -> None:
            assert self.collector is not None
            await self.collector.__aexit__(None, None, None)
            packet = self.folder / "out.opk"
            if packet.exists():
                os.truncate(packet, max(0, packet.stat().st_size - cut))
            await self._start()

        self._run(run)

    @invariant()
    def file_is_sound(self) -> None:
        if (self.folder / "out.opk").exists() and (self.folder / "out.opk").stat().st_size:
            assert verify(self.folder / "out.opk").faults == []

    def teardown(self) -> None:
        if not hasattr(self, "thread"):
            return

        async def end() -> None:
            assert self.collector is not None
            await self.collector.__aexit__(None, None, None)

        try:
            self.send_all()
            self._run(end)
            got = told(self.folder / "out.opk", self.folder / "back") if self.expected else {}
            # A rotated file's content may stand under its old name's generation or its new name: once in all.
            assert sorted(c for c in got.values() if c) == sorted(c for c in self.expected.values() if c)
        finally:
            self.thread.__exit__(None, None, None)


@pytest.mark.slow
def test_machine_of_sends_breaks_and_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever grows, rotates, breaks and dies in whatever order: each byte is in the file once and in order."""
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("OFFLOAD_TEST_FOLDER", str(tmp_path))
    run_state_machine_as_test(
        SendMachine,
        settings=settings(
            max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
