"""When did it happen? The time that a line begins with, in the ways in which logs write it. For one thread; no I/O.

    iso       2026-11-21T20:21:00.123Z   2026-11-21 20:21:00,123   2026/11/21 20:21:00   2026.11.21 20:21 +0100
              also behind `[`, `(`, a quote, `time=` (logfmt), `<165>1 ` (syslog, RFC 5424)
    syslog    Nov 21 20:21:00   <34>Nov  1 20:21:00   Nov 21 2026 20:21:00   (RFC 3164)
    common    host - user [21/Nov/2026:20:21:00 +0000]   (Apache's and nginx's access logs)
    ctime     [Sat Nov 21 20:21:00.123456 2026]   Sat Nov 21 20:21:00 2026   (Apache's error log)
    json      {…, "time": "2026-…" or 1763756460.1, …}; also "ts", "timestamp", "@timestamp", the first of these
    klog      I1121 20:21:00.123456
    compact   20261121T202100Z   20261121202100   261121 202100
    epoch     1763756460   1763756460.123   and so many milli-, micro- or nanoseconds

A time counts only where its line begins, so one in a message never does. The last two look like other numbers, so they
count only in a source in which none of the others was found. A line that begins with none has no time of its own.

Without a zone it is local time. Without a year it is the latest that makes the time no later than a week from now: logs
come from the past, and of two machines one may be ahead when the year ends. (The nearest year would make the lines of
half a year ago those of the next.) A leap second is the second behind it. Fractions count down to nanoseconds.

Any bytes give a time or None (tests/merge/test_times.py: datetime is the oracle).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone

SECOND = 10**9
BEGINNING = 512  # bytes of a line in which its time is looked for; of JSON, all of it up to:
_JSON_BYTES = 64 << 10
_CACHED = 4096
_AHEAD = 7 * 86_400  # seconds
_DAY = 86_400 * SECOND
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MONTHS = {m: n for n, m in enumerate(b"jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}

_BOM = rb"(?:\xef\xbb\xbf)?"
_MONTH = rb"(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
_WEEKDAY = rb"(?i:mon|tue|wed|thu|fri|sat|sun)"
_ZONE = rb"([Zz](?![A-Za-z])| ?(?:UTC|GMT)(?![A-Za-z])| ?[+-]\d\d:?\d\d(?!\d)|[+-]\d\d(?![\d:]))?"
_FRACTION = rb"(?:[.,:](\d+))?"
_LEAD = rb"(?:<\d{1,3}>(?:\d{1,2} )?|(?:time|ts|timestamp|at|t)=[\"']?|[\[(\"'])?"
_ISO = re.compile(
    _BOM + _LEAD + rb"(\d{4}([-/.])\d\d\2\d\d(?:[Tt_:,;-]|  ?)\d\d:\d\d(?::\d\d)?+)(?!\d)" + _FRACTION + _ZONE
)
_SYSLOG = re.compile(
    _BOM + rb"(?:<\d{1,3}>)?\[?((" + _MONTH + rb")  ?(\d{1,2})(?: (\d{4}),?)? (\d\d):(\d\d):(\d\d))(?!\d)" + _FRACTION
)
_COMMON = re.compile(
    _BOM + rb"[^\s\[]+ [^\s\[]+ [^\[\"]{1,256}? ?\[((\d\d)/(" + _MONTH + rb")/(\d{4}):(\d\d):(\d\d):(\d\d))"
    rb"(?:[.,](\d+))?(?: ([+-]\d{4}))?\]"
)
_CTIME = re.compile(
    _BOM
    + rb"\[?("
    + _WEEKDAY
    + rb",? ("
    + _MONTH
    + rb")  ?(\d{1,2}) (\d\d):(\d\d):(\d\d))"
    + _FRACTION
    + rb" (\d{4})(?!\d)"
)
_KLOG = re.compile(rb"[IWEFD]((\d\d)(\d\d) (\d\d):(\d\d):(\d\d))\.(\d+)")
_COMPACT = re.compile(_BOM + rb"\[?(\d{8}[Tt _-]?\d{6}|\d{6} \d{6})(?![\d])" + rb"(?:[.,](\d+))?" + _ZONE)
_STAMP = re.compile(_BOM + rb"\[?(\d{10}|\d{13}|\d{16}|\d{19})(?:[.,](\d+))?(?=[\s\]:,;|]|$)")
_NUMBERS = re.compile(rb"\d+")
_STRING = rb'"(?:[^"\\]|\\.)*+"'
_JSON = re.compile(  # members whose values are plain, up to the first of these names; what else is there, json reads
    _BOM + rb"\{\s*+(?:" + _STRING + rb"\s*+:\s*+(?:" + _STRING + rb"|[-+.\w]++)\s*+,\s*+)*?"
    rb'"(?:@timestamp|timestamp|time|ts)"\s*+:\s*+(?:"([^"\\]*+)"|(-?\d+(?:\.\d+)?))'
)
_NAMES = ("time", "ts", "timestamp", "@timestamp")

Seconds = int | None
_Find = Callable[[bytes], int | None]


class Times:
    """The times of the lines of one source, one line after the other.

    Args:
        formats: as for `strptime`, instead of those above; see `check_formats`.

    Remembers which format the source has; what it has not found once is looked for again at each line.
    """

    def __init__(self, formats: Sequence[str] = ()) -> None:
        self._cache: dict[bytes, Seconds] = {}
        self._now = 0
        self._own = [_Own(text) for text in formats]
        self._last: _Find | None = None
        self._known = False  # whether a time was found that looks like nothing else
        self.arrive(time.time_ns())

    def arrive(self, time_ns: int) -> None:
        """The next lines came at this time, Unix nanoseconds."""
        if self._now // _DAY != time_ns // _DAY:
            self._cache.clear()  # the year of what names none may be another
        self._now = time_ns

    def of(self, line: bytes) -> int | None:
        """The time that a line begins with, in Unix nanoseconds; None: it has none. BEGINNING bytes of it will do."""
        last = self._last
        if last is not None:
            found = last(line)
            if found is not None:
                return found
        elif self._own:
            self._last = self._strptime
            return self._strptime(line)
        if self._own or not line:
            return None
        return self._search(line)

    def _search(self, line: bytes) -> int | None:
        first = line[:1]
        if first == b"\xef":
            first = line[3:4]
        for firsts, weak, name in _KINDS:
            if first in firsts and not (weak and self._known):
                find: _Find = getattr(self, name)
                found = find(line)
                if found is not None:
                    self._last = find
                    self._known = self._known or not weak
                    return found
        return None

    # --- one way of writing it each -----------------------------------------------------------------------------------

    def _iso(self, line: bytes) -> int | None:
        found = _ISO.match(line)
        if found is None:
            return None
        moment, _, fraction, zone = found.groups()
        key = moment + zone if zone else moment
        try:
            seconds = self._cache[key]
        except KeyError:
            year, month, day, hour, minute, *rest = map(int, _NUMBERS.findall(moment))
            seconds = self._keep(key, _seconds(year, month, day, hour, minute, rest[0] if rest else 0, zone))
        if seconds is None:
            return None
        return seconds * SECOND + (int(fraction[:9].ljust(9, b"0")) if fraction else 0)

    def _syslog(self, line: bytes) -> int | None:
        found = _SYSLOG.match(line)
        if found is None:
            return None
        moment, month, day, year, hour, minute, second, fraction = found.groups()
        try:
            seconds = self._cache[moment]
        except KeyError:
            fields = _MONTHS[month.lower()], int(day), int(hour), int(minute), int(second)
            value = self._latest(*fields) if year is None else _seconds(int(year), *fields)
            seconds = self._keep(moment, value)
        return _with(seconds, fraction)

    def _common(self, line: bytes) -> int | None:
        found = _COMMON.match(line)
        if found is None:
            return None
        moment, day, month, year, hour, minute, second, fraction, zone = found.groups()
        key = moment + (zone or b"")
        try:
            seconds = self._cache[key]
        except KeyError:
            fields = int(year), _MONTHS[month.lower()], int(day), int(hour), int(minute), int(second)
            seconds = self._keep(key, _seconds(*fields, zone))
        return _with(seconds, fraction)

    def _ctime(self, line: bytes) -> int | None:
        found = _CTIME.match(line)
        if found is None:
            return None
        moment, month, day, hour, minute, second, fraction, year = found.groups()
        key = moment + year
        try:
            seconds = self._cache[key]
        except KeyError:
            fields = int(year), _MONTHS[month.lower()], int(day), int(hour), int(minute), int(second)
            seconds = self._keep(key, _seconds(*fields))
        return _with(seconds, fraction)

    def _klog(self, line: bytes) -> int | None:
        found = _KLOG.match(line)
        if found is None:
            return None
        moment, *fields, fraction = found.groups()
        try:
            seconds = self._cache[moment]
        except KeyError:
            seconds = self._keep(moment, self._latest(*map(int, fields)))
        return _with(seconds, fraction)

    def _compact(self, line: bytes) -> int | None:
        found = _COMPACT.match(line)
        if found is None:
            return None
        moment, fraction, zone = found.groups()
        key = moment + (zone or b"")
        try:
            seconds = self._cache[key]
        except KeyError:
            digits = b"".join(_NUMBERS.findall(moment))
            if len(digits) == 12:  # as `%y` has it in POSIX: 69 is 1969
                digits = (b"19" if digits >= b"69" else b"20") + digits
            month, day, hour, minute, second = (int(digits[at : at + 2]) for at in range(4, 14, 2))
            seconds = self._keep(key, _seconds(int(digits[:4]), month, day, hour, minute, second, zone))
        return _with(seconds, fraction)

    def _epoch(self, line: bytes) -> int | None:
        found = _STAMP.match(line)
        if found is None:
            return None
        whole, fraction = found.groups()
        if len(whole) == 10:
            return _with(int(whole), fraction)
        return int(whole.ljust(19, b"0")) if whole[:1] != b"0" else None

    def _json(self, line: bytes) -> int | None:
        found = _JSON.match(line)
        if found is not None:
            text, number = found.groups()
            return self._value(text) if number is None else _of_number(number)
        if b'"t' not in line and b'"@t' not in line:
            return None
        try:
            members = json.loads(line)
        except (ValueError, RecursionError):
            return None
        for name, value in members.items() if isinstance(members, dict) else ():
            if name in _NAMES:
                if isinstance(value, str):
                    return self._value(value.encode(errors="replace"))
                return _of_number(repr(value).encode()) if type(value) in (int, float) else None
        return None

    def _value(self, text: bytes) -> int | None:
        """What stands in quotes in JSON."""
        for find in (self._iso, self._syslog, self._ctime, self._compact):
            found = find(text)
            if found is not None:
                return found
        return _of_number(text)

    def _strptime(self, line: bytes) -> int | None:
        for own in self._own:
            text = own.beginning(line)
            if text is None:
                continue
            key = own.format + text
            try:
                found = self._cache[key]
            except KeyError:
                value = own.parse(text, lambda *fields: self._latest(*fields))
                found = self._keep(key, value)  # in nanoseconds, these
            if found is not None:
                return found
        return None

    # ------------------------------------------------------------------------------------------------------------------

    def _keep(self, key: bytes, seconds: Seconds) -> Seconds:
        if len(self._cache) >= _CACHED:
            self._cache.clear()
        self._cache[key] = seconds
        return seconds

    def _latest(self, month: int, day: int, hour: int, minute: int, second: int) -> Seconds:
        """Of a time without a year."""
        now = self._now // SECOND
        this = time.gmtime(now).tm_year + 1
        for year in range(this, this - 10, -1):  # the 29th of February may be eight years ago, where a century ended
            found = _seconds(year, month, day, hour, minute, second)
            if found is not None and found <= now + _AHEAD:
                return found
        return None


_DIGITS = {bytes([digit]) for digit in b"0123456789"}
_OPEN = _DIGITS | {b"["}
_MONTH_LETTERS = {bytes([letter]) for letter in b"JFMASONDjfmasond"}
_DAY_LETTERS = {bytes([letter]) for letter in b"MTWFSmtwfs"}
_PRINTABLE = {bytes([letter]) for letter in range(33, 127)} - {b"[", b"{", b"<"}
_KINDS: tuple[tuple[set[bytes], bool, str], ...] = (  # first bytes, whether it looks like other things, method
    (_OPEN | {b"(", b'"', b"'", b"<", b"t", b"a"}, False, "_iso"),
    (_MONTH_LETTERS | {b"<", b"["}, False, "_syslog"),
    (_DAY_LETTERS | {b"["}, False, "_ctime"),
    ({b"{"}, False, "_json"),
    ({b"I", b"W", b"E", b"F", b"D"}, False, "_klog"),
    (_PRINTABLE, False, "_common"),
    (_OPEN, True, "_compact"),
    (_OPEN, True, "_epoch"),
)


def _with(seconds: Seconds, fraction: bytes | None) -> int | None:
    if seconds is None:
        return None
    return seconds * SECOND + (int(fraction[:9].ljust(9, b"0")) if fraction else 0)


def _seconds(
    year: int, month: int, day: int, hour: int, minute: int, second: int, zone: bytes | None = None
) -> Seconds:
    """Unix seconds; None: there is no such time."""
    leap = second == 60
    try:
        if zone is None:
            # Of an hour that comes twice the first; of one that is left out, as with the clock from before.
            return int(datetime(year, month, day, hour, minute, second - leap).timestamp()) + leap  # noqa: DTZ001
        moment = datetime(year, month, day, hour, minute, second - leap, tzinfo=_zone(zone))
        return (moment - _EPOCH) // timedelta(seconds=1) + leap
    except (ValueError, OverflowError, OSError):
        return None


def _zone(text: bytes) -> timezone:
    text = text.strip()
    if text[:1] not in (b"+", b"-"):
        return UTC
    digits = text[1:].replace(b":", b"").ljust(4, b"0")
    ahead = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return timezone(-ahead if text[:1] == b"-" else ahead)


def _of_number(text: bytes) -> int | None:
    """Unix seconds, or milli-, micro-, nanoseconds, as their size tells."""
    whole, _, fraction = text.partition(b".")
    if not whole.isdigit() or not (not fraction or fraction.isdigit()) or not 9 <= len(whole) <= 19:
        return None
    unit = next(unit for digits, unit in ((11, 9), (14, 6), (17, 3), (19, 0)) if len(whole) <= digits)
    return int(whole) * int(10**unit) + (int(fraction[:unit].ljust(unit, b"0")) if fraction and unit else 0)


# --- formats of one's own ---------------------------------------------------------------------------------------------

_DIRECTIVES = {
    "Y": rb"\d{4}",
    "y": rb"\d\d",
    "m": rb"\d{1,2}",
    "d": rb" ?\d{1,2}",
    "j": rb"\d{1,3}",
    "H": rb" ?\d{1,2}",
    "I": rb" ?\d{1,2}",
    "M": rb"\d{1,2}",
    "S": rb"\d{1,2}",
    "f": rb"\d{1,9}",
    "z": rb"(?:Z|[+-]\d\d:?\d\d(?::?\d\d)?)",
    "Z": rb"(?:UTC|GMT)",
    "b": rb"[^\W\d_]+\.?",
    "B": rb"[^\W\d_]+",
    "a": rb"[^\W\d_]+\.?",
    "A": rb"[^\W\d_]+",
    "p": rb"[^\W\d_]+\.?",
    "%": rb"%",
}


def check_formats(formats: Sequence[str]) -> None:
    """Raise ValueError, which says what is wrong, for a format that no line can have or that names no day."""
    for text in formats:
        _Own(text)


class _Own:
    def __init__(self, text: str) -> None:
        pattern, seen, at = b"", set[str](), 0
        while at < len(text):
            if text[at] != "%":
                pattern += rb"\s+" if text[at].isspace() else re.escape(text[at].encode())
                at += 1
                continue
            directive = text[at + 1 : at + 2]
            if directive not in _DIRECTIVES or directive == "":
                known = " ".join(f"%{each}" for each in _DIRECTIVES)
                raise ValueError(f"time format {text!r} has %{directive}, expected one of {known}")
            pattern += b"(" + _DIRECTIVES[directive] + b")" if directive == "f" else _DIRECTIVES[directive]
            seen.add(directive)
            at += 2
        if not (seen & {"d", "j"} and seen & {"m", "b", "B", "j"}):
            raise ValueError(f"time format {text!r} names no day; expected %d and %m or %b, or %j, in it")
        if "H" not in seen and not {"I", "p"} <= seen:
            raise ValueError(f"time format {text!r} names no hour; expected %H, or %I and %p, in it")
        if not seen & {"Y", "y"} and "j" in seen:
            raise ValueError(f"time format {text!r} has %j without a year; add %Y or %y")
        self.format = text.encode()
        self._text = text
        self._year = bool(seen & {"Y", "y"})
        self._utc = "Z" in seen
        try:
            self._match = re.compile(_BOM + b"(" + pattern + b")").match
        except re.error as exc:
            raise ValueError(f"time format {text!r} cannot be used: {exc}") from None

    def beginning(self, line: bytes) -> bytes | None:
        found = self._match(line)
        return found[1] if found else None

    def parse(self, text: bytes, latest: Callable[[int, int, int, int, int], Seconds]) -> int | None:
        found = self._match(text)
        assert found is not None, "it matched as the beginning of a line"
        nanoseconds = 0
        if found.re.groups > 1:  # strptime takes six digits of a fraction
            start, end = found.span(2)
            nanoseconds = int(text[start:end].ljust(9, b"0"))
            text = text[:start] + b"0" + text[end:]
        try:
            given = text.decode()
            # A leap year, so that any day is one; and without a year at all strptime warns.
            moment = (
                datetime.strptime(given, self._text)  # noqa: DTZ007
                if self._year
                else datetime.strptime(f"2000 {given}", f"%Y {self._text}")  # noqa: DTZ007
            )
            if self._utc and moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            if not self._year and moment.tzinfo is None:
                seconds = latest(moment.month, moment.day, moment.hour, moment.minute, moment.second)
            elif not self._year:
                return None
            else:
                seconds = (moment.astimezone(UTC) - _EPOCH) // timedelta(seconds=1)
        except (ValueError, OverflowError, OSError):
            return None
        return None if seconds is None else seconds * SECOND + nanoseconds
