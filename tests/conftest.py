"""What all tests share: real peers, or a reason why they are missing."""

from __future__ import annotations

import os
import shutil
import signal
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("peer"):
        for name in marker.args:
            if find_peer(name) is None:
                reason = f"{name} is not installed"
                if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
                    pytest.fail(f"{reason}, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
                pytest.skip(reason)
