"""The commands that read packet files, as users run them: what they print, what they write, how they end."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.packets.codec import SourceInfo
from offload.packets.format import HEADER_BYTES, Compression, FrameType

COMMAND = [sys.executable, "-m", "offload"]
AMPLE = 60.0
HOUR = 3600 * 10**9
START = 1_767_225_600 * 10**9  # 2026-01-01T00:00:00Z


def run(*arguments: str | Path, code: int = 0, says: str = "") -> str:
    """Run the command in UTC: it must end with this code and say this on stderr, one line; returns its stdout."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, timeout=AMPLE, check=False, env={**os.environ, "TZ": "UTC"}
    )
    err = done.stderr.decode()
    assert done.returncode == code, (done, err)
    assert re.fullmatch(says + "\n" if says else "", err), err
    return done.stdout.decode()


def write(path: Path, count: int = 6, first: int = 0) -> None:
    """A line an hour, of two sources in turn."""
    now = START
    file = PacketFile(path, fsync="none", clock=lambda: now)
    for name in (b"a", b"b"):
        if file.source_named(b"/logs/" + name) is None:
            file.open_source(SourceInfo(1, 2, 0, 0, Compression.NONE, b"/logs/" + name))
    for n in range(first, first + count):
        now, state = START + n * HOUR, file.ledger.sources[n % 2]
        file.append([Piece(n % 2, b"line %d\n" % n, state.resume_off, 1)])
        file.commit()
    file.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "p.opk")
    return tmp_path / "p.opk"


def spoil(path: Path, number: int) -> None:
    """Damage this frame of lines."""
    with FrameSource(path) as source:
        frame = [f for f in source if f.header.type is FrameType.LINES][number]
    data = bytearray(path.read_bytes())
    data[frame.offset + HEADER_BYTES + 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["--since", "2026-01-01T04:00:00"], "45"),
        (["--since", "2026-01-01T03:00:00+01:00"], "2345"),
        (["--until", "2026-01-01T02:00:00Z"], "01"),
        (["--since", "2026-01-01"], "012345"),
        (["--since", "2026-01-02"], ""),
        (["--since", "1h"], ""),
        (["--until", "1m"], "012345"),
        (["--tail", "2"], "45"),
        (["-n", "0"], ""),
        (["-n", "2", "-s", "a"], "24"),
        (["-n", "2", "--until", "2026-01-01T03:00:01"], "23"),
        (["--grep", "[135]$"], "135"),
        (["-g", "[135]$", "-v", "-n", "2"], "24"),
        (["--since", "2026-01-01T01:00", "--until", "2026-01-01T05:00", "-g", "^line [0-3]", "-s", "b"], "13"),
    ],
    ids=" ".join,
)
@pytest.mark.slow
def test_cat_gives_what_is_asked_for(file: Path, options: list[str], lines: str) -> None:
    """Times, patterns, sources and the last lines, alone and together."""
    assert run("cat", file, *options) == "".join(f"line {n}\n" for n in lines)


@pytest.mark.slow
def test_choices_go_with_prefix_and_json(file: Path) -> None:
    """The lines that are chosen come with their names, numbers and times."""
    assert run("cat", file, "-p", "-n", "2") == "a: line 4\nb: line 5\n"
    told = [json.loads(line) for line in run("cat", file, "--json", "--grep", "4").splitlines()]
    assert told == [{"source": "a", "seq": 2, "time_ns": START + 4 * HOUR, "text": "line 4"}]


