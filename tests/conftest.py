"""What all tests share: real peers, or a reason why they are missing."""

from __future__ import annotations

import os
import shutil

import pytest


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
