"""The pytest plugin as its users meet it: sessions of their own, with pytest-asyncio, anyio and xdist."""

from __future__ import annotations

import json
import re
import textwrap
from importlib.metadata import entry_points
from typing import Any, cast
from xml.etree import ElementTree

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow

# Installed, it is found by its entry point; run from the source tree alone it must be named.
INSTALLED = any(point.value == "offload.pytest_plugin" for point in entry_points(group="pytest11"))

BLOCKS = """
    import asyncio, time
    async def test_blocks():
        await asyncio.sleep(0)
        time.sleep(0.15)  # here
        await asyncio.sleep(0)
"""

_TIMES = 6  # so often a session is run where the machine kept it from measuring what it is about

INI = """
    [pytest]
    asyncio_mode = auto
    asyncio_default_fixture_loop_scope = function
"""


class Session:
    """pytest in a process of its own, in an empty folder.

    Attributes:
        code: the exit code of the last run.
    """

    code: int | pytest.ExitCode

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.makefile(".ini", pytest=textwrap.dedent(INI))

    def __call__(self, tests: str, *arguments: str, **counts: int) -> str:
        """Run these tests; the counts of outcomes must be these. Returns what pytest printed."""
        self.pytester.makepyfile(test_it=tests)
        times = 0
        while True:
            found, text = self._run(arguments, counted=bool(counts))
            busy = found.get("unmeasured", 0) > counts.get("unmeasured", 0)  # this machine
            if busy and "unmeasured" not in counts:
                found["passed"] = found.get("passed", 0) + found.pop("unmeasured")
            times += 1
            if not busy or found == counts or times == _TIMES:
                break
        assert not counts or found == counts, text
        assert self.code == (1 if {"failed", "errors"} & set(counts) else 0) or not counts, text
        return text

    def _run(self, arguments: tuple[str, ...], *, counted: bool) -> tuple[dict[str, int], str]:
        """One session: the counts of its outcomes, and what it printed."""
        own = () if INSTALLED else ("-p", "offload.pytest_plugin")
        result = self.pytester.runpytest_subprocess(*own, "-p", "no:cacheprovider", *arguments, timeout=120)
        self.code = result.ret
        text = result.stdout.str() + result.stderr.str()
        found = result.parseoutcomes() if counted else {}
        found.pop("warnings", None)
        return found, text

    def ini(self, **values: str) -> None:
        lines = "".join(f"{name} = {value}\n" for name, value in values.items())
        self.pytester.makefile(".ini", pytest=textwrap.dedent(INI) + lines)

    def report(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads((self.pytester.path / name).read_text()))


@pytest.fixture
def session(pytester: pytest.Pytester) -> Session:
    return Session(pytester)


def line_of(text: str, mark: str = "# here") -> int:
    text = textwrap.dedent(text).strip()
    return text[: text.index(mark)].count("\n") + 1


# --- asked for, or not ------------------------------------------------------------------------------------------------


def test_without_being_asked_it_does_nothing(session: Session) -> None:
    """No option, no marker: nothing of the detector is imported, no thread runs, and a blocking test passes."""
    tests = """
        import asyncio, sys, threading, time
        async def test_blocks():
            time.sleep(0.15)
            assert not [name for name in sys.modules if name.startswith("offload.") and name != "offload.pytest_plugin"]
            assert threading.enumerate() == [threading.main_thread()]
            assert "offload" in sys.modules
    """
    text = session(tests, passed=1)
    assert "slow" not in text.replace("test_without_being", "")


def test_option_fails_the_test_that_blocks(session: Session) -> None:
    """The failure names loop, line, function and cause; tests that do not block their loop pass."""
    tests = textwrap.dedent(BLOCKS) + textwrap.dedent("""
        async def test_awaits():
            await asyncio.sleep(0.15)
        def test_without_a_loop():
            time.sleep(0.15)
        async def test_in_a_thread():
            await asyncio.to_thread(time.sleep, 0.15)
    """)
    text = session(tests, "--slow-callbacks", failed=1, passed=3)
    line = line_of(BLOCKS)
    assert f"test_it.py:{line} in test_blocks: waiting in" in text
    assert "time.sleep(0.15)  # here" in text
    assert re.search(rf"FAIL test_it\.py::test_blocks: [\d.]+ m?s at test_it\.py:{line} in test_blocks", text)
    assert "Traceback" not in text
    assert "offload/" not in text


def test_threshold_of_the_option(session: Session) -> None:
    """--slow-callbacks=SECONDS sets the limit for tests without a marker."""
    session(BLOCKS, "--slow-callbacks=20", passed=1)
    session(BLOCKS, "--slow-callbacks", "0.1", failed=1)


