"""A report in every form: what each says, and that hostile text in one harms none."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import linecache
import re
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from offload.debug.forms import folded, github, junit, sarif
from offload.debug.metrics import Metrics, OpenTelemetryMetrics, prometheus
from offload.debug.record import Cause, Frame, Kind, LoopRecord, Numbers, Report, Stall, Verdict, from_json
from offload.debug.report import log_line, table, write
from offload.debug.slow import watch
from offload.debug.summary import offenders, seconds, source, why

HERE = __file__
HOSTILE = 'a<b>&"\x00\x1b[31m\ud800;\n::error::%[red]</script>'


def block() -> None:
    _ = "this line is blamed"


LINE = block.__code__.co_firstlineno + 1
FRAME = Frame(HERE, LINE, "block")
LOOP_FRAMES = (
    Frame(HERE, 1, "<module>"),
    Frame("/usr/lib/python3/asyncio/base_events.py", 1922, "BaseEventLoop._run_once"),
    Frame("/usr/lib/python3/asyncio/events.py", 80, "Handle._run"),
)


def stall(number: int = 1, duration: float = 0.2, **fields: Any) -> Stall:
    stack = (*LOOP_FRAMES, Frame(HERE, 1, "handle"), FRAME)
    given: dict[str, Any] = {
        "loop": "main",
        "began": 1_000.0 + number,
        "threshold": 0.05,
        "cause": Cause.WAIT,
        "frame": FRAME,
        "innermost": FRAME,
        "stack": stack,
        "stacks": ((stack, 3), (stack[:-1], 1)),
        "task": f"Task-{number}",
        "syscall": "fsync(7)",
        "samples": 4,
        "numbers": Numbers(cpu=duration * 0.03, wait=duration * 0.96),
        "advice": "`await` something else",
    }
    return Stall(number=number, duration=duration, **{**given, **fields})


def report(*stalls: Stall, **fields: Any) -> Report:
    histogram = (0,) * 16 + (5,) + (0,) * 10 + (2,)
    loops = (
        LoopRecord("main", "MainThread", iterations=7, busy=2.0, watched=10.0, longest=0.2, histogram=histogram),
        LoopRecord("db", "db", resource=True, iterations=3, busy=0.5, watched=10.0, longest=0.01),
    )
    return Report(1_000.0, 10.0, 0.05, "3.12.1", "Linux", stalls=stalls, **{"loops": loops, **fields})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes this file's folder the working directory; how reports name the file then."""
    monkeypatch.chdir(Path(HERE).parent)
    return Path(HERE).name


# ---- the file's ending ----


@pytest.mark.parametrize(
    ("name", "beginning"),
    [("r.json", "{"), ("R.HTML", "<!doctype html>"), ("r.xml", "<testsuites"), ("r.sarif", "{"), ("r.folded", "main;")],
)
def test_ending_picks_the_form(tmp_path: Path, name: str, beginning: str) -> None:
    """The file's ending decides what is written, in either case."""
    write(report(stall()), tmp_path / name)
    assert (tmp_path / name).read_text("utf-8").startswith(beginning)


