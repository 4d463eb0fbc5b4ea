"""Every example runs, with development mode's checks on, and says nothing on stderr."""

from __future__ import annotations

import ast
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