def test_ini_file_switches_it_on_and_the_option_off(session: Session) -> None:
    """`slow_callbacks` in the ini file is the option for every run; --slow-callbacks=0 takes it back."""
    session.ini(slow_callbacks="0.1")
    session(BLOCKS, failed=1)
    session(BLOCKS, "--slow-callbacks=0", passed=1)
    session(BLOCKS, "--slow-callbacks=20", passed=1)


def test_marker_asks_for_one_test(session: Session) -> None:
    """A marked test is watched without any option, and only it."""
    tests = """
        import asyncio, pytest, time
        @pytest.mark.slow_callbacks
        async def test_marked():
            time.sleep(0.15)
        async def test_plain():
            time.sleep(0.15)
    """
    session(tests, "--strict-markers", failed=1, passed=1)


def test_nearest_marker_sets_the_threshold(session: Session) -> None:
    """A marker beats the option, the function's beats the class's, and None switches it off."""
    tests = """
        import asyncio, pytest, time
        @pytest.mark.slow_callbacks(threshold=20)
        class TestPatient:
            async def test_inherits(self):
                time.sleep(0.15)
            @pytest.mark.slow_callbacks(threshold=0.1)
            async def test_has_its_own(self):
                time.sleep(0.15)
            @pytest.mark.slow_callbacks(allow=["nothing.py:at_all"])
            async def test_has_none_of_its_own(self):
                time.sleep(0.15)
        @pytest.mark.slow_callbacks(threshold=None)
        async def test_not_watched():
            time.sleep(0.15)
    """
    text = session(tests, "--slow-callbacks", failed=1, passed=3)
    assert "FAIL test_it.py::TestPatient::test_has_its_own:" in text


@pytest.mark.parametrize(
    ("marker", "says"),
    [
        ("threshold=0", "threshold is 0, expected seconds from 0.001, or None"),
        ("threshold='soon'", "'>=' not supported"),
        ("0.1", r"takes threshold= and allow=, found [0.1]"),
        ("limit=1", "takes threshold= and allow=, found ['limit']"),
        ("allow=['a.py']", "expected 'glob-of-file:function'"),
    ],
)
def test_wrong_marker_is_told_before_any_test_runs(session: Session, marker: str, says: str) -> None:
    """The session ends with a usage error that names the test."""
    text = session(f"import pytest\n@pytest.mark.slow_callbacks({marker})\ndef test_it(): print('ran')", "-s")
    assert "ERROR: test_it.py::test_it: slow_callbacks: " in text
    assert says in text
    assert "ran" not in text.splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slow-callbacks", "test_it.py"], "'test_it.py' is no number of seconds; put it behind the paths"),
        (["--slow-callbacks=-1"], "'-1' is no number of seconds"),
        (["--slow-callbacks-report=x.txt"], "--slow-callbacks-report: report 'x.txt' has the ending '.txt'"),
    ],
)
def test_wrong_option_is_a_usage_error(session: Session, arguments: list[str], says: str) -> None:
    """It is told in one line, and no test runs."""
    text = session("def test_it(): print('ran')", "-s", *arguments)
    assert says in text
    assert "Traceback" not in text
    assert "ran" not in text.splitlines()


# --- what may block ---------------------------------------------------------------------------------------------------


def test_what_may_block_does_not_fail(session: Session) -> None:
    """By a pattern of the ini file or a marker, by the decorator and by the context manager; other code still fails."""
    tests = """
        import asyncio, pytest, time, offload
        def helper():
            time.sleep(0.15)
        async def test_by_ini():
            helper()
        def load():
            time.sleep(0.15)
        @pytest.mark.slow_callbacks(allow=["test_it.py:load"])
        async def test_by_marker():
            load()
            helper()
        @offload.may_block("reads a small file")
        def decorated():
            time.sleep(0.15)
        async def test_by_decorator():
            decorated()
        async def test_by_context_manager():
            with offload.may_block():
                time.sleep(0.15)
        async def test_by_nothing():
            load()
    """
    session.ini(slow_callbacks_allow="test_it.py:help*")
    text = session(tests, "--slow-callbacks", failed=1, passed=4)
    assert "FAIL test_it.py::test_by_nothing" in text


# --- whoever runs the loop --------------------------------------------------------------------------------------------


