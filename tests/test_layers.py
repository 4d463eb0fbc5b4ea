"""The house: who imports whom, and who may make threads, cross loops, print and do I/O. Read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "offload"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Floors of the house; a room imports from its own floor's room and from floors below.
FLOORS = [
    {"errors"},
    {"packets", "debug"},
    {"loops"},
    {"files", "verify"},
    {"merge"},
    {"net"},
    {"cli_doctor", "cli_live", "cli_net", "cli_signals", "cli_text", "cli_torture", "pytest_plugin"},
    {"cli_order"},
    {"cli_merge", "cli_read", "cli_run", "cli_status"},
    {"cli"},
    {"__main__"},
]
ABOVE = {room: n for n, floor in enumerate(FLOORS) for room in floor}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, relative ones made absolute."""
    package = ["offload", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted text of every name and attribute in the code (not in docstrings or comments)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, ast.unparse(node)


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_point_down(path: Path) -> None:
    """A module imports from its own room and from floors below, never from above or beside."""
    room = room_of(path)
    if room == "__init__":
        return  # names them all, for others
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "offload" or len(parts) < 2 or parts[1] not in ABOVE or parts[1] == room:
            continue
        assert ABOVE[parts[1]] < ABOVE[room], f"{ids(path)}:{line} imports {name}"


def test_every_room_has_its_floor() -> None:
    """A new room must be given its place in the table of this test."""
    assert {room_of(p) for p in MODULES} - {"__init__"} == set(ABOVE)


def test_rooms_are_one_storey() -> None:
    """Nothing nests deeper than offload/<room>/<module>.py."""
    assert all(len(p.relative_to(PACKAGE).parts) <= 2 for p in MODULES)


@pytest.mark.parametrize(
    ("word", "where"),
    [
        # The detector has a watchdog and a reporter, its live view a thread to draw on; `offload.run` is `asyncio.run`
        # under a detector; a loop without a selector is sent a beat; `offload run` wakes the main thread for signals.
        ("threading.Thread", {"loops/thread.py", "debug/watchdog.py", "cli_live.py", "cli_signals.py"}),
        ("asyncio.Runner", {"loops/thread.py", "debug/slow.py"}),
        ("asyncio.run", {"cli.py", "cli_merge.py", "cli_net.py"}),
        ("run_coroutine_threadsafe", {"loops/mailbox.py"}),
        ("call_soon_threadsafe", {"loops/port.py", "debug/edge.py"}),
        (
            "print",
            {"cli.py"}
            | {f"cli_{part}.py" for part in ("doctor", "live", "merge", "net", "read", "run")}
            | {f"cli_{part}.py" for part in ("status", "text", "torture")},
        ),
    ],
)
def test_only_these_modules_may(word: str, where: set[str]) -> None:
    """Threads and loops are made, loops crossed and lines printed in one module each, or a few with a reason."""
    users = {ids(p) for p in MODULES for _, name in names(p) if name == word or name.endswith(f".{word}")}
    assert users == where


@pytest.mark.parametrize("word", ["new_event_loop", "to_thread", "ThreadPoolExecutor", "ProcessPoolExecutor", "Timer"])
def test_nobody_makes_other_threads(word: str) -> None:
    """No pool, no second way to make a loop; the default executor is never used."""
    for path in MODULES:
        for line, name in names(path):
            assert name.split(".")[-1] != word, f"{ids(path)}:{line}"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) == "packets"], ids=ids)
def test_packets_do_no_io(path: Path) -> None:
    """packets/ turns bytes into packets: no asyncio, no threads, no files, no clock."""
    for line, name in imports(path):
        assert name.split(".")[0] not in {"asyncio", "threading", "os", "io", "time", "socket", "pathlib"}, line
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "open"), f"{ids(path)}:{node.lineno}"
