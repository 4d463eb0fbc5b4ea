"""aiofiles' own tests, from its source archive, against `offload.files.aio`: only what they import is another."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import offload

VERSION = importlib.metadata.version("aiofiles")

# What their tests import as `aiofiles` has our names only, where we have them.
SHIM = """
import socket
import sys
from asyncio import BaseEventLoop
from types import ModuleType

import aiofiles.threadpool as real
import pytest
from offload.files import aio


class Threadpool(ModuleType):
    open = staticmethod(aio.open)
    wrap = staticmethod(real.wrap)


shim = ModuleType("aiofiles")
for name in ("open", "os", "ospath", "tempfile", "stdin", "stdout", "stderr"):
    setattr(shim, name, getattr(aio, name))
for name in ("stdin_bytes", "stdout_bytes", "stderr_bytes"):
    setattr(shim, name, getattr(aio, name))
shim.threadpool = Threadpool("aiofiles.threadpool")
sys.modules["aiofiles"] = shim
for name in ("os", "ospath", "tempfile", "threadpool"):
    sys.modules[f"aiofiles.{name}"] = getattr(shim, name)

run_in_executor = BaseEventLoop.run_in_executor


def run_in_no_default_executor(self, executor, function, *arguments):
    assert executor is not None or "getaddrinfo" in function.__name__, f"{function} runs on the default executor"
    return run_in_executor(self, executor, function, *arguments)


BaseEventLoop.run_in_executor = run_in_no_default_executor


@pytest.fixture
def unused_tcp_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
"""

# Tests that say nothing about us, or not about us alone, and why.
CANNOT_APPLY = {
    # It calls aiofiles' dispatcher that wraps a file which is open already. `offload.open` has none: a file that was
    # opened on another thread would not be one that never leaves its own.
    "tests/threadpool/test_wrap.py::test_threadpool_wrapper_negative",
    # It reads its file with the built-in `open`, to show that their test server works.
    "tests/test_simple.py::test_serve_small_bin_file_sync",
    # It wants thirty answers within a second, from port 30001: a speed, and a number that another program may have.
    # `test_a_server_goes_on_while_a_file_is_opened` in test_aio.py is that without either.
    "tests/threadpool/test_concurrency.py::test_slow_file",
}


def missing(reason: str) -> None:
    if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
        pytest.fail(f"{reason}, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(name="suite", scope="module")
def download_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive of the aiofiles that is installed."""
    folder = tmp_path_factory.mktemp("aiofiles")
    download = [sys.executable, "-m", "pip", "download", "--no-binary", "aiofiles", "--no-deps", f"aiofiles=={VERSION}"]
    options = ["--retries", "1", "--timeout", "10", "--disable-pip-version-check", "--dest", str(folder)]
    result = subprocess.run([*download, *options], capture_output=True, text=True, check=False)
    archives = list(folder.glob("aiofiles-*.tar.gz"))
    if not archives:
        missing(f"the source archive of aiofiles {VERSION} cannot be had: {result.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"aiofiles-{VERSION}"


@pytest.mark.slow
def test_the_suite_of_aiofiles_passes_with_the_import_swapped(suite: Path, tmp_path: Path) -> None:
    """Every test that aiofiles has, but for those that cannot apply, passes against `offload.files.aio`."""
    (tmp_path / "shim_of_offload.py").write_text(SHIM)
    deselected = set(CANNOT_APPLY)
    if os.geteuid() == 0:  # it takes a file's permissions away, which says nothing to root; aiofiles itself fails too
        deselected.add("tests/test_os.py::test_access")
    command = [sys.executable, "-X", "dev", "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"]
    # Their tests compare with `open(…).read()`, which leaves a file to the garbage collector.
    command += ["-p", "shim_of_offload", "-o", "asyncio_mode=auto", "-W", "error", "-W", "ignore::ResourceWarning"]
    result = subprocess.run(
        [*command, *(f"--deselect={item}" for item in sorted(deselected))],
        cwd=suite,
        env={
            **os.environ,
            "PYTEST_ADDOPTS": "",
            "PYTHONPATH": os.pathsep.join((str(tmp_path), str(Path(offload.__file__).parents[1]))),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    print(result.stdout[-4000:], result.stderr[-2000:])
    assert result.returncode == 0
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 150
