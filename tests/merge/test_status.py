"""What a merge tells of itself: that it is true, whole, known to be stale, and Prometheus's own format."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import offload
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.files.series import sealed_segments
from offload.files.tail import Unread
from offload.merge.progress import Progress
from offload.merge.settings import status_beside
from offload.merge.status import Teller, _Lag, began, prometheus, read_status
from offload.packets.codec import SourceInfo
from offload.packets.format import Compression

COMMAND = [sys.executable, "-m", "offload"]
AMPLE = 60.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + AMPLE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@contextmanager
def following(*arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*COMMAND, "merge", "-q", "-f", *arguments], stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def status(*arguments: str | Path, code: int = 0) -> bytes:
    done = subprocess.run([*COMMAND, "status", *arguments], capture_output=True, timeout=AMPLE, check=False)
    assert done.returncode == code, (done.returncode, done.stderr)
    return done.stdout


def told(out: Path, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(status(out, "--json", code=code))
    return found


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


@pytest.mark.slow
def test_what_a_running_merge_tells(logs: Path, out: Path) -> None:
    """Lines, lag, problems and the durable point of a merge that runs; afterwards what the packet file itself says."""
    (logs / "a").write_bytes(b"one\ntwo\nrest")
    with following(logs, logs / "nope", "-o", out) as process:
        until(lambda: status_beside(out).exists() and told(out).get("lines") == 2)
        until(lambda: told(out)["durable"]["lines"] == 2)
        found = told(out)
        assert (found["running"], found["current"], found["pid"]) == (True, True, process.pid)
        assert (found["lag_bytes"], found["total_lines"], found["gaps"], found["full"]) == (4, 2, 0, None)
        assert found["problems"] == {str(logs / "nope"): "no such file, and no file matches"}
        until(lambda: told(out)["lag_seconds"] > 0)
        source = found["sources"][0]
        assert (source["path"], source["lag_bytes"], source["held_bytes"]) == (str(logs / "a"), 4, 0)
        assert 0 < found["durable"]["upto"] <= out.stat().st_size
        process.send_signal(signal.SIGSTOP)  # deleted while it cannot read: only its descriptor has the bytes
        with (logs / "a").open("ab") as file:
            file.write(b"x" * 1000)
        (logs / "a").unlink()
        process.send_signal(signal.SIGCONT)
        until(lambda: told(out)["held_bytes"] == 1004)
        process.terminate()
        assert process.wait(AMPLE) == 0
    assert json.loads(status_beside(out).read_text())["running"] is False
    found = told(out, code=1)
    assert (found["running"], found["current"], found["total_lines"]) == (False, False, 3)


@pytest.mark.slow
def test_a_stale_status_is_not_believed(logs: Path, out: Path) -> None:
    """After kill -9, and while another writes the file without a status, what the dead one told is not believed."""
    (logs / "a").write_bytes(b"one\n")
    with following(logs, "-o", out) as process:
        until(lambda: status_beside(out).exists() and told(out)["durable"]["lines"] == 1)
        process.kill()
        process.wait()
    stale = json.loads(status_beside(out).read_text())
    assert stale["running"] is True
    assert told(out, code=1)["current"] is False
    with following(logs, "-o", out, "--status", "off"):
        until(lambda: read_status(out)["running"])
        assert told(out)["current"] is False
        # The number of the dead one may be another's by now.
        stale["pid"] = os.getpid()
        status_beside(out).write_text(json.dumps(stale))
        assert read_status(out)["current"] is False
        stale["process"] = began(os.getpid())
        status_beside(out).write_text(json.dumps(stale))
        assert read_status(out)["current"] is True
    for broken in ("", "{", "[]", '{"version": 99}', "\0" * 10):
        status_beside(out).write_text(broken)
        assert read_status(out)["total_lines"] == 1


def test_durable_is_what_an_fsync_has_proved(out: Path) -> None:
    """Not what was written, nor what was only handed on: lines are durable once an fsync behind them has succeeded."""
    file = PacketFile(out, fsync="interval")
    source = file.open_source(SourceInfo(1, 2, 3, 0, Compression.NONE, b"/a"))
    begun = file.durable
    file.append([Piece(source, b"one\n", 0, 1)])
    assert file.durable == begun
    file.commit()
    assert file.durable == begun
    size = file.end
    file.sync()
    assert (file.durable.upto, file.durable.lines) == (size, 1)
    assert file.durable.time is not None
    file.append([Piece(source, b"two\nthree\n", 4, 2)])
    assert (file.durable.upto, file.durable.lines) == (size, 1)
    file.tick()
    assert file.durable.lines == 3
    file.close()
    again = PacketFile(out, fsync="none")
    assert again.durable.upto <= again.ledger.durable_upto
    again.append([Piece(source, b"four\n", 14, 1)])
    again.tick()
    assert again.durable.upto <= again.ledger.durable_upto < again.end
    again.close()


@pytest.mark.parametrize("fsync", ["interval", "none"])
async def test_durable_never_passes_what_is_on_the_disk(logs: Path, out: Path, fsync: Any) -> None:
    """In a merge that follows, the status names no byte durable that the packet file's own COMMITs will not."""
    (logs / "a").write_bytes(b"line\n" * 1000)
    async with asyncio.timeout(AMPLE), offload.merge([str(logs)], out, follow=True, fsync=fsync) as merge:
        teller = Teller(out, merge.progress)
        seen = 0
        for _ in range(30):
            with (logs / "a").open("ab") as file:
                file.write(b"more\n" * 100)
            await merge.caught_up()
            durable = teller.snapshot()["durable"]
            assert durable["upto"] <= out.stat().st_size  # noqa: ASYNC240
            if fsync == "none" and seen:
                assert durable["upto"] == seen
            seen = durable["upto"]
    with FrameSource(out) as source:
        assert seen <= source.size()


