"""A report survives JSON unchanged, and its form is the documented one."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.debug import record
from offload.debug.record import (
    Cause,
    Frame,
    Kind,
    LoopRecord,
    Numbers,
    Report,
    Stall,
    Verdict,
    from_json,
    to_json,
)

seconds = st.floats(0, 1e9)
names = st.text(max_size=20)
frames = st.builds(Frame, names, st.integers(0, 10**6), names)
stacks = st.lists(frames, max_size=3).map(tuple)
numbers = st.builds(Numbers, **{name: st.none() | seconds for name in get_type_hints(Numbers) if name != "late"})
stalls = st.builds(
    Stall,
    number=st.integers(0),
    began=seconds,
    duration=seconds,
    threshold=seconds,
    frame=st.none() | frames,
    innermost=st.none() | frames,
    holder=st.none() | frames,
    stack=stacks,
    stacks=st.lists(st.tuples(stacks, st.integers(1)), max_size=3).map(tuple),
    chain=stacks,
    context=st.dictionaries(names, names, max_size=2),
    contributors=st.lists(st.tuples(names, seconds), max_size=3).map(tuple),
    numbers=numbers,
    **{name: st.none() | names for name in ("call", "task", "coroutine", "callback", "syscall")},
)
loops = st.builds(
    LoopRecord,
    busy=seconds,
    watched=seconds,
    longest=seconds,
    histogram=st.lists(st.integers(0), max_size=5).map(tuple),
    timeline=st.lists(st.tuples(seconds, seconds), max_size=3).map(tuple),
)
reports = st.builds(
    Report,
    began=seconds,
    duration=seconds,
    threshold=seconds,
    stalls=st.lists(stalls, max_size=3).map(tuple),
    loops=st.lists(loops, max_size=2).map(tuple),
)

FRAME = Frame("app.py", 3, "Handler.get")
INNER = Frame("api.py", 70, "get")


def example(**fields: Any) -> Stall:
    return Stall(1, "main", 1.7e9, 0.25, 0.05, **fields)


def report(*stalls: Stall, **fields: Any) -> Report:
    return Report(1.7e9, 60.0, 0.05, "3.12.1", "Linux", stalls=stalls, **fields)


@given(report=reports)
def test_survives_json(report: Report) -> None:
    """What comes back from JSON text is equal, and has the same types."""
    again = from_json(json.loads(json.dumps(to_json(report))))
    assert again == report
    for stall in again.stalls:
        assert isinstance(stall.cause, Cause)
        assert isinstance(stall.verdict, Verdict)
        assert isinstance(stall.kind, Kind)
        assert all(isinstance(frame, Frame) for frame in (*stall.stack, *stall.chain))
        hash((stall.fingerprint, stall.stacks, stall.contributors))


def test_stall_has_the_flat_keys() -> None:
    """Whoever reads a report needs no knowledge of nested frames for what matters."""
    stall = example(
        cause=Cause.WAIT,
        frame=FRAME,
        innermost=INNER,
        stack=(FRAME, INNER),
        stacks=(((FRAME, INNER), 3),),
        task="Task-7",
        contributors=(("f", 0.2),),
    )
    (data,) = to_json(report(stall))["stalls"]
    wanted = {
        "loop": "main",
        "file": "app.py",
        "line": 3,
        "function": "Handler.get",
        "task": "Task-7",
        "cause": "wait",
        "duration": 0.25,
        "verdict": "fail",
        "kind": "slow",
        "innermost": {"file": "api.py", "line": 70, "function": "get"},
        "contributors": [{"callback": "f", "seconds": 0.2}],
    }
    assert {key: data[key] for key in wanted} == wanted
    assert data["stacks"] == [{"stack": [FRAME._asdict(), INNER._asdict()], "samples": 3}]
    assert all(type(value) in (str, int, float, bool, list, dict, type(None)) for value in data.values())


def test_stall_without_a_sample_has_no_line() -> None:
    """What was not seen is null, and comes back as None."""
    (data,) = to_json(report(example()))["stalls"]
    assert (data["file"], data["line"], data["function"]) == (None, None, None)
    assert from_json(to_json(report(example()))).stalls[0].frame is None


def test_docstring_names_every_key() -> None:
    """The schema in the module's docstring is whole."""
    data = to_json(report(example(frame=FRAME), loops=(LoopRecord("main", "MainThread"),)))
    assert record.__doc__ is not None
    keys = {*data, *data["loops"][0], *data["stalls"][0], *data["stalls"][0]["numbers"]}
    assert {key for key in keys if f'"{key}"' not in record.__doc__} == set()