@pytest.mark.parametrize(("name", "found"), [("r.txt", "the ending '.txt'"), ("report", "no ending")])
def test_unknown_ending_is_told(tmp_path: Path, name: str, found: str) -> None:
    """Another ending is an error that names it and those that exist; nothing is written."""
    with pytest.raises(ValueError, match=re.escape(f"{found}; known are .json, .html, .xml, .sarif, .folded")):
        write(report(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_json_file_holds_the_whole_report(tmp_path: Path) -> None:
    """What was written as JSON is the same report when it is read."""
    given = report(stall(), stall(2, verdict=Verdict.UNMEASURED))
    write(given, tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert from_json(data) == given
    flat = {"loop": "main", "file": HERE, "line": LINE, "function": "block", "cause": "wait", "duration": 0.2}
    assert flat.items() <= data["stalls"][0].items()


@pytest.mark.parametrize("ending", ["json", "html", "xml", "sarif", "folded"])
@pytest.mark.parametrize("given", [report(), report(loops=()), report(stall(frame=None, stack=(), stacks=()))])
def test_sparse_report_has_every_form(tmp_path: Path, ending: str, given: Report) -> None:
    """A session without stalls, without loops, or with a stall that nobody saw, can be written."""
    write(given, tmp_path / f"r.{ending}")
    assert (tmp_path / f"r.{ending}").exists()


def test_hostile_text_harms_no_form(tmp_path: Path) -> None:
    """Control characters, markup and lone surrogates in names leave every form well-formed."""
    frame = Frame(f"/tmp/{HOSTILE}.py", 3, HOSTILE)
    bad = stall(frame=frame, stack=(frame,), stacks=(((frame,), 1),), task=HOSTILE, loop=HOSTILE, advice=HOSTILE)
    given = report(bad, loops=(LoopRecord(HOSTILE, HOSTILE, watched=1.0),))
    for ending in ("json", "html", "xml", "sarif", "folded"):
        write(given, tmp_path / f"r.{ending}")
    ElementTree.parse(tmp_path / "r.xml")
    json.loads((tmp_path / "r.sarif").read_text("utf-8"))
    assert (tmp_path / "r.html").read_text("utf-8").count("</script>") == 2
    assert len((tmp_path / "r.folded").read_text("utf-8").splitlines()) == 1
    assert all("\n" not in line for line in [*github(given), log_line(bad)])
    for line in prometheus(given).splitlines():
        assert re.fullmatch(r'# \w+ .*|\w+\{\w+="(?:[^"\\\n]|\\.)*"(?:,\w+="(?:[^"\\\n]|\\.)*")*\} \S+', line), line


# ---- offenders ----


def test_stalls_of_one_fingerprint_are_one_offender() -> None:
    """Stalls at one line for one reason are counted together, what cost most time first."""
    other = Frame(HERE, 2, "other")
    given = report(*(stall(n, n / 10) for n in range(1, 5)), stall(5, 3.0, frame=other, innermost=other))
    first, second = offenders(given)
    assert (first.worst.number, first.count) == (5, 1)
    assert (second.worst.number, second.count, second.p50, second.p99) == (4, 4, 0.2, 0.4)
    assert second.total == pytest.approx(1.0)


def test_failures_come_before_what_could_not_be_measured() -> None:
    """A long stall on a starved machine does not push the program's own faults down."""
    other = Frame(HERE, 2, "other")
    given = report(stall(1, 5.0, frame=other, verdict=Verdict.UNMEASURED), stall(2, 0.1))
    assert [offender.worst.number for offender in offenders(given)] == [2, 1]


def test_stall_told_while_it_lasted_counts_once() -> None:
    """What was said of a stall during it gives way to what was said at its end."""
    (only,) = offenders(report(stall(1, 0.1, ongoing=True), stall(1, 0.4)))
    assert (only.count, only.total) == (1, 0.4)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00421, "4.2 ms"), (0.1523, "152 ms"), (0.9999, "1.00 s"), (12.34, "12.3 s"), (125, "2 min 5 s"),
     (7500, "2 h 5 min")],
)  # fmt: skip
def test_durations_are_short(value: float, text: str) -> None:
    """A duration is told in about three digits and its unit."""
    assert seconds(value) == text


def test_source_is_looked_up_around_the_line() -> None:
    """The blamed line comes with its neighbours, without blank lines at either end."""
    assert source(FRAME, 2) == [(LINE - 1, "def block() -> None:"), (LINE, '    _ = "this line is blamed"')]
    assert source(Frame("<frozen runpy>", 3, "f"), 2) == []


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_words(cause: Cause) -> None:
    """Each cause can be told in a sentence, with or without what was measured about it."""
    assert why(stall(cause=cause, syscall=None)) != ""
    assert cause.value in sarif(report(stall(cause=cause, syscall=None)))


# ---- the log line and the table ----


def test_log_line_names_what_is_needed(here: str) -> None:
    """One line: loop, duration, limit, place, cause, task, request, numbers and the fix."""
    line = log_line(stall(call="os.fsync", context={"request": "r-1"}))
    assert line == (
        f"main: blocked for 200 ms (limit 50 ms) at {here}:{LINE} in block: waiting in os.fsync, fsync(7); "
        "task Task-1; request=r-1; own CPU 3%, waiting 96%; fix: `await` something else"
    )


def test_log_line_sums_up_repetitions() -> None:
    """Stalls since the last line are counted with median, 99th percentile and maximum."""
    line = log_line(stall(), [0.1, 0.2, 0.3])
    assert "; 3 times, p50 200 ms, p99 300 ms, max 300 ms; " in line


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ongoing": True}, "main: has been blocked for 200 ms (limit 50 ms), and still is, at "),
        ({"kind": Kind.QUEUE, "loop": "db"}, "db: a call waited in the queue for 200 ms"),
        ({"kind": Kind.SATURATED, "callbacks": 40, "contributors": (("push", 0.16),)},
         "saturated by 40 callbacks in one turn; longest push 160 ms"),
        ({"cause": Cause.GIL, "holder": Frame(HERE, 9, "hold")}, ":9 in hold"),
        ({"precision": "heartbeat"}, "; precision: heartbeat"),
        ({"frame": None, "callback": "tick"}, " at tick: "),
    ],
)  # fmt: skip
def test_log_line_tells_the_kind(fields: dict[str, Any], words: str) -> None:
    """A stall that lasts, a queue, saturation and a holder of the GIL are each told as such."""
    assert words in log_line(stall(**fields))


