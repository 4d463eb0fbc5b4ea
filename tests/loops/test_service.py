"""Services: one's own class, whose methods run on a thread of its own."""

from __future__ import annotations

import asyncio
import threading

import pytest

import offload
from offload import CallState, ClosedResourceError, Service, method


class Port(Service):
    thread_name = "port"

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.log: list[str] = []

    def _note(self, what: str) -> None:
        self.log.append(f"{what} on {threading.current_thread().name}")

    def on_open(self) -> None:
        self._note("open")
        if self.error is not None:
            raise self.error

    def on_close(self) -> None:
        self._note("close")

    @method
    def read(self, size: int, *, fill: bytes = b"x") -> bytes:
        """Reads."""
        self._note("read")
        return fill * size

    @method
    async def later(self, size: int) -> bytes:
        await asyncio.sleep(0)
        self._note("later")
        data: bytes = self.read.direct(size)
        return data + await self.read(1, fill=b"y")

    @method
    def wait(self, entered: threading.Event, event: threading.Event) -> None:
        entered.set()
        event.wait()


async def test_methods_run_on_the_services_thread_between_open_and_close() -> None:
    """on_open, plain methods, async methods and on_close all run there, in order."""
    async with Port() as port:
        assert await port.read(3) == b"xxx"
        assert await port.later(2) == b"xxy"
        assert await port.read(size=1, fill=b"z") == b"z"
        assert port.stats().submitted == 5  # the opening too
        assert not port.closed
    assert port.closed
    assert port.log == [f"{what} on port" for what in ("open", "read", "later", "read", "read", "read", "close")]


@pytest.mark.parametrize("how", ["async with", "with"])
async def test_on_open_that_fails_ends_the_thread_without_on_close(how: str) -> None:
    """What on_open raises is raised by the start; on_close is not called for what was never open."""
    port = Port(OSError("no such port"))
    with pytest.raises(OSError, match="no such port"):
        _ = port.__enter__() if how == "with" else await port.start()
    assert port.log == ["open on port"]
    with pytest.raises(ClosedResourceError):
        port.read(1)


async def test_service_is_refused_before_its_start_and_after_its_end() -> None:
    """A call too early or too late says what to do; a second start is refused."""
    port = Port()
    assert port.closed
    with pytest.raises(ClosedResourceError, match="not started"):
        port.read(1)
    with pytest.raises(ClosedResourceError, match="not started"):
        port.stats()
    await port.aclose()
    port.close()
    async with port:
        pass
    with pytest.raises(ClosedResourceError, match="closed"):
        port.read(1)
    with pytest.raises(ClosedResourceError, match="started before"):
        await port.start()


def test_plain_threads_open_and_close_it() -> None:
    """`with` works without a loop; tasks of a later loop may call it."""
    with Port() as port:

        async def main() -> bytes:
            return await port.read(2)

        assert asyncio.run(main()) == b"xx"
    assert port.log[-1] == "close on port"


async def test_options_hold_for_a_methods_calls() -> None:
    """A method's timeout drops its call from the queue, while another's blocks."""
    entered, event = threading.Event(), threading.Event()
    async with Port() as port:
        blocked = port.wait(entered, event)
        call = port.read.options(timeout=0.01)(5)
        with pytest.raises(TimeoutError, match="read"):
            await call
        assert call.state is CallState.DROPPED
        event.set()
        await blocked


async def test_two_services_of_a_class_have_two_threads() -> None:
    """One that blocks does not block the other."""
    entered, event = threading.Event(), threading.Event()
    async with Port() as first, Port() as second:
        blocked = first.wait(entered, event)
        assert await second.read(1) == b"x"
        event.set()
        await blocked


def test_method_on_the_class_is_its_description() -> None:
    """Tools that read the class find the name, the docstring and the function."""
    assert isinstance(Port.read, offload.method)
    assert (Port.read.__name__, Port.read.__doc__) == ("read", "Reads.")
    assert Port.read.__wrapped__.__qualname__ == "Port.read"