def test_values_in_the_docstring_are_all_there_are() -> None:
    """Causes, kinds and verdicts are documented, each of them."""
    assert record.__doc__ is not None
    for value in (*Cause, *Kind, *Verdict):
        assert f'"{value}"' in record.__doc__


def test_unknown_keys_are_ignored_and_missing_ones_have_defaults() -> None:
    """A report of a later or an earlier version of this schema can be read."""
    data = to_json(report(example(frame=FRAME), loops=(LoopRecord("main", "MainThread"),)))
    data["later"] = data["stalls"][0]["later"] = data["stalls"][0]["numbers"]["later"] = data["loops"][0]["later"] = 1
    del data["stalls"][0]["call"], data["stalls"][0]["stacks"], data["loops"][0]["histogram"], data["lost"]
    assert from_json(data) == report(example(frame=FRAME), loops=(LoopRecord("main", "MainThread"),))


@pytest.mark.parametrize(
    ("data", "found"),
    [({}, "found no schema"), ({"schema": 2}, "found schema 2"), ([], "found no schema"), (None, "found no schema")],
)
def test_another_schema_is_refused(data: Any, found: str) -> None:
    """The error says which schema was found."""
    with pytest.raises(ValueError, match=f"expected a report of schema 1, {found}"):
        from_json(data)


@pytest.mark.parametrize(
    "broken",
    [
        {"stalls": [{"loop": "main"}]},
        {"stalls": [{**to_json(report(example()))["stalls"][0], "cause": "magic"}]},
        {"stalls": [{**to_json(report(example()))["stalls"][0], "stack": [{"file": "x"}]}]},
        {"stalls": 3},
        {"stalls": ["x"]},
        {"loops": [{"name": "main", "thread": "x", "timeline": [1]}]},
        {"began": None, "loops": 1},
    ],
)
def test_broken_report_is_a_value_error(broken: dict[str, Any]) -> None:
    """Whatever is wrong inside, the reader has one error to catch."""
    with pytest.raises(ValueError, match="not a report of schema 1"):
        from_json({**to_json(report()), **broken})


def test_verdict_of_a_report() -> None:
    """The worst of its stalls: one that failed, else one that could not be measured."""
    allowed, failed = example(verdict=Verdict.PASS), example()
    starved = example(verdict=Verdict.UNMEASURED)
    assert report().verdict is Verdict.PASS
    assert report(allowed).verdict is Verdict.PASS
    assert report(allowed, starved).verdict is Verdict.UNMEASURED
    assert report(starved, failed, allowed).verdict is Verdict.FAIL
    assert to_json(report(starved))["verdict"] == "unmeasured"


def test_fingerprint_tells_offences_apart() -> None:
    """The same line for the same reason is the same offence, whatever task did it and however long."""
    one = example(frame=FRAME, innermost=INNER, cause=Cause.WAIT)
    same = Stall(9, "main", 0.0, 3.0, 0.05, Cause.WAIT, frame=FRAME, innermost=INNER, task="Task-8")
    assert one.fingerprint == same.fingerprint
    others = [
        example(frame=FRAME, innermost=INNER, cause=Cause.LOCK),
        example(frame=INNER, innermost=INNER, cause=Cause.WAIT),
        Stall(1, "other", 0.0, 1.0, 0.05, Cause.WAIT, frame=FRAME, innermost=INNER),
    ]
    assert len({one.fingerprint, *(o.fingerprint for o in others)}) == 4