def test_table_fits_a_narrow_terminal(here: str) -> None:
    """At 60 columns the table keeps the verdict, the place, its source line, the fix and the loops."""
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(report(stall(), stall(2, verdict=Verdict.FAIL), stall(3, loop="[bold]x"))))
    console.file.close()
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 60
    words = " ".join(text.split())
    for expected in (
        "FAIL",
        f"{here}:{LINE} in block",
        "this line is blamed",
        "await something else",
        "loop [bold]x",
    ):
        assert expected in words, text
    assert re.search(r"main +20% +7 +200 ms +2", text)


def test_table_keeps_to_the_worst() -> None:
    """Only the offenders that cost most are shown, and how many are not."""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    frames = [Frame(HERE, n, f"f{n}") for n in range(1, 6)]
    stalls = [stall(n, n / 10, frame=frame, innermost=frame) for n, frame in enumerate(frames, 1)]
    console.print(table(report(*stalls), most=2))
    console.file.close()
    text = console.export_text()
    assert "in f5" in text
    assert "in f3" not in text
    assert "and 3 other offenders" in text


# ---- JUnit ----


def test_junit_has_the_structure_that_servers_read(here: str) -> None:
    """Suites count their cases; cases hold at most one outcome; times have three decimals."""
    allowed, starved = Frame(HERE, 1, "allowed"), Frame(HERE, 2, "starved")
    given = report(
        stall(),
        stall(2, frame=allowed, verdict=Verdict.PASS),
        stall(3, frame=starved, verdict=Verdict.UNMEASURED, cause=Cause.DESCHEDULED),
    )
    root = ElementTree.fromstring(junit(given))
    assert (root.tag, root.get("tests"), root.get("failures"), root.get("errors")) == ("testsuites", "4", "1", "0")
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {"main", "db"}
    for suite in root:
        assert suite.tag == "testsuite"
        assert next(child.tag for child in suite) == "properties"
        cases = suite.findall("testcase")
        outcomes = [[child.tag for child in case] for case in cases]
        assert suite.get("tests") == str(len(cases))
        assert suite.get("failures") == str(outcomes.count(["failure"]))
        assert suite.get("skipped") == str(outcomes.count(["skipped"]))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp", ""))
        for node in (suite, *cases):
            assert re.fullmatch(r"\d+\.\d{3}", node.get("time", ""))
    by_name = {case.get("name"): [child.tag for child in case] for case in suites["main"].findall("testcase")}
    assert by_name == {
        f"{here}:{LINE} in block (wait)": ["failure"],
        f"{here}:1 in allowed (wait)": [],
        f"{here}:2 in starved (descheduled)": ["skipped"],
    }
    failure = suites["main"].find("testcase/failure")
    assert failure is not None
    assert failure.text
    assert f'File "{HERE}", line {LINE}, in block\n    _ = "this line is blamed"' in failure.text
    assert [case.get("name") for case in suites["db"].findall("testcase")] == ["no stall over 50 ms"]


# ---- SARIF ----


def test_sarif_has_what_the_standard_requires(here: str) -> None:
    """Version, driver, rules and results carry the required properties, and their references hold."""
    held = stall(2, cause=Cause.GIL, holder=Frame(HERE, 1, "hold"))
    log = json.loads(sarif(report(stall(), held, stall(3, frame=None, stack=(), cause=Cause.UNKNOWN))))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "offload"
    assert len({rule["id"] for rule in rules}) == len(rules) == 3
    assert run["invocations"][0]["executionSuccessful"] is True
    assert re.fullmatch(r"1970-01-01T00:16:40\.000Z", run["invocations"][0]["startTimeUtc"])
    for result in run["results"]:
        assert result["message"]["text"]
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert (result["kind"], result["level"]) == ("fail", "error")
        for location in [*result.get("locations", ()), *result.get("relatedLocations", ())]:
            assert location["physicalLocation"]["region"]["startLine"] >= 1
            assert set(location["physicalLocation"]["artifactLocation"]) == {"uri", "uriBaseId"}
    location = next(r for r in run["results"] if r["ruleId"] == "offload/wait")["locations"][0]["physicalLocation"]
    assert location["artifactLocation"] == {"uri": here, "uriBaseId": "%SRCROOT%"}
    assert location["region"] == {"startLine": LINE, "snippet": {"text": '_ = "this line is blamed"'}}


