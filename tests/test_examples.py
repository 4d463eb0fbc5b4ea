"""Every example runs, with development mode's checks on, and says nothing on stderr."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def complaints(stderr: str) -> list[str]:
    """What a program said, without asyncio's measurement of callbacks: a busy machine is slow."""
    return [line for line in stderr.splitlines() if not line.startswith("Executing <")]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """An example ends well without a warning or an error."""
    command = [sys.executable, "-X", "dev", "-W", "error", str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, complaints(result.stderr)) == (0, [])
    assert result.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_is_short_and_says_what_it_shows(path: Path) -> None:
    """An example shows one idea in at most 60 lines, without private names."""
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert ast.get_docstring(ast.parse(text))
    assert "._" not in text


def test_merge_logs_counts_every_line(tmp_path: Path) -> None:
    """The flagship's example merges every line of its five logs."""
    path = next(p for p in EXAMPLES if p.name == "merge_logs.py")
    result = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.count(": 200 lines") == 5


def test_tail_lines_deals_with_each_line_once(tmp_path: Path) -> None:
    """The example of positions stops twice, and no line is left out or seen twice."""
    path = next(p for p in EXAMPLES if p.name == "tail_lines.py")
    result = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.endswith("600 lines\neach line once\n")


def test_merge_embedded_has_every_line(tmp_path: Path) -> None:
    """The embedded merge has every line when its block is left."""
    path = next(p for p in EXAMPLES if p.name == "merge_embedded.py")
    result = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout == (
        "1500 lines of 3 logs, 0 bytes to go\n1501 lines in the file, the last line of api.log among them: True\n"
    )


def test_the_config_is_right() -> None:
    """The example's TOML file is taken by the command, which follows by it."""
    from offload.merge.settings import Settings, read_config

    settings = Settings(**read_config(EXAMPLES[0].parent / "merge.toml"))
    assert settings.follow
    assert settings.segments is not None
    assert settings.files().arguments


def test_the_unit_is_right() -> None:
    """systemd finds no fault with the unit, which reloads by SIGHUP and hears when the merge is ready."""
    unit = EXAMPLES[0].parent / "offload-merge.service"
    text = unit.read_text()
    assert "Type=notify" in text
    assert "ExecReload=/bin/kill -HUP $MAINPID" in text
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    result = subprocess.run([program, "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