def test_seconds_of_lag_are_the_age_of_the_oldest_byte() -> None:
    """A steady stream that is read a second late lags a second, however long; a rest that stays unread grows old."""
    lag, file = _Lag(), (1, 1)
    for second in range(100):
        end = 1000 * second
        assert lag.seconds(Unread(1000, 0, end, file), float(second)) <= 2
    ages = [lag.seconds(Unread(1000, 0, 99_000, file), float(second)) for second in range(100, 300)]
    assert ages[-1] == 200
    assert lag.seconds(Unread(0, 0, 99_000, file), 300.0) == 0
    assert lag.seconds(Unread(10, 0, 99_010, file), 301.0) == 0
    assert lag.seconds(Unread(10, 0, 10, (1, 2)), 303.0) == 2  # another file: what was unread of the first still is


AWKWARD = ['a "b"', "back\\slash", "line\nend", "größe", os.fsdecode(b"\xff\xfe"), "a\rb", "{x}", "#"]


def test_what_is_counted_is_of_sources_that_are_told(tmp_path: Path) -> None:
    """Others go on reading while a status is made: a line that is counted is never of a source that is missing."""

    class Busy(Progress):
        def unread(self) -> dict[str, Unread]:
            found = super().unread()
            self.lines += 1
            return found

    found = Teller(tmp_path / "merged.opk", Busy()).snapshot()
    assert (found["lines"], found["sources"]) == (0, [])


