"""What can be set about a merge: one table for the command line, its TOML file, and programs.

Each field of `Settings` says how it is called in each of them, what it takes, and whether it can change while the merge
runs. A new option is a new field here, and a line in `Settings.engine`.

    [sources, output, …]         offload merge a.log -o merged.opk --segment-size 1GiB     what is given there wins
    merge.toml                   [segments]
                                 size = "1GiB"                                             over what stands here

Every start of the command line imports this: what it needs beyond the standard library is imported when it is used.

Promises: a value is taken as it was meant or refused with what was found and what was expected; a key that is unknown
is refused. Relative paths in a file are relative to that file, on the command line to the working folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from ..files.packet_file import Fsync
    from ..files.segments import Segments
    from .by_time import ByTime
    from .engine import Merge
    from .sources import Sources

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?B)?|B)?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|w)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class SettingsError(ValueError):
    """A setting that is not right.

    Attributes:
        name: of the field; "" for what is wrong with all of it.
        reason: what was found, and what was expected.
        path: the file in which it stands; None: it was given otherwise.
    """

    def __init__(self, name: str, reason: str, path: Path | None = None) -> None:
        super().__init__(name, reason, path)
        self.name = name
        self.reason = reason
        self.path = path

    def __str__(self) -> str:
        where = "" if self.path is None else f"{self.path}: "
        key = OPTIONS[self.name].key if self.name in OPTIONS else self.name
        return f"{where}{key}: {self.reason}" if key else f"{where}{self.reason}"


# --- kinds of values --------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a setting takes.

    Attributes:
        read: what was given, in TOML's types or as text -> its value; ValueError if that is none.
        expected: for the error.
        metavar: for the help.
        shape: a switch, one value, or a list of them.
    """

    read: Callable[[Any], Any]
    expected: str
    metavar: str
    shape: Literal["switch", "one", "many"] = "one"


def parse_size(value: object) -> int:
    """Bytes: a whole number, or text such as `512M`, `1GiB` (1024 each) or `1GB` (1000 each)."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(value)
    unit, behind = (found[2] or "").upper(), (found[3] or "").lower()
    size = int(float(found[1]) * (1000 if behind == "b" else 1024) ** " KMGT".index(unit or " "))
    if size < 1:
        raise ValueError(value)
    return size


def parse_duration(value: object) -> float:
    """Seconds: a number, or text such as `500ms`, `90s`, `10m`, `2h`, `1d`, `1w`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(value)
    return float(found[1]) * _SECONDS[found[2] or "s"]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(value)
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return tuple(_text(item) for item in value)


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _age(value: object) -> float:
    if not (age := parse_duration(value)):
        raise ValueError(value)
    return age


def _fsync(value: object) -> str:
    if value not in ("none", "interval", "always"):
        raise ValueError(value)
    return str(value)


SWITCH = Kind(_switch, "true or false", "", "switch")
PATH = Kind(_text, "a path", "FILE")
PATHS = Kind(_texts, 'a list of paths such as ["logs/"]', "PATH...", "many")
GLOBS = Kind(_texts, 'a list of patterns such as ["*.log"]', "GLOB", "many")
FORMATS = Kind(_texts, 'a list of formats such as ["%d/%b/%Y:%H:%M:%S %z"]', "FMT", "many")
SIZE = Kind(parse_size, "a size such as 512M or 1GiB", "SIZE")
DURATION = Kind(parse_duration, "a duration such as 90s, 10m, 2h or 1d", "DURATION")
AGE = Kind(_age, "a duration such as 90s, 10m, 2h or 1d, more than 0", "DURATION")
FSYNC = Kind(_fsync, "none, interval or always", "[none|interval|always]")


class Option(NamedTuple):
    """How one setting is called and what it is for.

    Attributes:
        kind: what it takes.
        key: in a TOML file; `a.b` stands in the table `[a]`.
        flags: on the command line; none: an argument.
        help: for people.
        panel: under which title of the help it stands.
        live: whether it can change while the merge runs.
        place: whether it is a path, and so relative to something.
        shown: its default as the help shows it.
    """

    kind: Kind
    key: str
    flags: tuple[str, ...]
    help: str
    panel: str | None = None
    live: bool = True
    place: bool = False
    shown: str | None = None


_SEGMENTS, _BY_TIME, _WHICH, _WATCHED = "Segments", "In the order of time", "Which files", "How it is run"


