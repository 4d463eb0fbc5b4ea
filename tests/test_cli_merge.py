"""The options of `offload merge` and its TOML file: one table, the same values, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload.files.segments import Segments
from offload.merge.by_time import ByTime
from offload.merge.settings import OPTIONS, Settings, SettingsError, parse_duration, parse_size, read_config

COMMAND = [sys.executable, "-m", "offload", "merge"]

WHOLE = """
sources = ["logs/", "/var/log/*.log"]
output = "merged.opk"
follow = true
fsync = "always"
poll = true
linger = "2m"
include = ["*.log"]
exclude = ["debug*", "*/tmp/*"]
max-held = "10GiB"
status = "run/status.json"

[segments]
size = "1GiB"
age = "1d"
compress = true
keep-size = 1000000
keep-age = 90

[by-time]
formats = ["%d/%m %H:%M"]
lateness = 2.5
"""


def run(*arguments: str | Path, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def config(folder: Path, text: str) -> Path:
    path = folder / "merge.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[("1", 1), ("512", 512), ("10B", 10), ("1k", 1024), ("1kB", 1000), ("1KiB", 1024), ("512M", 512 << 20)],
        *[("1GiB", 1 << 30), ("1GB", 10**9), ("1.5 GiB", 3 << 29), ("2T", 2 << 40), (4096, 4096)],
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    """Letters count in 1024s, as dd and logrotate take them; with a B behind, in 1000s, as disks are sold."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1w", 604800), ("500ms", 0.5), ("60", 60)],
        *[(2.5, 2.5), ("1.5h", 5400), (0, 0)],
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    """A unit behind the number; without one, seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", ["", "x", "1X", "-1", "1 2", "0", 0, -1, True, None, 1.5, [], "1e3", "GiB"])
def test_what_is_no_size(value: Any) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=r".*"):
        parse_size(value)


@pytest.mark.parametrize("value", ["", "soon", "-1s", -1, True, None, [], "1y", "1h30", float("inf"), float("nan")])
def test_what_is_no_duration(value: Any) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=r".*"):
        parse_duration(value)


def test_every_key_of_a_file(tmp_path: Path) -> None:
    """Each setting has its key, and relative paths are relative to the file."""
    settings = Settings(**read_config(config(tmp_path, WHOLE)))
    assert settings.sources == (f"{tmp_path}/logs/", "/var/log/*.log")
    assert settings.output == str(tmp_path / "merged.opk")
    assert (settings.follow, settings.fsync, settings.poll, settings.linger) == (True, "always", True, 120)
    assert (settings.include, settings.exclude) == (("*.log",), ("debug*", "*/tmp/*"))
    assert settings.max_held == 10 << 30
    assert settings.status_path == tmp_path / "run/status.json"
    assert settings.segments == Segments(1 << 30, 86400, True, 1_000_000, 90)
    assert settings.ordered == ByTime(("%d/%m %H:%M",), 2.5)
    assert set(read_config(tmp_path / "merge.toml")) == set(OPTIONS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sources = [\n1 = ]", r"merge\.toml: is no TOML: .*line 2"),
        ("a = 1\nb = \xff", r"merge\.toml: is no TOML: .*"),
        ("lingre = 5", r"merge\.toml: lingre: unknown key; is linger meant\?"),
        ("[segments]\nsise = 5", r"merge\.toml: segments\.sise: unknown key; is segments\.size meant\?"),
        ("[nothing]\nsize = 5", r"merge\.toml: nothing: unknown key; there are: sources, output, .*"),
        ("segments = 5", r"merge\.toml: segments: found 5, expected a table \[segments\]"),
        ("sources = 'a.log'", r"merge\.toml: sources: found 'a\.log', expected a list of paths such as \[\"logs/\"\]"),
        ("sources = ['a', 5]", r"merge\.toml: sources: found \['a', 5\], expected a list of paths"),
        ("follow = 'yes'", r"merge\.toml: follow: found 'yes', expected true or false"),
        ("fsync = 'often'", r"merge\.toml: fsync: found 'often', expected none, interval or always"),
        ("max-held = '1 XB'", r"merge\.toml: max-held: found '1 XB', expected a size such as 512M or 1GiB"),
        ("[segments]\nage = 0", r"merge\.toml: segments\.age: found 0, expected a duration .*, more than 0"),
        ("output = ''", r"merge\.toml: output: found '', expected a path"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(tmp_path: Path, text: str, says: str) -> None:
    """The file, the key, what was found and what was expected; where it is no TOML, the line."""
    (tmp_path / "merge.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=says):
        read_config(tmp_path / "merge.toml")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--segment-size", "12x"], "--segment-size: found '12x', expected a size such as 512M or 1GiB"),
        (["--segment-age", "soon"], "--segment-age: found 'soon', expected a duration such as"),
        (["--linger", "-1"], "--linger: found '-1', expected a duration"),
        (["--max-held", "0"], "--max-held: found '0', expected a size"),
        (["--compress"], "--compress: is about sealed segments, expected segment-size or segment-age with it"),
        (["--keep-age", "1d"], "--keep-age: is about sealed segments"),
        (["--time-format", "%H:%M"], "--time-format: time format '%H:%M' names no day"),
        (["--config", "nope.toml"], "nope.toml: No such file or directory"),
        (["--include", ""], "--include: found [''], expected a list of patterns"),
    ],
)
def test_wrong_options_are_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    """A value that is none ends it with 2 and one line, and touches nothing."""
    (tmp_path / "a").write_bytes(b"1\n")
    _, err = run("a", "-o", "x.opk", *arguments, code=2, cwd=tmp_path)
    assert err.startswith(f"offload: {says}")
    assert err.count("\n") == 1
    assert not (tmp_path / "x.opk").exists()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    """What is given there replaces the file's value, also a switch that the file sets; the rest stays."""
    path = config(tmp_path, WHOLE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--no-follow", "--linger", "5", "--segment-size", "2k", "--exclude", "x", "--no-by-time", "-o", "o.opk"]
    text, _ = run("--config", path, "--check", "--json", "a", *options, code=1, cwd=elsewhere)
    found = json.loads(text)
    assert (found["sources"], found["output"]) == (["a"], "o.opk")
    assert (found["follow"], found["linger"], found["exclude"], found["by-time"]) == (False, 5, ["x"], False)
    assert (found["segments.size"], found["segments.keep-size"], found["fsync"]) == (2048, 1_000_000, "always")


def test_the_command_line_starts_without_the_engine() -> None:
    """The options are made of their table without what carries them out: every command would pay for that."""
    code = "import sys, offload.cli; print(*sorted(m for m in sys.modules if m.startswith('offload.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    rooms = ("offload.files.", "offload.packets.", "offload.loops.", "offload.merge.")
    assert [m for m in done.stdout.split() if m.startswith(rooms)] == ["offload.merge.settings"]


@pytest.mark.slow
def test_check_says_what_it_means_and_changes_nothing(tmp_path: Path) -> None:
    """--check lists the settings as TOML and the files that are meant now; what names none is told."""
    (tmp_path / "logs").mkdir()
    for name in ("a.log", "debug.log", "b.txt"):
        (tmp_path / "logs" / name).write_bytes(b"1\n")
    path = config(tmp_path, 'sources = ["logs", "nope"]\noutput = "m.opk"\ninclude = ["*.log"]\nexclude = ["debug*"]')
    out, err = run("--config", path, "--check", code=1)
    assert f"# source: {tmp_path}/logs/a.log" in out
    assert out.count("# source: ") == 1
    assert 'include = ["*.log"]' in out
    assert err == f"offload: {tmp_path}/nope: no such file, and no file matches\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "merge.toml"]
    run("--config", path, "--check", "--follow")
    path.write_text("output = 'm.opk'")
    assert "Missing argument 'PATH...'" in run("--config", path, "--check", code=2)[1]


@pytest.mark.slow
def test_a_merge_by_its_file_alone(tmp_path: Path) -> None:
    """All that a merge needs can stand in the file, wherever it is started."""
    (tmp_path / "a.log").write_bytes(b"1\n")
    path = config(tmp_path, 'sources = ["*.log"]\noutput = "m.opk"')
    out, _ = run("--config", path, "--json", cwd=Path("/"))
    assert json.loads(out)["lines"] == 1
    assert (tmp_path / "m.opk").exists()
    assert not (tmp_path / "m.opk.status").exists()  # nobody follows
