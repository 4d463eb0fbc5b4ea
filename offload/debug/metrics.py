"""Numbers for dashboards: Prometheus' text exposition, and OpenTelemetry's metrics (extra: `offload[otel]`).

Counters may only grow, and a report keeps a bounded number of stalls; so what is scraped while the program runs is
counted by `Metrics`, which the detector calls with every stall:

    metrics = Metrics()
    with offload.watch(on_stall=metrics) as detector:
        ...
        metrics.prometheus(detector.report())      # the body of GET /metrics

Loops of one name are one series: their numbers are added.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .record import LoopRecord, Report, Stall
from .summary import final, merged

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

# Bounds of the histograms, in powers of two of a nanosecond: 1 us to 17 s in steps of four, the same for every loop.
BUCKETS = range(10, 35, 2)

_Sample = tuple[str, Mapping[str, str], float]  # what is added to the family's name, labels, value
_Family = tuple[str, str, str, list[_Sample]]  # name, kind, help, samples


@dataclass(slots=True)
class _Sum:
    count: int = 0
    seconds: float = 0.0
    longest: float = 0.0


class Metrics:
    """Counts stalls by loop, kind, cause and verdict; give it to the detector as `on_stall`. Safe on any thread."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str, str], _Sum] = defaultdict(_Sum)
        self._lock = threading.Lock()

    def __call__(self, stall: Stall) -> None:
        """Count a stall; one that still lasts is counted when it has ended."""
        if stall.ongoing:
            return
        with self._lock:
            sums = self._sums[stall.loop, stall.kind, stall.cause, stall.verdict]
            sums.count += 1
            sums.seconds += stall.duration
            sums.longest = max(sums.longest, stall.duration)

    def prometheus(self, report: Report) -> str:
        """The loops of the report, and all stalls counted here, in Prometheus' text format 0.0.4."""
        with self._lock:
            sums = sorted(self._sums.items())
        labelled = [
            ({"loop": loop, "kind": kind, "cause": cause, "verdict": verdict}, each)
            for (loop, kind, cause, verdict), each in sums
        ]
        families: list[_Family] = [
            ("stalls_total", "counter", "Stretches over the limit in which a loop could not turn.",
             [("", labels, each.count) for labels, each in labelled]),
            ("stall_seconds_total", "counter", "How long they lasted, added up.",
             [("", labels, each.seconds) for labels, each in labelled]),
            ("stall_longest_seconds", "gauge", "The longest of them.",
             [("", labels, each.longest) for labels, each in labelled]),
            *_loop_families(merged(report.loops)),
        ]  # fmt: skip
        return "".join(line for family in families for line in _family(*family))


def prometheus(report: Report) -> str:
    """A report of a whole session in Prometheus' text format 0.0.4, for a file that a collector picks up."""
    metrics = Metrics()
    for stall in final(report.stalls):
        metrics(stall)
    return metrics.prometheus(report)


def _loop_families(loops: list[LoopRecord]) -> Iterator[_Family]:
    def each(value: Callable[[LoopRecord], float]) -> list[_Sample]:
        return [("", {"loop": loop.name}, value(loop)) for loop in loops]

    yield "loop_iterations_total", "counter", "Turns of the loop.", each(lambda loop: loop.iterations)
    yield "loop_busy_seconds_total", "counter", "Time in which it ran callbacks.", each(lambda loop: loop.busy)
    yield "loop_watched_seconds_total", "counter", "Time for which it was watched.", each(lambda loop: loop.watched)
    yield "loop_longest_turn_seconds", "gauge", "Its longest turn.", each(lambda loop: loop.longest)
    turns = [sample for loop in loops if loop.histogram for sample in _histogram(loop)]
    yield "loop_turn_seconds", "histogram", "How long its turns took.", turns