def _option(default: Any, *option: Any, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(*option, **more)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that can be set about a merge. A value that is None was not set; see `offload merge --help` for each.

    Raises:
        SettingsError: values that contradict each other.
    """

    sources: tuple[str, ...] = _option(
        (), PATHS, "sources", (), "Files, folders (with all below, hidden files left out) and globs.", place=True
    )
    output: str = _option(
        "",
        PATH,
        "output",
        ("--output", "-o"),
        "The packet file; one that is there is continued.",
        live=False,
        place=True,
    )
    follow: bool = _option(
        False,
        SWITCH,
        "follow",
        ("--follow/--no-follow", "-f"),
        "Go on with new lines and new files until Ctrl-C or SIGTERM.",
        live=False,
    )
    fsync: Fsync = _option(  # noqa: RUF009 - as the others; ruff does not know the type
        "interval",
        FSYNC,
        "fsync",
        ("--fsync",),
        "When to wait for the disk: never, each 0.1 s, or after each write.",
        live=False,
    )
    poll: bool = _option(
        False,
        SWITCH,
        "poll",
        ("--poll/--no-poll",),
        "Look by time; for network mounts, which do not report changes.",
        live=False,
    )
    linger: float = _option(
        60.0,
        DURATION,
        "linger",
        ("--linger",),
        "With -f: how long a rotated file stays open after its last line.",
        shown="60s",
    )
    include: tuple[str, ...] = _option(
        (), GLOBS, "include", ("--include",), "Only files that match one of these; again for each.", _WHICH
    )
    exclude: tuple[str, ...] = _option(
        (), GLOBS, "exclude", ("--exclude",), "No files that match one of these; again for each.", _WHICH
    )
    max_held: int | None = _option(
        None,
        SIZE,
        "max-held",
        ("--max-held",),
        "Unread bytes of deleted files that may be kept from being freed; what is over is given up, as a gap.",
        _WHICH,
        shown="any",
    )
    segment_size: int | None = _option(
        None,
        SIZE,
        "segments.size",
        ("--segment-size",),
        "Seal the packet file before it grows over this, and begin the next.",
        _SEGMENTS,
        shown="any",
    )
    segment_age: float | None = _option(
        None,
        AGE,
        "segments.age",
        ("--segment-age",),
        "Seal it so long after its first frame.",
        _SEGMENTS,
        shown="any",
    )
    compress: bool = _option(
        False,
        SWITCH,
        "segments.compress",
        ("--compress/--no-compress",),
        "Pack sealed segments with zstd (its extra must be installed).",
        _SEGMENTS,
    )
    keep_size: int | None = _option(
        None,
        SIZE,
        "segments.keep-size",
        ("--keep-size",),
        "Remove the oldest sealed segments when all together are larger.",
        _SEGMENTS,
        shown="all",
    )
    keep_age: float | None = _option(
        None,
        AGE,
        "segments.keep-age",
        ("--keep-age",),
        "Remove segments so long after they were sealed.",
        _SEGMENTS,
        shown="all",
    )
    by_time: bool | None = _option(
        None,
        SWITCH,
        "by-time",
        ("--by-time/--no-by-time",),
        "Write lines in the order of the times in them; the options below imply it.",
        _BY_TIME,
        live=False,
    )
    time_format: tuple[str, ...] = _option(
        (),
        FORMATS,
        "by-time.formats",
        ("--time-format",),
        "How times are written, as for strptime; again for each. Common ones are found by themselves.",
        _BY_TIME,
        live=False,
    )
    lateness: float | None = _option(
        None,
        DURATION,
        "by-time.lateness",
        ("--lateness",),
        "How long a line waits for earlier ones of other sources.",
        _BY_TIME,
        shown="5s",
    )
    status: str | None = _option(
        None,
        PATH._replace(metavar="FILE|off", expected='a path, or "off"'),
        "status",
        ("--status",),
        "Where `offload status` finds what it tells.",
        _WATCHED,
        place=True,
        shown="with -f: beside the packet file",
    )

    def __post_init__(self) -> None:
        kept = self.compress or self.keep_size is not None or self.keep_age is not None
        if kept and self.segment_size is None and self.segment_age is None:
            name = "compress" if self.compress else "keep_size" if self.keep_size is not None else "keep_age"
            raise SettingsError(name, "is about sealed segments, expected segment-size or segment-age with it")
        try:
            _ = self.ordered
        except ValueError as exc:
            raise SettingsError("time_format", str(exc)) from None

    @property
    def segments(self) -> Segments | None:
        if self.segment_size is None and self.segment_age is None:
            return None
        from ..files.segments import Segments

        return Segments(self.segment_size, self.segment_age, self.compress, self.keep_size, self.keep_age)

    @property
    def ordered(self) -> ByTime | None:
        """What `by_time` and the settings with it mean together."""
        implied = bool(self.time_format) or self.lateness is not None
        if self.by_time is False or not (self.by_time or implied):
            return None
        from .by_time import ByTime

        return ByTime(self.time_format) if self.lateness is None else ByTime(self.time_format, self.lateness)

    @property
    def status_path(self) -> Path | None:
        """Where the status goes; None: nowhere."""
        if self.status is None:
            return status_beside(self.output) if self.follow else None
        return None if self.status == "off" else Path(self.status)

    def files(self) -> Sources:
        """Raises ValueError: no sources are set, or patterns that match nothing."""
        from .sources import Sources

        return Sources(self.sources, include=self.include, exclude=self.exclude)

    def engine(self, on_full: Callable[[OSError | None], object] | None = None) -> Merge:
        """The merge that is meant."""
        from .engine import Merge

        return Merge(
            self.files(),
            self.output,
            follow=self.follow,
            fsync=self.fsync,
            poll=self.poll,
            linger=self.linger,
            on_full=on_full,
            segments=self.segments,
            by_time=self.ordered,
            max_held=self.max_held,
        )

    def fixed(self, wanted: Settings) -> list[str]:
        """Keys of what is different in `wanted` and cannot change while the merge runs."""
        changed = [o.key for n, o in OPTIONS.items() if not o.live and getattr(self, n) != getattr(wanted, n)]
        if (self.ordered is None) != (wanted.ordered is None) and "by-time" not in changed:
            changed.append("by-time")
        # It is a plain packet file, or one of segments.
        if (self.segments is None) != (wanted.segments is None):
            changed.append("segments")
        return changed


OPTIONS: dict[str, Option] = {field.name: field.metadata["option"] for field in fields(Settings)}
_KEYS = {option.key: name for name, option in OPTIONS.items()}
_TABLES = {key.partition(".")[0] for key in _KEYS if "." in key}


def status_beside(output: str | os.PathLike[str]) -> Path:
    """Where a merge's status is if nothing else was said."""
    return Path(f"{os.path.abspath(output)}.status")


def taken(name: str, value: object, path: Path | None = None) -> Any:
    """The value of a setting.

    Raises:
        SettingsError: it is none.
    """
    kind = OPTIONS[name].kind
    try:
        return kind.read(value)
    except ValueError:
        raise SettingsError(name, f"found {value!r}, expected {kind.expected}", path) from None


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a TOML file: name of the field -> value.

    Raises:
        SettingsError: it is no TOML, has a key that is unknown, or a value of another kind.
        OSError: as `open`.
    """
    import tomllib

    file = Path(path)
    try:
        with open(file, "rb") as opened:
            found = tomllib.load(opened)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError("", f"is no TOML: {exc}", file) from None  # tomllib tells line and column
    values = {name: taken(name, value, file) for name, value in _named(found, file)}
    folder = os.path.dirname(os.path.abspath(file))
    for name, value in values.items():
        if OPTIONS[name].place and value != "off":
            several = isinstance(value, tuple)
            values[name] = tuple(_at(folder, v) for v in value) if several else _at(folder, value)
    return values


def _at(folder: str, path: str) -> str:
    # Not normalised further: `logs/` is a folder, and the sources make it absolute in their own way.
    return os.path.join(folder, path)


def _named(found: Mapping[str, Any], file: Path) -> Iterator[tuple[str, object]]:
    for key, value in found.items():
        if key in _TABLES and isinstance(value, dict):
            if key in _KEYS:  # the table says that it is wanted
                yield _KEYS[key], True
            for inner, setting in value.items():
                yield _known(f"{key}.{inner}", file), setting
        elif key in _TABLES and key not in _KEYS:
            raise SettingsError(key, f"found {value!r}, expected a table [{key}]", file)
        else:
            yield _known(key, file), value


def _known(key: str, file: Path) -> str:
    if key not in _KEYS:
        import difflib

        near = difflib.get_close_matches(key, _KEYS, 1)
        meant = f"; is {near[0]} meant?" if near else f"; there are: {', '.join(_KEYS)}"
        raise SettingsError(key, f"unknown key{meant}", file)
    return _KEYS[key]
