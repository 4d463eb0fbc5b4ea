"""What a frame was calling is read from its byte code, as its source spells it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from offload.debug.callee import LONGEST, called
from offload.debug.watchdog import current_frames


class Spy:
    """Every method tells how its caller spelt the call."""

    def __init__(self) -> None:
        self.name = self

    def same(self, *args: object) -> Spy:
        return self

    def call(self, *args: object, **keywords: object) -> str | None:
        frame = sys._getframe(1)
        return called(frame.f_code, frame.f_lasti)


def spelt() -> str | None:
    frame = sys._getframe(1)
    return called(frame.f_code, frame.f_lasti)


SPY = Spy()


def test_spells_the_call() -> None:
    """Names, attributes, calls in between and every kind of argument."""
    spy = SPY
    some: list[object] = [1]
    more: dict[str, object] = {"k": 1}
    found = {  # not within `assert`, which pytest writes anew
        "spelt": spelt(),
        "SPY.call": SPY.call(),
        "spy.call": spy.call(1),
        "spy.name.call": spy.name.call(1, k=2),
        "spy.same().call": spy.same().call(),
        "spy.same().name.call": spy.same(spy.name.call()).name.call(2),
        "Spy().call": Spy().call(),
    }
    assert [name for name, given in found.items() if given != name] == []
    called_otherwise = [
        spy.call(spy.same(), *some),
        spy.call(*some, **more),
        *[spy.call() for _ in range(1)],
        (lambda: spy.call())(),
    ]
    assert called_otherwise == ["spy.call"] * 4


def test_spells_the_end_of_a_call_on_many_lines() -> None:
    """Of a chain over several lines the last name is enough."""
    found = (
        SPY.same()
        .same()
        .call()
    )  # fmt: skip
    assert found is not None
    assert found.endswith("call")


@pytest.mark.parametrize("error", [False, True])
def test_spells_a_call_that_is_compiled_twice(error: bool) -> None:
    """What stands in `finally` is in the byte code once for each way into it."""
    found: list[str | None] = []
    try:
        try:
            if error:
                raise KeyError
        finally:
            found.append(SPY.name.call())
    except KeyError:
        pass
    assert found == ["SPY.name.call"]


def test_spells_with() -> None:
    """A `with` that waits for its lock has no call of its own; the lock is named."""

    class Watched:
        entered: str | None = None

        def __enter__(self) -> None:
            frame = sys._getframe(1)
            self.entered = called(frame.f_code, frame.f_lasti)

        def __exit__(self, *args: object) -> None:
            pass

    lock = Watched()
    with lock:
        pass
    assert lock.entered == "with lock"
    holder: Any = Spy()
    holder.name = lock
    with holder.name:
        pass
    assert lock.entered == "with holder.name"


def comes_to_call(name: str, function: Callable[[], object], then: Callable[[], object]) -> None:
    """A thread comes to rest in `function`, in a call of that name; `then` lets it go on."""
    thread = threading.Thread(target=function)
    thread.start()
    assert thread.ident is not None
    seen: list[str | None] = []
    while seen[-3:] != [name] * 3:  # it may have to wait for a processor on its way
        frame = current_frames().get(thread.ident)
        if frame is not None and frame.f_code.co_name == function.__name__:
            seen.append(called(frame.f_code, frame.f_lasti))
        time.sleep(0.001)
    then()
    thread.join()


def test_names_functions_in_c_that_have_no_frame() -> None:
    """A thread that waits in time.sleep, or for a lock, is seen to, though its stack ends at the calling line."""
    lock, rested = threading.Lock(), threading.Event()
    lock.acquire()

    def waits() -> None:
        lock.acquire()
        lock.release()

    def enters() -> None:
        with lock:
            pass

    def sleeps() -> None:
        while not rested.is_set():
            time.sleep(0.1)

    comes_to_call("time.sleep", sleeps, rested.set)
    comes_to_call("lock.acquire", waits, lock.release)
    lock.acquire()
    comes_to_call("with lock", enters, lock.release)


def test_no_call_no_name() -> None:
    """An instruction that computes calls nothing; neither does a place that the code does not have."""
    code = compile("a = b + c", "x", "exec")
    assert [called(code, lasti) for lasti in range(-1, len(code.co_code) + 2)] == [None] * (len(code.co_code) + 3)


def test_code_without_places_has_no_names() -> None:
    """Under `-X no_debug_ranges` the byte code does not say; that is no error."""
    code = test_spells_the_call.__code__
    bare = code.replace(co_linetable=b"")
    found = [called(bare, lasti) for lasti in range(0, len(bare.co_code), 2)]
    assert set(found) == {None}


def test_name_is_shortened() -> None:
    """A name of a thousand characters does not fill a report."""
    code = compile(f"{'x' * 1000}()", "x", "eval")
    found = [name for lasti in range(0, len(code.co_code), 2) if (name := called(code, lasti))]
    assert found == ["x" * LONGEST] * len(found)
    assert found


@pytest.mark.parametrize("function", [test_spells_the_call, pytest.main, time.strftime, threading.Thread.run])
def test_any_place_of_any_code_is_safe(function: Any) -> None:
    """Whatever the instruction, there is a name or None."""
    code = getattr(function, "__code__", spelt.__code__)
    for lasti in range(0, len(code.co_code), 2):
        name = called(code, lasti)
        assert name is None or 0 < len(name) <= LONGEST