def _histogram(loop: LoopRecord) -> Iterator[_Sample]:
    for power in BUCKETS:
        yield "_bucket", {"loop": loop.name, "le": _number(2**power / 1e9)}, sum(loop.histogram[: power + 1])
    yield "_bucket", {"loop": loop.name, "le": "+Inf"}, sum(loop.histogram)
    yield "_sum", {"loop": loop.name}, loop.busy
    yield "_count", {"loop": loop.name}, sum(loop.histogram)


def _family(name: str, kind: str, help_text: str, samples: list[_Sample]) -> Iterator[str]:
    if not samples:
        return
    yield f"# HELP offload_{name} {help_text}\n# TYPE offload_{name} {kind}\n"
    for suffix, labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"offload_{name}{suffix}{{{shown}}} {_number(value)}\n"


def _escaped(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(round(value, 9))


class OpenTelemetryMetrics:
    """Stalls and loops as OpenTelemetry metrics; give it to the detector as `on_stall`, and it `observe`.

        metrics = OpenTelemetryMetrics()
        with offload.watch(on_stall=metrics) as detector:
            metrics.observe(detector.report)

    Instruments, in seconds: the histogram `asyncio.eventloop.stall.duration` (attributes: loop, kind, cause, verdict);
    the counters `asyncio.eventloop.time` (loop; state: active, idle) and `asyncio.eventloop.iterations`; the gauge
    `asyncio.eventloop.utilization`, the busy share since the session began. The names follow those of the runtime
    metrics for Node.js in the semantic conventions; there are none for asyncio.

    Raises:
        ImportError: opentelemetry-api is not installed; says which extra installs it.
    """

    def __init__(self, provider: MeterProvider | None = None) -> None:
        """Make the instruments on the provider; None: on the global one."""
        try:
            from opentelemetry import metrics
        except ImportError as exc:
            raise ImportError("opentelemetry is not installed; pip install 'offload[otel]'") from exc
        self._observation = metrics.Observation
        self._meter = (provider or metrics.get_meter_provider()).get_meter("offload")
        self._stalls = self._meter.create_histogram(
            "asyncio.eventloop.stall.duration",
            unit="s",
            description="Stretches over the limit in which an event loop could not turn.",
            explicit_bucket_boundaries_advisory=[0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60],
        )

    def __call__(self, stall: Stall) -> None:
        """Record a stall, on the detector's thread; one that still lasts is recorded when it has ended."""
        if not stall.ongoing:
            attributes = {"loop": stall.loop, "kind": stall.kind, "cause": stall.cause, "verdict": stall.verdict}
            self._stalls.record(stall.duration, {key: str(value) for key, value in attributes.items()})

    def observe(self, report: Callable[[], Report]) -> None:
        """Read the loops from `report()` at each collection, on the exporter's thread; once for each detector."""

        def loops(read: Callable[[LoopRecord], dict[str, float]]) -> Callable[[CallbackOptions], Iterable[Observation]]:
            def observations(_: CallbackOptions) -> Iterator[Observation]:
                for loop in merged(report().loops):
                    for state, value in read(loop).items():
                        attributes: dict[str, Any] = {"loop": loop.name}
                        if state:
                            attributes["state"] = state
                        yield self._observation(value, attributes)

            return observations

        self._meter.create_observable_counter(
            "asyncio.eventloop.time",
            [loops(lambda loop: {"active": loop.busy, "idle": max(0.0, loop.watched - loop.busy)})],
            unit="s",
            description="Time for which an event loop ran callbacks, or waited for events.",
        )
        self._meter.create_observable_counter(
            "asyncio.eventloop.iterations",
            [loops(lambda loop: {"": loop.iterations})],
            unit="{iteration}",
            description="Turns of an event loop.",
        )
        self._meter.create_observable_gauge(
            "asyncio.eventloop.utilization",
            [loops(lambda loop: {"": loop.busy / loop.watched if loop.watched else 0.0})],
            unit="1",
            description="Share of the time in which an event loop ran callbacks.",
        )