def test_prometheus_reads_what_is_told(tmp_path: Path) -> None:
    """Prometheus's own parser takes all of it: each family has help and type, and any name is escaped."""
    parser = pytest.importorskip("prometheus_client.parser")
    sources = [
        {"path": str(tmp_path / name), "lag_bytes": number, "lag_seconds": number / 2, "held_bytes": 0}
        for number, name in enumerate(AWKWARD)
    ]
    found = {
        "output": str(tmp_path / AWKWARD[0]),
        "running": True,
        "began": 1.5,
        "time": 2.5,
        "lines": 7,
        "bytes": 8,
        "gaps": 1,
        "late": None,
        "waits": 2,
        "full": "No space left on device",
        "total_lines": 9,
        "segment": 3,
        "durable": {"upto": 100, "lines": None, "time": 1e9 + 0.25},
        "sources": sources,
        "problems": {str(tmp_path / AWKWARD[2]): 'said "no"\n'},
    }
    families = {family.name: family for family in parser.text_string_to_metric_families(prometheus(found))}
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families.values())
    values = {
        (sample.name, sample.labels.get("source")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["offload_merge_lines_total", None] == 7
    assert values["offload_merge_waiting_for_room", None] == 1
    assert values["offload_merge_durable_bytes", None] == 100
    assert values["offload_merge_durable_timestamp_seconds", None] == 1e9 + 0.25
    assert ("offload_merge_durable_lines", None) not in values
    assert "offload_merge_late_lines" not in families
    for number, name in enumerate(AWKWARD):
        shown = str(tmp_path / name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        assert values["offload_merge_source_lag_bytes", shown] == number
    problem = families["offload_merge_source_problem"].samples[0]
    assert problem.labels["reason"] == 'said "no"\n'
    assert all(sample.labels["file"] == found["output"] for f in families.values() for sample in f.samples)
    for family in families.values():
        assert family.type == "counter" or not family.name.endswith("_total")


@pytest.mark.slow
def test_every_form_of_the_command(logs: Path, out: Path, tmp_path: Path) -> None:
    """Text, JSON and Prometheus, of a file that is written and of one that is not; each error has its code."""
    parser = pytest.importorskip("prometheus_client.parser")
    for name in AWKWARD:
        (logs / name).write_bytes(b"one\n")
    told_file = tmp_path / "told.json"

    def caught_up() -> bool:
        found = json.loads(told_file.read_text()) if told_file.exists() else {}
        return (found.get("lines"), found.get("lag_bytes")) == (len(AWKWARD), 0)

    with following(logs, "-o", out, "--status", told_file) as process:
        until(caught_up)
        where = f"--status={told_file}"
        for arguments in ([], ["--json"], ["--prometheus"]):
            assert status(out, *arguments)
            assert status(out, where, *arguments)
        text = status(out, "--status", told_file, "--prometheus").decode()
        families = {family.name for family in parser.text_string_to_metric_families(text)}
        assert {"offload_merge_up", "offload_merge_lines", "offload_merge_source_lag_seconds"} <= families
        table = status(out, "--status", told_file).decode()
        assert f"{logs}/line\\nend\t0 B" in table
        process.terminate()  # killed amid a status it would leave half of one
        assert process.wait(AMPLE) == 0
    assert "nobody writes it now" in status(out, code=1).decode()
    status(out, "--json", "--prometheus", code=2)
    status(tmp_path / "nope.opk", code=3)
    (tmp_path / "text").write_bytes(b"no packet file" * 10)
    status(tmp_path / "text", code=3)
    assert not list(tmp_path.glob(".*.tmp"))


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_what_segments_say_when_nobody_writes(logs: Path, out: Path) -> None:
    """Where each source stands is told by the last segment, of however many."""

    async def run() -> None:
        async with offload.Merge([str(logs)], out, segments=offload.Segments(max_bytes=4000)) as merge:
            await merge.run()

    for _ in range(3):
        append(logs / "a", b"a line\n" * 1000)
        asyncio.run(run())
    append(logs / "a", b"more\n")
    found = read_status(out)
    assert (found["lag_bytes"], found["segment"]) == (5, max(sealed_segments(out)) + 1)
    assert found["total_lines"] == 1000
    assert found["durable"]["upto"] <= out.stat().st_size


@pytest.mark.slow
def test_a_status_that_cannot_be_written_is_told_once(logs: Path, out: Path, tmp_path: Path) -> None:
    """The merge goes on without it, and says so once."""
    (logs / "a").write_bytes(b"one\n")
    with following(logs, "-o", out, "--status", tmp_path / "nowhere" / "status") as process:
        until(lambda: out.exists() and read_status(out)["total_lines"] == 1)
        process.terminate()
        _, said = process.communicate(timeout=AMPLE)
    assert process.returncode == 0
    assert said.decode().count("goes on without a status") == 1


def test_the_status_is_no_source(logs: Path) -> None:
    """A packet file among its own sources, and its status, are not merged; another place among them is refused."""
    (logs / "a").write_bytes(b"one\n")
    out = logs / "merged.opk"
    with following(logs, "-o", out) as process:
        until(lambda: status_beside(out).exists() and told(out).get("lines") == 1)
        assert [Path(source["path"]).name for source in told(out)["sources"]] == ["a"]
        process.terminate()
        assert process.wait(AMPLE) == 0, process.stderr.read() if process.stderr else ""
    command: list[str | Path] = [*COMMAND, "merge", "-f", logs, "-o", out]
    done = subprocess.run([*command, "--status", logs / "status.json"], capture_output=True, timeout=AMPLE, check=False)
    assert done.returncode == 2
    assert b"would be one of the sources" in done.stderr
