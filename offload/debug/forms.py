"""A report for machines that judge: JUnit XML, SARIF 2.1.0, GitHub annotations, and folded stacks for flame graphs.

Rules of the first three: one case or result for each offender (all stalls of one fingerprint), not for each stall.
PASS is a case that passes, FAIL one that fails; UNMEASURED is one that was skipped: a starved machine must not turn a
build red. Files are named from the working directory, as these readers want it, where they lie in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from .record import Frame, Kind, Report, Stall, Verdict
from .summary import (
    WORDS,
    Offender,
    culprit,
    offenders,
    seconds,
    short,
    source_line,
    times,
    weighted,
    why,
    working_folder,
)

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def message(offender: Offender) -> str:
    """The offence in two or three sentences, with the fix."""
    stall = offender.worst
    many = (
        f" It happened {times(offender.count, 'time')}: {seconds(offender.total)} in all, p50 {seconds(offender.p50)}, "
        f"p99 {seconds(offender.p99)}."
    )
    what = "A call waited" if stall.kind is Kind.QUEUE else f"Loop {stall.loop} was blocked for"
    on = f" in the queue of {stall.loop}" if stall.kind is Kind.QUEUE else ""
    text = f"{what} {seconds(stall.duration)}{on} (limit {seconds(stall.threshold)}): {why(stall)}."
    return text + (many if offender.count > 1 else "") + (f" Fix: {stall.advice}" if stall.advice else "")


def junit(report: Report) -> str:
    """JUnit XML as CI servers read it: a suite for each loop, a case for each offender, at least one a loop."""
    found = offenders(report)
    loops = {loop.name: 0.0 for loop in report.loops}
    for loop in report.loops:
        loops[loop.name] += loop.watched
    for offender in found:
        loops.setdefault(offender.worst.loop, report.duration)
    root = ElementTree.Element("testsuites", name="offload")
    began = datetime.fromtimestamp(report.began, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    for name, watched in loops.items():
        mine = [offender for offender in found if offender.worst.loop == name]
        suite = ElementTree.SubElement(
            root, "testsuite", name=_xml(name), timestamp=began, time=f"{watched:.3f}", hostname="localhost"
        )
        properties = ElementTree.SubElement(suite, "properties")
        facts = {"python": report.python, "platform": report.platform, "threshold": str(report.threshold)}
        for key, value in facts.items():
            ElementTree.SubElement(properties, "property", name=key, value=_xml(value))
        for offender in mine:
            _case(suite, offender)
        if not mine:
            case = f"no stall over {seconds(report.threshold)}"
            ElementTree.SubElement(suite, "testcase", name=case, classname=_xml(name), time=f"{watched:.3f}")
        _count(suite)
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    root.set("time", f"{report.duration:.3f}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: ElementTree.Element, offender: Offender) -> None:
    stall = offender.worst
    name, loop = _xml(f"{culprit(stall)} ({stall.cause})"), _xml(stall.loop)
    case = ElementTree.SubElement(suite, "testcase", name=name, classname=loop, time=f"{offender.total:.3f}")
    if offender.verdict is Verdict.PASS:
        return
    said = _xml(message(offender))
    if offender.verdict is Verdict.UNMEASURED:
        ElementTree.SubElement(case, "skipped", message=said)
        return
    failure = ElementTree.SubElement(case, "failure", type=str(stall.cause), message=said)
    failure.text = _xml("\n".join([said, "", *_traceback(stall.stack or filter(None, [stall.frame]))]))


def _count(suite: ElementTree.Element) -> None:
    tags = Counter(outcome.tag for case in suite.iter("testcase") for outcome in case)
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(tags["failure"]))
    suite.set("errors", "0")
    suite.set("skipped", str(tags["skipped"]))


def _traceback(stack: Iterable[Frame]) -> Iterable[str]:
    """The stack as Python prints it, so that editors and CI servers link its lines."""
    for frame in stack:
        yield f'  File "{frame.file}", line {frame.line}, in {frame.function}'
        if text := source_line(frame):
            yield f"    {text}"


def _xml(text: str) -> str:
    """Without the characters that XML cannot hold, such as those of a path that is no UTF-8."""
    return _NOT_IN_XML.sub("\ufffd", text)


def sarif(report: Report) -> str:
    """SARIF 2.1.0 (OASIS): a rule for each cause, a result for each offender; for code scanning.

    An offender that could not be measured has the kind "open", an allowed one "pass"; both with the level "none", as
    section 3.27.10 wants it. Its partial fingerprint leaves out line numbers, so that an edit above keeps its identity.
    """
    found = offenders(report)
    causes = sorted({offender.worst.cause for offender in found})
    driver = {
        "name": "offload",
        "informationUri": "https://pypi.org/project/offload/",
        "rules": [
            {
                "id": f"offload/{cause}",
                "name": "".join(word.capitalize() for word in f"blocked-{cause}".split("-")),
                "shortDescription": {"text": f"The event loop was blocked: {WORDS[cause].title.lower()}."},
                "fullDescription": {"text": f"The event loop could not turn: {WORDS[cause].meaning}."},
                "defaultConfiguration": {"level": "error" if cause.by_code else "note"},
            }
            for cause in causes
        ],
    }
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "invocations": [
            {
                "executionSuccessful": True,
                "startTimeUtc": _utc(report.began),
                "endTimeUtc": _utc(report.began + report.duration),
            }
        ],
        "columnKind": "unicodeCodePoints",
        "results": [_result(offender, causes.index(offender.worst.cause)) for offender in found],
    }
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1) + "\n"


def _result(offender: Offender, rule: int) -> dict[str, Any]:
    stall = offender.worst
    kind, level = {
        Verdict.FAIL: ("fail", "error"),
        Verdict.UNMEASURED: ("open", "none"),
        Verdict.PASS: ("pass", "none"),
    }[offender.verdict]
    place = f"{stall.frame.file}\0{stall.frame.function}" if stall.frame else culprit(stall)
    place = place.removeprefix(working_folder())  # the same offence on another machine
    identity = "\0".join((stall.loop, stall.kind, stall.cause, place, source_line(stall.frame)))
    result: dict[str, Any] = {
        "ruleId": f"offload/{stall.cause}",
        "ruleIndex": rule,
        "kind": kind,
        "level": level,
        "message": {"text": f"{culprit(stall)}: {message(offender)}"},
        "occurrenceCount": offender.count,
        "partialFingerprints": {
            "offloadStall/v1": hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        },
        "properties": {
            "loop": stall.loop,
            "kind": str(stall.kind),
            "duration": stall.duration,
            "total": offender.total,
            "p50": offender.p50,
            "p99": offender.p99,
        },
    }
    if stall.frame:
        result["locations"] = [_location(stall.frame)]
    if stall.holder:
        result["relatedLocations"] = [{"id": 1, **_location(stall.holder, "held the interpreter's lock")}]
    if stall.stack:
        # SARIF wants the innermost frame first (section 3.44.3).
        frames = [{"location": _location(frame, frame.function)} for frame in reversed(stall.stack)]
        result["stacks"] = [{"message": {"text": "the first sample over the limit"}, "frames": frames}]
    return result


def _location(frame: Frame, text: str = "") -> dict[str, Any]:
    region: dict[str, Any] = {"startLine": max(1, frame.line)}
    if line := source_line(frame):
        region["snippet"] = {"text": line}
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": _artifact(frame.file), "region": region},
        "logicalLocations": [{"fullyQualifiedName": frame.function, "kind": "function"}],
    }
    if text:
        location["message"] = {"text": text}
    return location


def _artifact(file: str) -> dict[str, str]:
    inside = _from_here(file)
    try:
        encoded = quote(os.fsencode(inside))
    except UnicodeEncodeError:  # not the name of a file
        encoded = quote(inside, errors="replace")
    if inside != file:
        return {"uri": encoded, "uriBaseId": "%SRCROOT%"}
    return {"uri": f"file://{encoded}" if os.path.isabs(file) else encoded}


def _from_here(file: str) -> str:
    """The path from the working directory with slashes, if it lies in it; else as it is."""
    try:
        return Path(file).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return file


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def github(report: Report) -> list[str]:
    """Lines that GitHub Actions shows beside the code when a step prints them: warnings, and notices if unmeasured.

    Allowed stalls are left out. What cost most comes first, for GitHub shows ten of each kind only.
    """
    lines = []
    for offender in offenders(report):
        if offender.verdict is Verdict.PASS:
            continue
        command = "warning" if offender.verdict is Verdict.FAIL else "notice"
        title = f"{WORDS[offender.worst.cause].title} blocked loop {offender.worst.loop}"
        frame = offender.worst.frame
        properties = {"file": _from_here(frame.file), "line": str(frame.line)} if frame else {}
        properties["title"] = title
        said = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
        lines.append(f"::{command} {said}::{_escaped(f'{culprit(offender.worst)}: {message(offender)}')}")
    return lines


def _escaped(text: str, also: str = "") -> str:
    """Escaped as workflow commands want it: % first, line breaks, and in a property's value : and , too."""
    for character in "%\r\n" + also:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def folded(report: Report) -> str:
    """Stacks for flame graphs: `loop;outermost;…;innermost microseconds`, a line for each different stack."""
    weights: Counter[str] = Counter()
    for offender in offenders(report):
        for stall in offender.stalls:
            for stack, share in weighted(stall) or [((), stall.duration)]:
                weights[_folded(stall, stack)] += max(1, round(share * 1e6))
    return "".join(f"{line} {weight}\n" for line, weight in weights.most_common())


def _folded(stall: Stall, stack: Sequence[Frame]) -> str:
    names = [f"{frame.function} ({short(frame.file)}:{frame.line})" for frame in stack] or [culprit(stall)]
    return ";".join(" ".join(name.replace(";", ",").split()) for name in [stall.loop, *names])
