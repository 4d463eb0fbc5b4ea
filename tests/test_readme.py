"""What the README shows works as shown."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
SAYS = (
    "10000 lines merged",
    "app.log 0 [b'one\\n', b'two\\n']",
    "(42,)",
    "order 1",
    "payload=b'hello'",
    "right",
)


def complaints(stderr: str) -> list[str]:
    """What a program said, without asyncio's measurement of callbacks: a busy machine is slow."""
    return [line for line in stderr.splitlines() if not line.startswith("Executing <")]


def test_first_two_sh_blocks_are_one_line_each() -> None:
    """Set-up is two commands: one does the main job, one passes the tests."""
    lines = [text.strip() for kind, text in BLOCKS if kind == "sh"][:2]
    assert all("\n" not in line and line.startswith("python3 -m venv .venv && ") for line in lines)
    assert "offload demo" in lines[0]
    assert "offload merge" in lines[0]
    assert "pytest" in lines[1]


def test_first_example_is_fifteen_lines_or_so() -> None:
    """The first screen shows a program that one reads at a glance."""
    assert len([line for line in PROGRAMS[0].splitlines() if line.strip()]) <= 15


@pytest.mark.slow
@pytest.mark.parametrize(("code", "says"), [*zip(PROGRAMS, SAYS, strict=True)])
def test_python_block_runs(code: str, says: str, tmp_path: Path) -> None:
    """A block of Python runs as it stands, in development mode and without a warning."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, complaints(result.stderr)) == (0, [])
    assert says in result.stdout


@pytest.mark.slow
def test_console_commands_work(tmp_path: Path) -> None:
    """The commands of the console block do what their comments say."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_bytes(b"one\ntwo\n")
    block = next(text for kind, text in BLOCKS if kind == "console")
    commands = [shlex.split(line[2:], comments=True) for line in block.splitlines()]
    assert [c[1] for c in commands] == ["merge", "cat", "verify", "split", "stat"]
    follow = subprocess.Popen([sys.executable, "-m", *commands[0]], cwd=tmp_path, stderr=subprocess.PIPE)
    merged = tmp_path / "merged.opk"
    deadline = time.monotonic() + 30
    while not (merged.exists() and b"two\n" in merged.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    follow.send_signal(signal.SIGINT)
    follow.communicate(timeout=30)
    assert follow.returncode == 0
    outputs = [
        subprocess.run([sys.executable, "-m", *c], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for c in commands[1:]
    ]
    assert outputs[0] == "a.log: one\na.log: two\n"
    assert "every checksum and every sequence holds" in outputs[1]
    assert (tmp_path / "back" / "a.log").read_bytes() == b"one\ntwo\n"
    assert "a.log\t2\t8" in outputs[3]


def test_toml_block_is_taken(tmp_path: Path) -> None:
    """The settings in the block of TOML are right."""
    from offload.merge.settings import Settings, read_config

    (tmp_path / "merge.toml").write_text(next(text for kind, text in BLOCKS if kind == "toml"))
    settings = Settings(**read_config(tmp_path / "merge.toml"))
    assert settings.segments is not None
    assert settings.ordered is not None


def test_exit_codes_are_those_of_the_command() -> None:
    """The README and `--help` name the same exit codes."""
    from offload.cli_text import EXIT_CODES

    assert " ".join(EXIT_CODES.split()) in " ".join(README.split())


def test_the_project_speaks_of_itself_alone() -> None:
    """No path of a developer's machine and no registry host in what is shipped."""
    root = Path(__file__).parent.parent
    words = [os.sep + "work" + os.sep, os.sep + "root" + os.sep, "artifactory", "pypi" + "-more"]
    for path in [root / "README.md", root / "pyproject.toml", *(root / "offload").rglob("*.py")]:
        assert not [w for w in words if w in path.read_text()], path
