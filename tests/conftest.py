"""What all tests share: real peers, or a reason why they are missing."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)  # who is slow is not wrong; all else stays as it is
    settings.load_profile("patient")


def pytest_configure() -> None:
    """Programs that tests start inherit an ignored SIGINT: from pytest-xdist's workers, from jobs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def find_peer(name: str) -> str | None:
    """The program's path, also where daemons live."""
    return shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin")


class Descriptors:
    """Takes what the system grants this process of them."""

    def __init__(self) -> None:
        self._taken: list[int] = []

    def limit(self, spare: int) -> None:
        """Have the system grant so many more than there are now."""
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + spare, hard))

    def take_all(self) -> None:
        with suppress(OSError):
            while True:
                self._taken.append(os.open(os.devnull, os.O_RDONLY))
        assert self._taken

    def give(self, count: int | None = None) -> None:
        """Close so many of them; None: all."""
        for fd in self._taken[:count]:
            os.close(fd)
        del self._taken[:count]


@pytest.fixture
def descriptors() -> Iterator[Descriptors]:
    import resource  # Windows has none

    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), Descriptors()
    try:
        yield taken
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        taken.give()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("peer"):
        for name in marker.args:
            if find_peer(name) is None:
                reason = f"{name} is not installed"
                if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
                    pytest.fail(f"{reason}, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
                pytest.skip(reason)