@pytest.mark.slow
def test_choices_go_with_follow(file: Path) -> None:
    """The last lines first, then those that come, as far as they match; it ends by itself at `--until`."""
    command = [*COMMAND, "cat", "-f", "-n", "2", "-g", "line .*[02468]$", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as cat:
        assert cat.stdout is not None
        assert [cat.stdout.readline() for _ in range(2)] == [b"line 2\n", b"line 4\n"]
        write(file, 4, first=6)
        assert [cat.stdout.readline() for _ in range(2)] == [b"line 6\n", b"line 8\n"]
        cat.send_signal(signal.SIGINT)
        assert cat.communicate(timeout=AMPLE)[0] == b""
        assert cat.returncode == 0
    assert run("cat", "-f", file, "--until", "2026-01-01T01:00") == "line 0\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cat", "--since", "soon"], r"--since: 'soon' is no time; expected a date, a time as .*, or how long ago: .*"),
        (["cat", "--until", ""], r"--until: '' is no time; .*"),
        (["cat", "--grep", "("], r"--grep: '\(' is no regular expression: .*"),
        (["cat", "-v"], "--invert-match has nothing to turn round; give --grep too"),
        (["cat", "--since", "1h", "--until", "2h"], "--since is not before --until, so there can be no lines; .*"),
        (["cat", "-n", "-1"], "Invalid value for '--tail' / '-n': .*; see offload cat --help"),
        (["export", "-o", "x", "--to", "ndjson", "-s", "x"], "no source 'x' in .*; there are 2: a, b"),
        (["export", "-o", "x", "--to", "csv"], "Invalid value for '--to': .*'csv' is not one of .*"),
        (["verify", "--chain=abc"], "--chain is 'abc', expected an anchor of 64 hex digits, as --chain prints it"),
        (["verify", "--chain", "0" * 63], "--chain has 63 hex digits, expected 64, as --chain prints them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_2(file: Path, arguments: list[str], says: str) -> None:
    """What cannot be meant is told in one line."""
    assert run(*arguments, file, code=2, says="offload: " + says) == ""


@pytest.mark.slow
def test_verify_complete_and_chain(file: Path, tmp_path: Path) -> None:
    """An anchor holds as long as what it covers is as it was; a gap is a failure if completeness is asked for."""
    told = run("verify", "--complete", file)
    assert told.endswith(f"{file}: complete: every byte of every source, up to where it was read\n")
    anchor = run("verify", "-q", "--chain", file).strip()
    assert re.fullmatch("[0-9a-f]{64}", anchor)
    write(file, 2, first=6)
    assert f"{file}: the anchor holds: the first 1," in run("verify", file, "--chain", anchor)
    assert run("verify", "-q", "--chain", anchor, file) == ""
    assert run("verify", "--json", f"--chain={anchor}", file).count('"anchor": {"offset": 1') == 1
    other = anchor[1:] + ("0" if anchor[0] != "0" else "1")
    told = run("verify", "-q", "--chain", other, file, code=1)
    assert told == f"{file}: the anchor does not hold: what stood before it was changed or cut off\n"
    spoil(file, 2)
    assert "the anchor does not hold: a fault stands before it" in run("verify", "--chain", anchor, file, code=1)
    out = tmp_path / "new.opk"
    run("repair", "-q", file, "-o", out)
    run("verify", out)
    told = run("verify", "--complete", out, code=1)
    assert f"{out}: stated as lost: a from byte 7 to byte 14: damaged (generation 0, 1 line)\n" in told
    assert told.endswith(f"{out}: not complete: 1 gap\n")
    gaps = json.loads(run("verify", "--json", "--complete", out, code=1))["gaps"]
    assert gaps == [{"source": "a", "generation": 0, "from": 7, "to": 14, "lines": 1, "reason": "damaged"}]


@pytest.mark.slow
def test_repair_tells_what_it_did(file: Path, tmp_path: Path) -> None:
    """Damage and gaps on stdout, a summary on stderr; as JSON too. Nothing is overwritten unasked."""
    spoil(file, 2)
    out = tmp_path / "new.opk"
    told = run("repair", file, "-o", out, says=rf"{out}: \d+ frames, 5 lines, 1 new gap")
    assert re.fullmatch(
        rf"{file}: byte \d+: 71 bytes hold no valid frame: payload checksum is .*\n"
        rf"{out}: stated as lost: a from byte 7 to byte 14: damaged \(generation 0, 1 line\)\n",
        told,
    )
    run("repair", file, "-o", out, code=4, says=f"offload: {out}: is there already; give another name, or --force")
    run("repair", file, "-o", file, "--force", code=4, says=f"offload: {file}: is the file to read; give another name")
    run("repair", file, "-o", tmp_path / "no" / "x", code=4, says=r"offload: .*/no/x: No such file or directory")
    run("repair", tmp_path / "nope", "-o", out, code=3, says=r"offload: .*/nope: No such file or directory")
    done = json.loads(run("repair", file, "-o", out, "--force", "--json"))
    assert (done["lines"], done["left_out"], len(done["damages"])) == (5, [], 1)
    assert done["gaps"] == [{"source": "a", "generation": 0, "from": 7, "to": 14, "lines": 1, "reason": "damaged"}]
    assert run("cat", out) == "".join(f"line {n}\n" for n in "01345")
    (tmp_path / "text").write_bytes(b"no packets\n" * 20)
    says = r"offload: .*/text: no packet file: no valid frame is in it"
    run("repair", tmp_path / "text", "-o", tmp_path / "x", code=3, says=says)
    writer = PacketFile(file, fsync="none")
    says = r"offload: .*/p.opk is being written; repair it when its writer has ended"
    run("repair", file, "-o", tmp_path / "x", code=5, says=says)
    writer.close()
    assert sorted(os.listdir(tmp_path)) == ["new.opk", "p.opk", "text"]


@pytest.mark.slow
def test_merge_goes_on_with_a_repaired_file(tmp_path: Path) -> None:
    """What was not lost is not read again, and what comes is added: each line once, the lost one stated."""
    (tmp_path / "logs").mkdir()
    log, out, new = tmp_path / "logs" / "a", tmp_path / "p.opk", tmp_path / "new.opk"
    for text in (b"one\n", b"two\n", b"three\n"):
        with log.open("ab") as appended:
            appended.write(text)
        run("merge", "-q", tmp_path / "logs", "-o", out)
    spoil(out, 1)
    run("repair", "-q", out, "-o", new)
    with log.open("ab") as appended:
        appended.write(b"four\n")
    run("merge", "-q", tmp_path / "logs", "-o", new)
    assert run("cat", new) == "one\nthree\nfour\n"
    assert [json.loads(line)["seq"] for line in run("cat", "--json", new).splitlines()] == [0, 2, 3]
    run("verify", new)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ndjson", "text", "parquet", "mcap"])
def test_export_writes_and_tells(file: Path, tmp_path: Path, form: str) -> None:
    """A file in that form, whole or not at all, and a line on stderr."""
    out = tmp_path / "out"
    run("export", file, "--to", form, "-o", out, "-s", "a", says=rf"{out}: 3 lines, .*B")
    before = out.read_bytes()
    says = f"offload: {out}: is there already; give another name, or --force"
    run("export", file, "--to", form, "-o", out, code=4, says=says)
    run("export", file, "--to", form, "-o", file, "--force", code=4, says=r"offload: .*: is the file to read; .*")
    spoil(file, 4)
    cure = "offload: .*: byte .*: payload checksum .*; nothing was written, `offload repair .* -o NEW` first"
    run("export", file, "--to", form, "-o", out, "--force", code=3, says=cure)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["out", "p.opk"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ndjson", "text", "parquet", "mcap"])
def test_a_full_disk_leaves_nothing_of_an_export(tmp_path: Path, form: str) -> None:
    """Where the disk takes no more, the export says so in one line, and no half of a file stays."""
    path = tmp_path / "p.opk"
    with_much = PacketFile(path, fsync="none")
    source = with_much.open_source(SourceInfo(1, 2, 0, 0, Compression.NONE, b"/a"))
    with_much.append([Piece(source, os.urandom(1 << 20).hex().encode() + b"\n", 0, 1)])
    with_much.close()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [*COMMAND, "export", path, "--to", form, "-o", tmp_path / "out"],
        capture_output=True,
        timeout=AMPLE,
        check=False,
        preexec_fn=limit,
    )
    assert done.stderr.decode() == f"offload: {tmp_path / 'out'}: File too large\n"
    assert (done.returncode, os.listdir(tmp_path)) == (4, ["p.opk"])


@pytest.mark.slow
@pytest.mark.parametrize(("form", "package"), [("parquet", "pyarrow"), ("mcap", "mcap")])
def test_a_missing_extra_is_named(file: Path, tmp_path: Path, form: str, package: str) -> None:
    """Without the package that a form needs, the message says which extra to install, and nothing is left behind."""
    assert importlib.util.find_spec(package)
    code = f"import sys; sys.modules[{package!r}] = None; from offload.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "export", file, "--to", form, "-o", tmp_path / "out"],
        capture_output=True,
        timeout=AMPLE,
        check=False,
    )
    says = f"offload: {form} needs {package}, which is not installed; pip install 'offload[export]'\n"
    assert (done.returncode, done.stderr.decode()) == (2, says)
    assert os.listdir(tmp_path) == ["p.opk"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["cat", "verify", "split", "stat", "export", "repair"])
def test_help_lists_exit_codes(command: str) -> None:
    """Every command's help has the exit codes."""
    assert "5 somebody else writes the packet file" in " ".join(run(command, "--help").split())
