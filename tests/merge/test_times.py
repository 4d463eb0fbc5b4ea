"""Times at the beginning of lines: what is found, what is not, and that datetime says the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from offload.merge.times import BEGINNING, Times, check_formats

SECOND = 10**9
NOON = datetime(2026, 11, 21, 20, 21, tzinfo=UTC)
LOGS = Path(__file__).parents[3] / "shared" / "data" / "logs"


@pytest.fixture(autouse=True)
def _zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is two hours ahead, and three in summer."""
    monkeypatch.setenv("TZ", "EET-2EEST,M3.5.0/3,M10.5.0/4")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def ns(moment: datetime, nanoseconds: int = 0) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000 + nanoseconds


def found(line: bytes, *formats: str, arrival: datetime = NOON) -> int | None:
    times = Times(formats)
    times.arrive(ns(arrival))
    return times.of(line)


LOCAL = timezone(timedelta(hours=2))


@pytest.mark.parametrize(
    ("line", "moment"),
    [
        (b"2026-11-21T20:21:00Z x", NOON),
        (b"2026-11-21t20:21:00z", NOON),
        (b"2026-11-21 20:21:00", NOON.replace(tzinfo=LOCAL)),
        (b"2026-11-21 20:21", NOON.replace(tzinfo=LOCAL)),
        (b"2026/11/21 20:21:00 [error] 1#1: x", NOON.replace(tzinfo=LOCAL)),
        (b"2026.11.21 20:21:00,25", NOON.replace(tzinfo=LOCAL, microsecond=250_000)),
        (b"2026-11-21 20:21:00,123 - INFO", NOON.replace(tzinfo=LOCAL, microsecond=123_000)),
        (b"2026-11-21 20:21:00 -12 degrees", NOON.replace(tzinfo=LOCAL)),
        (b"2026-11-21 20:21:00.5+01:00 x", NOON.replace(hour=19, microsecond=500_000)),
        (b"2026-11-21T20:21:00-0330", NOON + timedelta(hours=3, minutes=30)),
        (b"2026-11-21T20:21:00+05", NOON - timedelta(hours=5)),
        (b"2026-11-21 20:21:00 UTC [7] LOG:", NOON),
        (b"2026-07-21 20:21:00", NOON.replace(month=7, hour=17)),
        (b"[2026-11-21T20:21:00Z INFO x]", NOON),
        (b'time="2026-11-21T20:21:00Z" level=info', NOON),
        (b"\xef\xbb\xbf2026-11-21T20:21:00Z", NOON),
        (b"2026-11-21T20:20:60Z", NOON),
        (b"<165>1 2026-11-21T20:21:00.000001Z host app", NOON.replace(microsecond=1)),
        (b"Nov 21 20:21:00 host sshd[1]: x", NOON.replace(tzinfo=LOCAL)),
        (b"<34>Nov  1 20:21:00 host", NOON.replace(day=1, tzinfo=LOCAL)),
        (b"nov 21 2025 20:21:00.5", NOON.replace(year=2025, microsecond=500_000, tzinfo=LOCAL)),
        (b'10.0.0.1 - - [21/Nov/2026:20:21:00 +0000] "GET / HTTP/1.1" 200', NOON),
        (b'::1 - a b [21/Nov/2026:20:21:00 -0100] "GET', NOON + timedelta(hours=1)),
        (b"[Sat Nov 21 20:21:00.000005 2026] [core:error] x", NOON.replace(tzinfo=LOCAL, microsecond=5)),
        (b"Sun Nov  1 20:21:00 2026 x", NOON.replace(day=1, tzinfo=LOCAL)),
        (b"261121 202100 148 INFO", NOON.replace(tzinfo=LOCAL)),
        (b"20261121T202100Z", NOON),
        (b"20261121202100 x", NOON.replace(tzinfo=LOCAL)),
        (b"I1121 20:21:00.000007       1 main.go:1] x", NOON.replace(tzinfo=LOCAL, microsecond=7)),
        (b"%d x" % NOON.timestamp(), NOON),
        (b"%d.25: x" % NOON.timestamp(), NOON.replace(microsecond=250_000)),
        (b"[%d001]" % NOON.timestamp(), NOON.replace(microsecond=1000)),
        (b"%d000001" % NOON.timestamp(), NOON.replace(microsecond=1)),
        (b'{"time": "2026-11-21T20:21:00Z", "ts": 1}', NOON),
        (b'{"m": "\\"time\\": 1", "n": -1.5e3, "t": [], "@timestamp": "2026-11-21T20:21:00Z"}', NOON),
        (b'{"a": {"time": 1}, "timestamp": %d.5}' % NOON.timestamp(), NOON.replace(microsecond=500_000)),
        (b'{"ts":%d123}' % NOON.timestamp(), NOON.replace(microsecond=123_000)),
    ],
)
def test_common_formats(line: bytes, moment: datetime) -> None:
    """The formats that logs commonly have are found by themselves; without a zone they are local time."""
    assert found(line) == ns(moment)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"\tat com.example.Main(Main.java:7)",
        b" 2026-11-21T20:21:00Z",
        b"x 2026-11-21T20:21:00Z",
        b"2026-13-21T20:21:00Z",
        b"2026-02-29 20:21:00",
        b"2026-11-21T24:21:00Z",
        b"2026-11-21T20:21:000",
        b"2026-11/21 20:21:00",
        b"Nov 31 20:21:00",
        b"November",
        b'{"a": {"time": 1763756460}}',
        b'{"msg": "time"}',
        b'{"time": null}',
        b'{"time": 17}',
        b'{"time": "soon"}',
        b"17637564601",
        b"12345 things",
        b"99999999999999999999999999",
        b"\xff\xfe\x00",
    ],
)
def test_no_time(line: bytes) -> None:
    """What only looks like a time, or stands elsewhere in the line, is none."""
    assert found(line) is None


