"""What a user's checker sees of the public API: results have their types, wrong arguments are errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "api.py"
ROOT = FILE.parent.parent.parent
MARK = re.compile(r"# error: ([\w,-]+) / ([\w,]+)$")


def expected(column: int) -> dict[int, set[str]]:
    marks = {n: MARK.search(line) for n, line in enumerate(FILE.read_text().splitlines(), 1)}
    return {n: set(found[column].split(",")) for n, found in marks.items() if found}


def tool(name: str) -> str:
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False).stdout


def compare(found: dict[int, set[str]], wanted: dict[int, set[str]]) -> None:
    assert found.keys() == wanted.keys()
    assert [(n, codes) for n, codes in found.items() if not codes & wanted[n]] == []


@pytest.mark.slow
def test_mypy_finds_the_marked_errors_only() -> None:
    """Complaint 21: users saw Any; here mypy --strict accepts api.py but for the marked lines, with their code."""
    found: dict[int, set[str]] = defaultdict(set)
    output = run(tool("mypy"), "--strict", "--no-error-summary", "--python-executable", sys.executable, str(FILE))
    for line in output.splitlines():
        match = re.match(r".*api\.py:(\d+): error: .*\[([\w-]+)\]$", line)
        if match:
            found[int(match[1])].add(match[2])
        else:
            assert ": note: " in line, line
    compare(found, expected(1))


@pytest.mark.slow
def test_pyright_finds_the_marked_errors_only(tmp_path: Path) -> None:
    """Complaint 21: users saw Any; here pyright accepts api.py but for the marked lines, with their rule."""
    project = tmp_path / "pyrightconfig.json"  # a user's: ours leaves the file out
    project.write_text(json.dumps({"include": ["api.py"], "extraPaths": [str(ROOT)]}))
    shutil.copy(FILE, tmp_path)
    output = json.loads(run(tool("pyright"), "--outputjson", "--pythonpath", sys.executable, "-p", str(project)))
    assert output["summary"]["filesAnalyzed"] == 1
    found: dict[int, set[str]] = defaultdict(set)
    for problem in output["generalDiagnostics"]:
        if problem["severity"] == "error":
            found[problem["range"]["start"]["line"] + 1].add(problem["rule"])
    compare(found, expected(2))
