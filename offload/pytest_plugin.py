"""The pytest plugin: a test that blocks its event loop fails, and is told where and why.

    pytest --slow-callbacks                      every test; 50 ms, or as in --slow-callbacks=0.2
    pytest --slow-callbacks-report=stalls.html   and a report of the session: .json, .html, .xml, .sarif, .folded
    @pytest.mark.slow_callbacks(threshold=0.02, allow=["tests/helpers.py:load_*"])      this test, also without option

    [tool.pytest.ini_options]
    slow_callbacks = "0.1"                       as the option; there --slow-callbacks=0 switches it off
    slow_callbacks_allow = ["app/startup.py:*"]  code that may block; in the code itself: `offload.may_block`

A test is watched from its fixtures' setup to its own end, on every loop and every thread, whoever runs it
(pytest-asyncio, anyio, `asyncio.run`). Three verdicts:

    pass         nothing held a loop for longer than the threshold, or only what is allowed to
    fail         the code did: the test fails
    unmeasured   something did, but the machine was starved, a debugger was attached, or a clock was patched: the test
                 stays as it is, and is counted as "unmeasured" rather than "passed"

Promises: nothing of `offload.debug` is imported, and nothing runs in a test, unless an option, the ini file or a marker
asks for it. A test that fails anyway keeps its own error. Under pytest-xdist the workers watch, and the controller
writes the report.

Teardown is not watched: a thread of ours that began there would be a leak to those fixtures that look for leaks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from .debug.record import Report

THRESHOLD = 0.05


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("offload", "slow callbacks on event loops")
    group.addoption(
        "--slow-callbacks",
        nargs="?",
        const=THRESHOLD,
        type=_seconds,
        metavar="SECONDS",
        help="Fail tests that block an event loop for longer (0.05 s; 0: none). Put it behind the paths, or give a "
        "number.",
    )
    group.addoption(
        "--slow-callbacks-report",
        action="append",
        default=[],
        metavar="FILE",
        help="Write a report of the tests that were watched: .json, .html, .xml, .sarif or .folded.",
    )
    parser.addini("slow_callbacks", "Seconds, as for --slow-callbacks.", default="")
    parser.addini("slow_callbacks_allow", "Code that may block, as glob-of-file:function.", type="linelist", default=[])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if seconds != 0 and not 0.001 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds; put it behind the paths, or write ={THRESHOLD}"
        )
    return seconds


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "slow_callbacks(threshold=seconds, allow=[pattern, ...]): fail this test if it blocks an event loop for "
        "longer; threshold=None: do not watch it.",
    )
    summary = _Summary(config)
    config.pluginmanager.register(summary, "offload-summary")
    if summary.threshold:
        config.pluginmanager.register(_Watcher(summary), "offload-watcher")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Watch, too, if a marker asks for it; and tell of a marker that is wrong before any test runs."""
    plugins = session.config.pluginmanager
    marked = [item for item in session.items if item.get_closest_marker("slow_callbacks")]
    if marked and not plugins.has_plugin("offload-watcher"):
        summary = plugins.get_plugin("offload-summary")
        assert isinstance(summary, _Summary), "it was registered at the start"
        plugins.register(_Watcher(summary), "offload-watcher")
    watcher = plugins.get_plugin("offload-watcher")
    for item in marked:
        assert isinstance(watcher, _Watcher), "it was registered above"
        watcher.limits(item)


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> Any:
    if report.when == "call" and report.passed and _found(report).get("verdict") == "unmeasured":
        return "unmeasured", "u", ("UNMEASURED", {"yellow": True})
    return None


class Limits(NamedTuple):
    threshold: float  # seconds
    allow: tuple[str, ...]


class _Result(NamedTuple):
    verdict: str
    brief: list[str]  # a line for each reason of it
    words: list[str]  # a paragraph for each
    report: Report


class _Watch:
    """The detector around one test. Made and ended on the thread that runs the tests."""

    def __init__(self, limits: Limits) -> None:
        from .debug.slow import SlowCallbackDetector

        self._detector = SlowCallbackDetector(
            threshold=limits.threshold, every_loop=True, log=False, allow=limits.allow
        ).start()

    def end(self) -> _Result:
        from .debug.report import log_line
        from .debug.summary import culprit, seconds, source_line, why

        report = self._detector.stop()
        result = _Result(report.verdict.value, [], [], report)  # plain, for it crosses between processes
        for stall in report.stalls:
            if stall.verdict == result.verdict != "pass":
                line = source_line(stall.frame)
                result.words.append(log_line(stall) + (f"\n    {line}" if line else ""))
                result.brief.append(f"{seconds(stall.duration)} at {culprit(stall)}: {why(stall)}")
        return result