def test_numbers_count_only_where_nothing_better_was_found() -> None:
    """A number at the beginning of a line is no time in a source that writes times."""
    times = Times()
    assert times.of(b"1763756460 is a number, and perhaps a time") is not None
    assert times.of(b"2026-11-21T20:21:00Z") == ns(NOON)
    assert times.of(b"1763756460 is a number, and perhaps a time") is None


def test_a_year_that_is_not_named() -> None:
    """It is the latest that makes the time no later than a week from its arrival."""
    new_year = datetime(2027, 1, 1, 0, 0, 1, tzinfo=LOCAL)
    assert found(b"Dec 31 23:59:59 x", arrival=new_year) == ns(datetime(2026, 12, 31, 23, 59, 59, tzinfo=LOCAL))
    before = new_year - timedelta(seconds=5)
    assert found(b"Jan  1 00:00:01 x", arrival=before) == ns(new_year)
    half = datetime(2026, 6, 1, tzinfo=LOCAL)
    assert found(b"Nov 30 00:00:00 x", arrival=half) == ns(datetime(2025, 11, 30, tzinfo=LOCAL))
    assert found(b"Feb 29 00:00:00 x", arrival=half) == ns(datetime(2024, 2, 29, tzinfo=LOCAL))


def test_the_year_follows_the_arrival() -> None:
    """A source that is read for years gets each line's own year."""
    times = Times()
    for year in (2026, 2027):
        times.arrive(ns(NOON.replace(year=year)))
        assert times.of(b"Nov 21 20:21:00 x") == ns(NOON.replace(year=year, tzinfo=LOCAL))


def test_own_formats() -> None:
    """Formats as for strptime are looked for at the beginning of a line, each in turn, instead of the common ones."""
    formats = "%d.%m.%Y %H:%M:%S,%f", "[%b %d %I:%M %p]", "%Y%j %H %z"
    assert found(b"21.11.2026 20:21:00,1234567890", *formats) == ns(NOON.replace(tzinfo=LOCAL), 123_456_789)
    assert found(b"[Nov 21 08:21 PM] x", *formats) == ns(NOON.replace(tzinfo=LOCAL))
    assert found(b"2026325 20 +0000", *formats) == ns(NOON.replace(minute=0))
    assert found(b"2026-11-21T20:21:00Z", *formats) is None
    assert found(b"31.02.2026 20:21:00,1", *formats) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("%Y-%m-%d", "no hour"),
        ("%H:%M:%S", "no day"),
        ("%d %H", "no day"),
        ("%Y-%m-%d %q", "has %q, expected one of %Y"),
        ("%j %H", "without a year"),
        ("%Y-%m-%d %H%", "has %, expected"),
    ],
)
def test_a_format_that_cannot_be(text: str, what: str) -> None:
    """A format that names no day or hour, or that nobody knows, is refused with what is wrong."""
    with pytest.raises(ValueError, match=what):
        check_formats([text])


moments = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1))  # noqa: DTZ001
zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


def exists(moment: datetime) -> bool:
    """Whether this local time is one: the clocks pass over an hour in spring, of which systems make what they like."""
    return moment.astimezone().replace(tzinfo=None) == moment