@pytest.mark.parametrize(
    ("verdict", "kind"), [(Verdict.FAIL, "fail"), (Verdict.UNMEASURED, "open"), (Verdict.PASS, "pass")]
)
def test_sarif_result_that_is_no_failure_has_no_level(verdict: Verdict, kind: str) -> None:
    """Section 3.27.10: the level is "none" unless the kind is "fail"."""
    (result,) = json.loads(sarif(report(stall(verdict=verdict))))["runs"][0]["results"]
    assert (result["kind"], result["level"]) == (kind, "error" if kind == "fail" else "none")


def test_sarif_uris_are_uris(tmp_path: Path) -> None:
    """A file elsewhere gets an absolute URI, percent-encoded."""
    odd = tmp_path / "an odd#näme.py"
    (result,) = json.loads(sarif(report(stall(frame=Frame(str(odd), 0, "f")))))["runs"][0]["results"]
    place = result["locations"][0]["physicalLocation"]
    parsed = urllib.parse.urlsplit(place["artifactLocation"]["uri"])
    assert (parsed.scheme, urllib.parse.unquote(parsed.path)) == ("file", str(odd))
    assert place["region"]["startLine"] == 1


def test_sarif_fingerprint_survives_an_edit_above(tmp_path: Path) -> None:
    """The same code a line further down is the same offence; other code is another."""

    def fingerprint(text: str, line: int, name: str) -> str:
        (tmp_path / name).write_text(text)
        given = report(stall(frame=Frame(str(tmp_path / name), line, "f")))
        (result,) = json.loads(sarif(given))["runs"][0]["results"]
        return str(result["partialFingerprints"]["offloadStall/v1"])

    before = fingerprint("f()\n", 1, "a.py")
    linecache.clearcache()
    after = fingerprint("\nf()\n", 2, "a.py")
    linecache.clearcache()
    assert after == before
    assert fingerprint("g()\n", 1, "a.py") != before


# ---- GitHub, folded stacks ----


def test_github_annotations_point_at_the_line(here: str) -> None:
    """Failures are warnings, what could not be measured a notice, what is allowed is left out."""
    other, allowed = Frame(HERE, 2, "other"), Frame(HERE, 3, "allowed")
    lines = github(
        report(
            stall(loop="a,b:c", advice="100%\nsure"),
            stall(2, 0.1, frame=other, verdict=Verdict.UNMEASURED),
            stall(3, frame=allowed, verdict=Verdict.PASS),
        )
    )
    assert len(lines) == 2
    assert lines[0].startswith(f"::warning file={here},line={LINE},title=Waiting blocked loop a%2Cb%3Ac::")
    assert lines[0].endswith("Fix: 100%25%0Asure")
    assert lines[1].startswith(f"::notice file={here},line=2,")


def test_folded_stacks_add_up_to_the_stalled_time(here: str) -> None:
    """Stacks start below the loop's own frames; their microseconds add up to the stalls."""
    given = report(stall(), stall(2, 0.1), stall(3, 0.05, loop="db", stacks=(), stack=(), frame=None, callback="tick;"))
    lines = folded(given).splitlines()
    assert lines == [
        f"main;handle ({here}:1);block ({here}:{LINE}) 225000",
        f"main;handle ({here}:1) 75000",
        "db;tick, 50000",
    ]


# ---- metrics ----


def samples(text: str) -> dict[str, float]:
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")}