def test_every_way_to_run_a_loop_is_watched(session: Session) -> None:
    """anyio's tests, unittest's, `asyncio.run`, a loop on a thread, uvloop, and a loop that outlives its tests."""
    pytest.importorskip("anyio")
    tests = """
        import asyncio, pytest, threading, time, unittest, uvloop
        import anyio
        async def blocks():
            await asyncio.sleep(0.001)
            time.sleep(0.15)  # here
            await asyncio.sleep(0.001)
        @pytest.fixture
        def anyio_backend():
            return "asyncio"
        @pytest.mark.anyio
        async def test_anyio():
            async with anyio.create_task_group() as group:
                group.start_soon(blocks)
        class TestUnit(unittest.IsolatedAsyncioTestCase):
            async def test_unittest(self):
                await blocks()
        def test_run():
            asyncio.run(blocks())
        def test_thread():
            thread = threading.Thread(target=lambda: asyncio.run(blocks()))
            thread.start()
            thread.join()
        def test_uvloop():
            uvloop.run(blocks())
        @pytest.mark.asyncio(loop_scope="module")
        async def test_first_of_a_module():
            await asyncio.sleep(0)
        def test_between():
            time.sleep(0.15)
        @pytest.mark.asyncio(loop_scope="module")
        async def test_second_of_a_module():
            await blocks()
    """
    session.pytester.makefile(".ini", pytest="[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    text = session(tests, "--slow-callbacks", "-W", "ignore", failed=6, passed=2)
    assert text.count(f"test_it.py:{line_of(tests)} in blocks: waiting") >= 6
    assert "test_between:" not in text


def test_loop_that_runs_on_beside_the_tests_is_watched(session: Session) -> None:
    """A server on a thread of its own, there before the test: the test during which it is blocked fails."""
    tests = """
        import asyncio, threading, time
        import pytest
        @pytest.fixture(scope="module")
        def loop():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            yield loop
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
        def call(loop, *arguments):
            done = threading.Event()
            loop.call_soon_threadsafe(lambda: (time.sleep(*arguments), done.set()))
            done.wait()
        def test_first(loop):
            call(loop, 0)
        def test_second(loop):
            call(loop, 0.15)
        def test_third(loop):
            call(loop, 0)
    """
    text = session(tests, "--slow-callbacks", failed=1, passed=2)
    assert "FAIL test_it.py::test_second" in text


def test_fixture_that_blocks_fails_its_test(session: Session) -> None:
    """What blocks in setup is told by the test that needed it, which has run; teardown is not watched."""
    tests = """
        import asyncio, time, pytest
        @pytest.fixture
        async def connection():
            time.sleep(0.15)
            yield 1
        @pytest.fixture
        async def leaves_slowly():
            yield
            time.sleep(0.15)
        async def test_needs_it(connection):
            print("ran")
        async def test_leaves(leaves_slowly):
            pass
    """
    text = session(tests, "--slow-callbacks", "-s", failed=1, passed=1)
    assert "ran" in text
    assert "in connection: waiting" in text


def test_other_outcomes_stay_what_they_are(session: Session) -> None:
    """An error of the test's own is kept and gets the stall beside it; xfail, skip and errors of setup stay."""
    tests = """
        import asyncio, time, pytest
        async def test_own_error():
            time.sleep(0.15)
            assert 1 == 2, "its own"
        @pytest.mark.xfail
        async def test_expected():
            time.sleep(0.15)
        async def test_skipped():
            time.sleep(0.15)
            pytest.skip("no reason")
        @pytest.fixture
        async def broken():
            time.sleep(0.15)
            raise OSError("of the fixture")
        async def test_not_begun(broken):
            pass
        async def test_clean():
            await asyncio.sleep(0)
    """
    text = session(tests, "--slow-callbacks", failed=1, xfailed=1, skipped=1, errors=1, passed=1)
    assert "AssertionError: its own" in text
    assert "OSError: of the fixture" in text
    assert text.count("- slow callbacks -") == 2


def test_no_thread_is_left_in_a_tests_fixtures(session: Session) -> None:
    """A fixture that compares the threads before and after finds none of ours, also if the test was not called."""
    tests = """
        import threading, pytest
        @pytest.fixture(autouse=True)
        def no_leak():
            before = set(threading.enumerate())
            yield
            assert set(threading.enumerate()) <= before
        async def test_one(): pass
        async def test_two(): pass
        def test_threads(): assert len(threading.enumerate()) > 1
        @pytest.fixture(scope="session", autouse=True)
        def none_at_all():
            yield
            assert threading.enumerate() == [threading.main_thread()]
    """
    session(tests, "--slow-callbacks", passed=3)
    text = session(tests, "--slow-callbacks", "--setup-only")
    assert "no_leak" in text
    assert "assert" not in text


# --- unmeasured -------------------------------------------------------------------------------------------------------


def test_what_could_not_be_measured_is_told_and_not_failed(session: Session) -> None:
    """A stopped process, a debugger and a patched clock: counted as unmeasured, with the reason, and exit code 0."""
    tests = """
        import asyncio, bdb, os, signal, subprocess, sys, time
        async def test_stopped():
            await asyncio.sleep(0)
            running = f"grep -qs '^State:.[^T]' /proc/{os.getpid()}/status"
            wakes = f"while {running}; do sleep 0.01; done; sleep 0.5; kill -CONT {os.getpid()}"
            waker = subprocess.Popen(["sh", "-c", wakes])
            os.kill(os.getpid(), signal.SIGSTOP)
            await asyncio.sleep(0)
            await asyncio.to_thread(waker.wait)
        async def test_clock(monkeypatch):
            monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
            time.sleep(0.15)
        async def test_clean():
            await asyncio.sleep(0)
        class Debugger(bdb.Bdb):
            def user_line(self, frame):
                time.sleep(0.15)  # a person reads
                self.set_continue()
        async def test_debugged():
            debugger = Debugger()
            debugger.set_trace()
            x = 1
            sys.settrace(None)
    """
    text = session(tests, "--slow-callbacks=0.1", "--junitxml=junit.xml", "-v", unmeasured=3, passed=1)
    told = set(re.findall(r"UNMEASURED test_it\.py::(\w+): ", text))
    assert told == {"test_stopped", "test_clock", "test_debugged"}
    properties = ElementTree.parse(session.pytester.path / "junit.xml").iter("property")
    assert [(p.get("name"), p.get("value")) for p in properties] == [("slow_callbacks", "unmeasured")] * 3


# --- reports ----------------------------------------------------------------------------------------------------------


def test_report_file_tells_of_the_whole_session(session: Session) -> None:
    """Each stall with its test, loops of one name joined, and passing tests counted in."""
    tests = textwrap.dedent(BLOCKS) + "async def test_clean():\n    await asyncio.sleep(0.05)\n"
    session(
        tests,
        "--slow-callbacks",
        "--slow-callbacks-report=r.json",
        "--slow-callbacks-report=r.html",
        failed=1,
        passed=1,
    )
    report = session.report("r.json")
    (stall,) = [stall for stall in report["stalls"] if stall["verdict"] != "unmeasured"]
    assert (stall["line"], stall["function"], stall["verdict"]) == (line_of(BLOCKS), "test_blocks", "fail")
    assert stall["context"]["test"] == "test_it.py::test_blocks"
    assert report["verdict"] == "fail"
    (loop,) = report["loops"]
    assert loop["watched"] >= 0.2
    assert loop["busy"] >= 0.15
    assert "test_blocks" in (session.pytester.path / "r.html").read_text()


def test_report_of_a_clean_session_says_pass(session: Session) -> None:
    """It is written although there was nothing to tell, also if no test was watched."""
    session("async def test_clean(): pass", "--slow-callbacks=10", "--slow-callbacks-report=r.json", passed=1)
    assert session.report("r.json")["verdict"] == "pass"
    session("async def test_clean(): pass", "--slow-callbacks-report=s.json", passed=1)
    assert session.report("s.json")["stalls"] == session.report("s.json")["loops"] == []


def test_report_that_cannot_be_written_fails_the_session(session: Session) -> None:
    """It is told at the end, and the exit code is not 0."""
    (session.pytester.path / "folder.json").mkdir()
    text = session("async def test_clean(): pass", "--slow-callbacks=20", "--slow-callbacks-report=folder.json")
    assert session.code == 1
    assert "folder.json: Is a directory" in text
    assert "1 passed" in text


def test_xdist_workers_send_what_they_found(session: Session) -> None:
    """With -n the verdicts, the summary and the report are those of the whole session."""
    pytest.importorskip("xdist")
    tests = """
        import asyncio, time, pytest
        @pytest.mark.parametrize("n", range(4))
        async def test_blocks(n):
            await asyncio.sleep(0)
            time.sleep(0.15 * (n % 2))
        @pytest.mark.slow_callbacks
        async def test_marked():
            time.sleep(0.15)
    """
    text = session(tests, "--slow-callbacks", "--slow-callbacks-report=r.json", "-n2", failed=3, passed=2)
    assert text.count("FAIL test_it.py::") == 3
    report = session.report("r.json")
    assert sorted(
        stall["context"]["test"].split("::")[1] for stall in report["stalls"] if stall["verdict"] == "fail"
    ) == [
        "test_blocks[1]",
        "test_blocks[3]",
        "test_marked",
    ]
    assert {loop["name"].split()[0] for loop in report["loops"]} <= {"gw0", "gw1"}
    text = session(tests, "-n2", failed=1, passed=4)
    assert text.count("FAIL test_it.py::") == 1
