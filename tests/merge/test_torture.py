"""Rotation, late and torn lines, packing and kills, all at once, for many seeds; and a checker that finds faults.

OFFLOAD_TORTURE       seconds that each of the two long tests takes, with one short round and seed after another (15);
                      hours are well spent, and from a minute on its rounds are long ones
OFFLOAD_TORTURE_SEED  the first seed; a failure names the one that it had
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import typer

from offload import cli_torture
from offload.files.contents import open_contents
from offload.files.frame_source import FrameSource
from offload.files.series import sealed_segments
from offload.merge.rotations import ALL, CLASSIC, Kind
from offload.merge.torture import STEPS, Round, Torture
from offload.merge.workload import Checker, Findings, Workload, line, pack
from offload.packets.format import FrameType

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, rename under descriptors")

SECONDS = float(os.environ.get("OFFLOAD_TORTURE", "15"))
SEED = int(os.environ.get("OFFLOAD_TORTURE_SEED", str(random.randrange(1 << 32))))
WILD = os.environ.get("OFFLOAD_TORTURE_WILD") == "1"
SHORT = 250  # steps of a short round


# --- the checker ------------------------------------------------------------------------------------------------------

WRITTEN = {b"a": 6, b"b": 3}
WHOLE = [line(b"a", number, b"text of a") for number in range(6)] + [line(b"b", number, b"") for number in range(3)]


def checked(lines: Sequence[bytes]) -> Counter[str]:
    """The counts of what the checker finds in these."""
    checker = Checker(WRITTEN)
    for each in lines:
        checker.take(each)
    found = checker.end()
    assert found.ok == (not found.examples)
    counts = {name: getattr(found, name) for name in ("lost", "doubled", "reordered", "garbled")}
    return +Counter(counts)


DAMAGED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], dict[str, int]]] = {
    "nothing": (lambda lines: lines, {}),
    "one after the other's": (lambda lines: lines[6:] + lines[:6], {}),
    "first lost": (lambda lines: lines[1:], {"lost": 1}),
    "last lost": (lambda lines: lines[:-1], {"lost": 1}),
    "a stretch lost": (lambda lines: lines[:2] + lines[4:], {"lost": 2}),
    "all lost": (lambda lines: [], {"lost": 9}),
    "one doubled": (lambda lines: lines[:3] + lines[2:], {"doubled": 1}),
    "one three times": (lambda lines: lines[:3] + [lines[2]] * 2 + lines[3:], {"doubled": 2}),
    "a file read twice": (lambda lines: lines[:6] * 2 + lines[6:], {"doubled": 6}),
    "two swapped": (lambda lines: [lines[1], lines[0], *lines[2:]], {"reordered": 1}),
    "a stretch too late": (lambda lines: lines[2:6] + lines[:2] + lines[6:], {"reordered": 2}),
    "cut": (lambda lines: [lines[0][:-5], *lines[1:]], {"lost": 1, "garbled": 1}),
    "torn": (lambda lines: [lines[0][:7] + b"\n", lines[0][7:], *lines[1:]], {"lost": 1, "garbled": 2}),
    "glued": (lambda lines: [lines[0][:-1] + lines[1], *lines[2:]], {"lost": 2, "garbled": 1}),
    "a bit flipped": (lambda lines: [lines[0].replace(b"text", b"tdxt"), *lines[1:]], {"lost": 1, "garbled": 1}),
    "noise": (lambda lines: [*lines, b"\0" * 5000 + b"\n", b"\n", b"no line of ours 12345678\n"], {"garbled": 3}),
    "of nobody": (lambda lines: [*lines, line(b"c", 0, b""), line(b"a", 6, b"")], {"garbled": 2}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_checker_finds_each_kind_of_fault(damage: str) -> None:
    """Lost, doubled, reordered and garbled lines are counted, each as what it is; streams may come in any order."""
    harm, expected = DAMAGED[damage]
    assert checked(harm(list(WHOLE))) == Counter(expected)


def test_checker_says_which() -> None:
    """The examples name the lines, so that one can look for them in the logs."""
    checker = Checker({b"a": 10})
    for number in (0, 1, 5, 4, 4):
        checker.take(line(b"a", number, b""))
    checker.take(b"no\n")
    assert checker.end().examples == [
        "reordered: line 4 of a behind 5",
        "doubled: line 4 of a",
        "garbled: b'no\\n' (3 bytes)",
        "lost: a from line 2 to 3",
        "lost: a from line 6 to 9",
    ]


# --- the workload -----------------------------------------------------------------------------------------------------


def everything(folder: Path) -> Iterator[bytes]:
    """The lines of all files, packed or not."""
    import gzip

    for path in sorted(folder.iterdir()):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        *whole, rest = data.split(b"\n")
        assert rest == b"", path
        yield from (each + b"\n" for each in whole)


def play(folder: Path, seed: str, steps: int, kinds: Sequence[Kind] = CLASSIC) -> Workload:
    folder.mkdir()
    workload = Workload(folder, seed, kinds=kinds)
    workload.may_rotate = lambda path: True
    for _ in range(steps):
        workload.step()
    workload.finish()
    workload.close()
    return workload


def test_workload_loses_nothing_by_itself(tmp_path: Path) -> None:
    """Every line that was written is in some file at the end, once and whole: what a merge lacks, the merge lost."""
    workload = play(tmp_path / "logs", f"{SEED}", 2000)
    checker = Checker(workload.written)
    for each in everything(tmp_path / "logs"):
        checker.take(each)
    found = checker.end()
    assert (found.lost, found.doubled, found.garbled) == (0, 0, 0), f"OFFLOAD_TORTURE_SEED={SEED}"
    assert set(workload.did) == {
        "lines torn",
        "lines late",
        "files renamed",
        "files copied and truncated",
        "files packed",
    }


def test_workload_of_all_kinds_loses_nothing_by_itself(tmp_path: Path) -> None:
    """Nor does any other kind of rotation, as long as nobody says that a file is read and may go."""
    workload = play(tmp_path / "logs", f"{SEED}", 4000, ALL)
    checker = Checker(workload.written, workload.repeated)
    seen: set[tuple[int, int]] = set()
    for path in sorted((tmp_path / "logs").rglob("*")):
        identity = path.stat().st_dev, path.stat().st_ino
        if path.is_file() and identity not in seen:
            seen.add(identity)
            contents = open_contents(str(path))
            data = contents.read_at(0, contents.look()[0])
            contents.close()
            for each in data.split(b"\n"):
                if each.strip(b"\0"):
                    checker.take(each + b"\n" if not each.endswith(b"\n") else each)
    found = checker.end()
    assert (found.lost, found.doubled, found.garbled) == (0, 0, 0), f"OFFLOAD_TORTURE_SEED={SEED}: {found.examples}"
    assert {kind.way for kind in ALL} == {"rename", "copy", "swap", "link", "delete", "rewrite"}
    sure = play(tmp_path / "sure", "1", 4000, ALL)  # one in thirty leaves one of these out
    assert {"links swapped", "files linked", "line ends left out"} <= set(sure.did)
    assert not {"files deleted", "files written anew", "files removed"} & set(workload.did)


def test_a_seed_repeats_its_workload(tmp_path: Path) -> None:
    """The same seed writes the same bytes into the same files; another does not."""
    one, same, other = (
        {path.name: list(everything_in(path)) for path in sorted((tmp_path / name).iterdir())}
        for name, seed in (("one", "1"), ("same", "1"), ("other", "2"))
        if play(tmp_path / name, seed, 400)
    )
    assert one == same != other


def everything_in(path: Path) -> Iterator[bytes]:
    folder = path.parent / f"only {path.name}"
    yield path.name.encode()
    if not path.name.endswith(".gz"):  # which holds the time of packing
        yield path.read_bytes()
    assert not folder.exists()


# --- the rounds -------------------------------------------------------------------------------------------------------


def run(folder: Path, seed: int, **options: object) -> tuple[Round, Findings]:
    this = Round(folder, seed, **({"steps": SHORT, "pause": 0.004, "wild": WILD} | options))  # type: ignore[arg-type]
    for _ in this.run():
        pass
    return this, this.check()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_short_rounds(tmp_path: Path, number: int) -> None:
    """Some seconds of everything at once, with kills: each line is in the packet file once, in order and as it was."""
    this, found = run(tmp_path, SEED + number)
    assert found.ok, f"OFFLOAD_TORTURE_SEED={SEED + number}: {found}, {this.did}"
    assert this.did["starts"] > this.did["kills"] >= 0
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "merged.opk", "merged.opk.status", "merge.err"}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("pattern", ["*.log", "*"])
def test_short_rounds_with_segments(tmp_path: Path, number: int, pattern: str) -> None:
    """The same with small segments that are packed meanwhile: nothing is lost or doubled from one to the next."""
    command = (
        sys.executable,
        str(Path(__file__).with_name("segmented.py")),
        '["--segment-size", "50000", "--compress"]',
    )
    this, found = run(tmp_path, SEED + number, command=command, pattern=pattern)
    if pattern == "*":
        found.reordered = 0  # rotated files are sources of their own
    assert found.ok, f"OFFLOAD_TORTURE_SEED={SEED + number}: {found}, {this.did}"
    assert len(sealed_segments(this.packet)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("share", range(2))
def test_rounds_for_some_time(tmp_path: Path, share: int) -> None:
    """As `offload torture` does, one seed after another for OFFLOAD_TORTURE seconds."""
    seed, steps = SEED + 10_000 * share, SHORT if SECONDS < 60 else STEPS  # the first begins with the one given
    torture = Torture(tmp_path / "torture", seed, seconds=SECONDS, steps=steps, wild=WILD)
    for _ in torture.run():
        pass
    report = torture.report
    assert report.findings.ok, f"OFFLOAD_TORTURE_SEED={report.seeds[-1]}: {report.findings}, {report.did}"
    assert report.did["kills"]
    assert [path.name for path in (tmp_path / "torture").iterdir()] == [f"seed-{report.seeds[-1]}"]


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["frame cut out", "bit flipped", "appended twice"])
def test_a_damaged_packet_file_fails_the_round(tmp_path: Path, harm: str) -> None:
    """What a round finds nothing wrong with, it does once the packet file is damaged: by its lines and by `verify`."""
    this, found = run(tmp_path, SEED)
    assert found.ok, f"OFFLOAD_TORTURE_SEED={SEED}: {found}"
    data = this.packet.read_bytes()
    with FrameSource(this.packet) as source:
        frame = [f for f in source if f.header.type is FrameType.LINES and not f.header.flags][-1]
    if harm == "frame cut out":
        this.packet.write_bytes(data[: frame.offset] + data[frame.end :])
    elif harm == "appended twice":
        this.packet.write_bytes(data + data[frame.offset : frame.end])
    else:
        place = frame.offset + 80
        this.packet.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    found = this.check()
    assert not found.ok
    assert found.faults
    assert bool(found.doubled) == (harm == "appended twice")
    assert bool(found.lost) == (harm != "appended twice")


@pytest.mark.slow
def test_a_merge_that_ends_by_itself_fails_the_round(tmp_path: Path) -> None:
    """A command that cannot run is a fault with what it said, and the round ends."""
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    _, found = run(tmp_path, SEED, command=command)
    assert found.faults[-1] == "the merge ended with 1: no such thing (all in merge.err)"
    assert found.lost


@pytest.mark.slow
def test_offsets_beside_the_file_would_be_noticed(tmp_path: Path) -> None:
    """A merge that keeps its offsets in a side file loses or doubles lines under these kills, and a round says so."""
    command = [sys.executable, str(Path(__file__).with_name("kill_mutant.py")), "sidecar"]
    for number in range(20):  # the longer a start takes, the fewer kills there are in a round
        folder = tmp_path / str(number)
        folder.mkdir()
        _, found = run(folder, SEED + number, steps=800, command=command, patience=2.0)
        if found.lost or found.doubled:
            return
    pytest.fail(f"OFFLOAD_TORTURE_SEED={SEED}: it was not noticed")


def test_folder_must_be_empty(tmp_path: Path) -> None:
    """Nobody's files are touched."""
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        Torture(tmp_path, 1, seconds=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_pack_keeps_bytes_and_time(tmp_path: Path) -> None:
    """As gzip: the packed file has the plain one's content and its time of change."""
    path = tmp_path / "app.log.2"
    path.write_bytes(b"one\ntwo\n")
    os.utime(path, ns=(5, 1_000_000_007))
    pack(path)
    assert list(everything(tmp_path)) == [b"one\n", b"two\n"]
    assert [(p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()] == [("app.log.2.gz", 1_000_000_007)]


# --- the command ------------------------------------------------------------------------------------------------------


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    command: Sequence[str | Path] = [sys.executable, "-m", "offload", "torture", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """It says what it did, ends with 0 if all is well, and leaves nothing but its folder."""
    folder = tmp_path / "new"
    with started(folder, "--seconds", "2", "--seed", str(SEED), "--json") as process:
        out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, ""), f"OFFLOAD_TORTURE_SEED={SEED}: {out}"
    record = json.loads(out)
    assert record["ok"]
    assert (record["folder"], record["seeds"]) == (str(folder), [SEED])
    assert record["lines"] > 0 == record["lost"] == record["doubled"] == record["reordered"] == record["garbled"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with started(folder) as again:
        _, errors = again.communicate(timeout=60)
    assert (again.returncode, errors) == (
        4,
        f"offload: {folder}: the folder is not empty; give an empty or a new one\n",
    )


@pytest.mark.slow
def test_ctrl_c_ends_it_and_checks(tmp_path: Path) -> None:
    """Asked to end, it merges what was written, checks it, and no merge stays behind."""
    packet = tmp_path / f"seed-{SEED}" / "merged.opk"
    with started(tmp_path, "--seconds", "600", "--seed", str(SEED)) as process:
        while not packet.exists():
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, ""), f"OFFLOAD_TORTURE_SEED={SEED}: {out}"
    assert "Every line is in the packet file once, in order and as it was." in out
    with FrameSource(packet) as source:
        assert not source.is_being_written()


def test_a_fault_is_told_with_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, and how to repeat it; the exit code is 1, and the round's files stay."""
    broken = functools.partial(Round, command=[sys.executable, "-c", "import sys; sys.exit('no such thing')"])
    monkeypatch.setattr("offload.merge.torture.Round", broken)
    with pytest.raises(typer.Exit) as caught:
        cli_torture.torture(tmp_path, seconds=60, seed=7)
    out = capsys.readouterr().out
    assert caught.value.exit_code == 1
    assert "the merge ended with 1: no such thing" in out
    assert "lost: a from line 0" in out
    assert f"to repeat it: offload torture --seed 7; {tmp_path / 'seed-7'} has it." in out
    assert (tmp_path / "seed-7" / "logs" / "a.log").exists()