def test_prometheus_text_counts_stalls_and_loops() -> None:
    """Stalls by loop, kind, cause and verdict, and each loop's turns, as counters and a cumulative histogram."""
    text = prometheus(report(stall(), stall(2, 0.1), stall(3, verdict=Verdict.UNMEASURED)))
    found = samples(text)
    labels = '{loop="main",kind="slow",cause="wait",verdict="fail"}'
    assert found[f"offload_stalls_total{labels}"] == 2
    assert found[f"offload_stall_seconds_total{labels}"] == pytest.approx(0.3)
    assert found['offload_loop_busy_seconds_total{loop="main"}'] == 2.0
    buckets = [value for key, value in found.items() if key.startswith("offload_loop_turn_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found['offload_loop_turn_seconds_count{loop="main"}'] == 7
    assert found['offload_loop_turn_seconds_bucket{loop="main",le="6.5536e-05"}'] == 5
    for family in re.findall(r"^# TYPE (\w+) \w+$", text, re.MULTILINE):
        assert text.count(f"# HELP {family} ") == 1


def test_loops_of_one_name_are_one_series() -> None:
    """A thousand short-lived loops of one name do not make a series that is there twice."""
    loop = LoopRecord("job", "t", iterations=2, busy=0.1, watched=1.0, longest=0.1, histogram=(0, 1))
    longer = dataclasses.replace(loop, longest=0.3, histogram=(0, 1, 4))
    text = prometheus(report(loops=(loop, longer)))
    found = samples(text)
    assert len(found) == len([line for line in text.splitlines() if line[0] != "#"])
    assert found['offload_loop_iterations_total{loop="job"}'] == 4
    assert found['offload_loop_longest_turn_seconds{loop="job"}'] == 0.3
    assert found['offload_loop_turn_seconds_count{loop="job"}'] == 6


def test_counters_never_shrink_when_a_report_forgets() -> None:
    """What a report no longer holds stays counted; a stall that lasts is counted at its end only."""
    metrics = Metrics()
    metrics(stall(1, 0.1, ongoing=True))
    for number in range(1, 4):
        metrics(stall(number, 0.1))
    assert sum(v for k, v in samples(metrics.prometheus(report())).items() if k.startswith("offload_stalls_total")) == 3


@pytest.fixture
def collected() -> Iterator[tuple[Any, Any]]:
    """A meter provider of the real SDK, and what its reader collects."""
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider(metric_readers=[reader], shutdown_on_exit=False)

    def collect() -> dict[str, list[Any]]:
        data = reader.get_metrics_data()
        return {m.name: list(m.data.data_points) for m in data.resource_metrics[0].scope_metrics[0].metrics}

    yield provider, collect
    provider.shutdown()


def test_opentelemetry_sees_stalls_and_loops(collected: tuple[Any, Any]) -> None:
    """The real SDK collects stalls as a histogram, and each loop's time, turns and utilization."""
    provider, collect = collected
    metrics = OpenTelemetryMetrics(provider)
    metrics.observe(lambda: report())
    metrics(stall(1, 0.1, ongoing=True))
    metrics(stall(1, 0.2))
    metrics(stall(2, 0.4))
    found = collect()
    (point,) = found["asyncio.eventloop.stall.duration"]
    assert (point.count, point.sum) == (2, pytest.approx(0.6))
    assert dict(point.attributes) == {"loop": "main", "kind": "slow", "cause": "wait", "verdict": "fail"}
    spent = {(p.attributes["loop"], p.attributes["state"]): p.value for p in found["asyncio.eventloop.time"]}
    assert spent == {("main", "active"): 2.0, ("main", "idle"): 8.0, ("db", "active"): 0.5, ("db", "idle"): 9.5}
    assert {p.attributes["loop"]: p.value for p in found["asyncio.eventloop.iterations"]} == {"main": 7, "db": 3}
    assert {p.attributes["loop"]: p.value for p in found["asyncio.eventloop.utilization"]} == {"main": 0.2, "db": 0.05}


def test_missing_opentelemetry_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'offload[otel]'")):
        OpenTelemetryMetrics()


# ---- with the real detector ----


@pytest.mark.slow
async def test_real_stall_reaches_every_form(
    tmp_path: Path, collected: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A real block is logged, counted while the program runs, and named with its line in each file."""
    metrics, otel = Metrics(), OpenTelemetryMetrics(collected[0])

    def both(one: Stall) -> None:
        metrics(one)
        otel(one)

    async with watch(on_stall=both) as detector:
        otel.observe(detector.report)
        await asyncio.sleep(0)
        time.sleep(0.2)  # noqa: ASYNC251 - blamed
    found = detector.report()
    line = next(n for n, text in enumerate(linecache.getlines(HERE), 1) if text.endswith("- blamed\n"))
    for ending in ("json", "html", "xml", "sarif", "folded"):
        write(found, tmp_path / f"r.{ending}")
    assert f'"line": {line}' in (tmp_path / "r.json").read_text("utf-8")
    assert f'"startLine": {line}' in (tmp_path / "r.sarif").read_text("utf-8")
    for ending in ("html", "xml", "folded"):
        assert f"test_report.py:{line}" in (tmp_path / f"r.{ending}").read_text("utf-8")
    assert f"test_report.py:{line}" in caplog.text
    counted = samples(metrics.prometheus(found))
    assert sum(value for key, value in counted.items() if key.startswith("offload_stalls_total")) >= 1
    assert collected[1]()["asyncio.eventloop.stall.duration"][0].count >= 1