@given(moments, zones, st.sampled_from(["seconds", "milliseconds", "microseconds"]), st.sampled_from("T _"))
def test_iso_as_datetime_has_it(moment: datetime, zone: timezone, precision: str, between: str) -> None:
    """Whatever datetime writes as ISO 8601 is read as that moment, with a zone and without."""
    text = moment.replace(tzinfo=zone).isoformat(between, precision)
    assert found(text.encode() + b" x") == ns(datetime.fromisoformat(text))
    assume(exists(moment))
    local = moment.isoformat(between, precision)
    assert found(local.encode() + b" x") == ns(datetime.fromisoformat(local).astimezone())


@given(moments)
def test_other_formats_as_datetime_has_them(moment: datetime) -> None:
    """What datetime writes in the other formats is read as that moment."""
    moment = moment.replace(microsecond=0)
    assume(exists(moment))
    utc = moment.replace(tzinfo=UTC)
    local = ns(moment.astimezone())
    assert found(utc.strftime('::1 - - [%d/%b/%Y:%H:%M:%S %z] "').encode()) == ns(utc)
    assert found(moment.strftime("[%a %b %d %H:%M:%S %Y] x").encode()) == local
    assert found(moment.strftime("%b %d %H:%M:%S x").encode(), arrival=utc) == local
    assert found(moment.strftime("%Y%m%dT%H%M%S").encode()) == local
    assert found(format_datetime(utc).encode(), "%a, %d %b %Y %H:%M:%S %z") == ns(utc)
    if moment.timestamp() >= 10**9:
        assert found(b"%d" % utc.timestamp()) == ns(utc)


beginnings = st.sampled_from(
    [
        b"",
        b"[",
        b"<1>",
        b"2026-11-21",
        b"Nov 21 20:21:",
        b'{"ts":',
        b"a b [21/Nov/2026:",
        b"[Sat ",
        b"\xef\xbb\xbf",
        b"1" * 9,
    ]
)
alphabet = st.sampled_from(list(b'0123456789-/:., TZ+[]{}"\\<>NovSat\xff\0@timesp'))


@given(st.lists(st.tuples(beginnings, st.one_of(st.binary(max_size=80), st.lists(alphabet, max_size=60).map(bytes)))))
@example([(b"", b'{"ts":' + b"9" * 400 + b"}")])
@example([(b"", b'{"time":' * 2000)])
@example([(b"", b"0001-01-01 00:00:00"), (b"", b"9999-12-31 23:59:59-2300"), (b"", b"2026-11-21T20:21:00+99:99")])
@example([(b"", b"2026-11-21 20:21:00," + b"9" * BEGINNING)])
def test_any_bytes(lines: list[tuple[bytes, bytes]]) -> None:
    """Any bytes give a time or None, in any order, and the same again."""
    times, own = Times(), Times(("%Y-%m-%d %H:%M:%S.%f", "%b %d %H:%M:%S"))
    for beginning, rest in lines:
        line = beginning + rest
        assert isinstance(times.of(line), int | None)
        assert isinstance(own.of(line), int | None)
        assert own.of(line) == own.of(line)


@pytest.mark.skipif(not LOGS.is_dir(), reason="the logs are not here")
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("apache", datetime(2005, 12, 4, 4, 47, 44)),  # noqa: DTZ001
        ("hdfs", datetime(2008, 11, 9, 20, 36, 15)),  # noqa: DTZ001
        ("linux", datetime(2026, 6, 14, 15, 16, 1)),  # noqa: DTZ001
        ("openssh", datetime(2025, 12, 10, 6, 55, 46)),  # noqa: DTZ001
        ("zookeeper", datetime(2015, 7, 29, 17, 41, 44, 747_000)),  # noqa: DTZ001
    ],
)
def test_real_logs(name: str, first: datetime) -> None:
    """Every line of real logs of five programs has its time, and they hardly ever go back."""
    times = Times()
    times.arrive(ns(NOON))
    read = [times.of(line) for line in (LOGS / f"{name}.log").read_bytes().splitlines()]
    stamps = [stamp for stamp in read if stamp is not None]
    assert len(stamps) == len(read) > 1000
    assert stamps[0] == ns(first.astimezone())
    assert sum(b < a for a, b in pairwise(stamps)) < len(stamps) / 50


def test_a_line_costs_no_more_when_it_is_hostile() -> None:
    """Lines made to confuse the patterns end in no time at all: each is looked at in a time linear in its length."""
    for line in (
        b'{"a": "' + b"\\" * 65_000,
        b"{" + b'"a": 1, ' * 8000,
        b"a " * 256 + b"[",
        b" ".join([b"a" * 250] * 2),
    ):
        assert found(line[: 64 << 10]) is None