class _Watcher:
    """Registered only if some test is to be watched."""

    def __init__(self, summary: _Summary) -> None:
        from .debug.allow import Allowed

        self._threshold, self._keep_all = summary.threshold, bool(summary.files)
        self._allow = tuple(summary.config.getini("slow_callbacks_allow"))
        try:
            Allowed(self._allow)
        except ValueError as exc:
            raise pytest.UsageError(f"slow_callbacks_allow: {exc}") from exc
        self._watch: _Watch | None = None
        self._result: _Result | None = None
        self._failed = False  # the test's error is ours

    def limits(self, item: pytest.Item) -> Limits | None:
        """What holds for this test; None: it is not watched.

        The marker nearest to the test that names a threshold decides; what may block comes from all of them.

        Raises:
            pytest.UsageError: a marker is wrong.
        """
        from .debug.allow import Allowed

        threshold: float | None = self._threshold
        allow = self._allow
        for marker in reversed(list(item.iter_markers("slow_callbacks"))):
            unknown = set(marker.kwargs) - {"threshold", "allow"}
            try:
                if marker.args or unknown:
                    raise ValueError(f"takes threshold= and allow=, found {[*marker.args, *sorted(unknown)]}")
                threshold = marker.kwargs.get("threshold", threshold or THRESHOLD)
                if threshold is not None and not threshold >= 0.001:
                    raise ValueError(f"threshold is {threshold!r}, expected seconds from 0.001, or None")
                more = tuple(marker.kwargs.get("allow", ()))
                Allowed(more)
            except (TypeError, ValueError) as exc:
                raise pytest.UsageError(f"{item.nodeid}: slow_callbacks: {exc}") from exc
            allow += more
        return Limits(threshold, allow) if threshold else None

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        limits = self.limits(item)
        self._result, self._failed = None, False
        self._watch = _Watch(limits) if limits else None
        try:
            return (yield)
        except BaseException:
            self._end()
            raise

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        try:
            result = yield
        finally:
            self._end()
        if self._result is not None and self._result.verdict == "fail":
            self._failed = True
            pytest.fail("\n".join(f"slow callback: {words}" for words in self._result.words), pytrace=False)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        self._end()  # if the call was left out

    def _end(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            self._result = watch.end()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Send along what was found, as text: reports cross between processes."""
        report = yield
        result, self._result = self._result, None
        if result is None:
            return report
        if result.verdict != "pass":
            item.user_properties.append(("slow_callbacks", result.verdict))  # for JUnit, with the teardown's report
            if not self._failed:  # else it stands in the error already
                report.sections.append(
                    ("slow callbacks", "\n".join(f"{result.verdict}: {words}" for words in result.words))
                )
        if result.verdict != "pass" or self._keep_all:
            from .debug.record import to_json

            found = {"verdict": result.verdict, "brief": result.brief, "report": to_json(result.report)}
            report.offload = json.dumps(found)  # type: ignore[attr-defined]
        return report


def _found(report: object) -> dict[str, Any]:
    """What the watcher, here or in another process, sent along; {}: nothing."""
    text = getattr(report, "offload", None)
    return json.loads(text) if text else {}


class _Summary:
    """What was found in the whole session: for the terminal, and for the files.

    Attributes:
        threshold: seconds for tests without a marker; None or 0: these are not watched.
        files: where the report goes.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.threshold: float | None = config.getoption("slow_callbacks")
        if self.threshold is None and (text := config.getini("slow_callbacks")):
            try:
                self.threshold = _seconds(text)
            except argparse.ArgumentTypeError as exc:
                raise pytest.UsageError(f"slow_callbacks: {exc}") from exc
        names: list[str] = config.getoption("slow_callbacks_report") or []
        self.files = [config.invocation_params.dir / name for name in names]
        if names:
            from .debug.report import check_ending

            try:
                for name in names:
                    check_ending(name)
            except ValueError as exc:
                raise pytest.UsageError(f"--slow-callbacks-report: {exc}") from exc
        self._began = time.time()
        self._lines: list[tuple[str, str]] = []  # verdict, and what to say
        self._reports: list[tuple[str, str, dict[str, Any]]] = []  # test, worker, report as JSON
        self._problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = _found(report)
        if not found:
            return
        if found["verdict"] != "pass":
            self._lines += [(found["verdict"], f"{report.nodeid}: {brief}") for brief in found["brief"]]
        if self.files:
            self._reports.append((report.nodeid, getattr(report, "worker_id", ""), found["report"]))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.files or hasattr(session.config, "workerinput"):  # workers send along what they found
            return
        from .debug.report import write

        merged = self._merged()
        for path in self.files:
            try:
                write(merged, path)
            except OSError as exc:
                self._problems.append(f"{path}: {exc.strerror or exc}")
                session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def _merged(self) -> Report:
        """One session out of the tests', each stall with its test."""
        from .debug.record import from_json
        from .debug.session import Session

        reports = [(test, worker, from_json(data)) for test, worker, data in self._reports]
        limit = min((report.threshold for _, _, report in reports), default=self.threshold or THRESHOLD)
        session = Session(limit)
        for test, worker, report in reports:
            for stall in report.stalls:
                session.add(replace(stall, number=session.number(), context={**stall.context, "test": test}))
            for loop in report.loops:
                later = report.began - self._began
                timeline = tuple((second + later, share) for second, share in loop.timeline)
                name = f"{worker} {loop.name}" if worker else loop.name
                session.bury(replace(loop, name=name, timeline=timeline))
        return replace(session.report([]), began=self._began, duration=time.time() - self._began)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._lines:
            terminalreporter.section("slow callbacks", yellow=True)
        for verdict, text in self._lines:
            markup = {"red": True} if verdict == "fail" else {"yellow": True}
            terminalreporter.write_line(f"{verdict.upper()} {text}", **markup)
        for problem in self._problems:
            terminalreporter.write_line(f"--slow-callbacks-report: {problem}", red=True)
