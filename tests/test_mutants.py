"""Promises that are broken on purpose, one at a time, each in a copy of the package: the test named for it must fail.

A proof that cannot fail proves nothing; so what says that no line is lost is run here where lines can be lost. If a
mutant's text is not there any more, the code has changed: write the same fault into the new code.

    OFFLOAD_MUTANTS  "all": try every one, with every test named for it; a name: that one. Otherwise one test for each
                     of those that stand for a promise of their own (FEW), which takes some ten seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WANTED = os.environ.get("OFFLOAD_MUTANTS", "")
PATIENCE = 300.0
TRIES = 5  # random examples may miss a fault once


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        file: of the package.
        changes: texts that are there once each, and what stands there instead.
        tests: each of them fails then; the quickest first.
    """

    file: str
    changes: Sequence[tuple[str, str]]
    tests: Sequence[str]


POWER = "tests/merge/test_power_cut.py"
LOOP = "tests/merge/test_power_loop.py"
KILLS = "tests/merge/test_kill_points.py"
ROTATED = "tests/merge/test_rotation_complaints.py"
SHORTER = "tests/merge/test_shorter.py"
FILE = "tests/files/test_packet_file.py"

MUTANTS = {
    "no fsync": Mutant(
        "files/append.py",
        [('    getattr(os, "fdatasync", os.fsync)(fd)\n', "    pass\n")],
        [POWER, f"{LOOP}::test_power_is_cut_and_nothing_is_lost_or_doubled"],
    ),
    "no fsync of the folder": Mutant(
        "files/append.py",
        [("                os.fsync(self._folder)\n", "                pass\n")],
        [POWER],
    ),
    "offsets apart from the data": Mutant(  # they are those of the last COMMIT, whatever frames are behind it
        "packets/recover.py",
        [
            (
                "    for frame, raw in _replay(read_at, ledger, size):\n",
                "    apart = {number: state.resume_off for number, state in ledger.sources.items()}\n"
                "    for frame, raw in _replay(read_at, ledger, size):\n",
            ),
            (
                "    if not hole_end:\n",
                "    for number, state in ledger.sources.items():\n"
                "        state.resume_off = apart.get(number, 0)\n"
                "    if not hole_end:\n",
            ),
        ],
        [f"{KILLS}::test_killed_before_any_call_on_the_packet_file_it_goes_on", POWER],
    ),
    "no checksum of payloads": Mutant(
        "packets/codec.py",
        [("            if found != header.payload_crc:\n", "            if False:\n")],
        [f"{POWER}::test_all_but_one_page_is_there_after_a_power_cut"],
    ),
    "no checksum of headers": Mutant(
        "packets/codec.py", [("    if found != header_crc:\n", "    if False:\n")], ["tests/packets/test_codec.py"]
    ),
    "no tail guard": Mutant(
        "files/rotated.py",
        [("        return guard if digest(guard) == entry.guard else None\n", "        return guard\n")],
        [f"{SHORTER}::test_what_is_left_of_it_is_not_given_again"],
    ),
    "no tail guard of a file that is open": Mutant(
        "files/reading.py",
        [("    if got < guard or arena.view[arena.at : start] != reading.guard:\n", "    if got < guard:\n")],
        ["tests/files/test_tail.py::test_a_file_that_was_truncated_and_grew_again_is_noticed"],
    ),
    "durable before it is synced": Mutant(
        "files/packet_file.py",
        [
            (
                "            info = self.ledger.commit(self._synced)\n",
                "            info = self.ledger.commit(self._file.end)\n",
            )
        ],
        [POWER, f"{FILE}::test_durable_upto_never_passes_what_was_synced"],
    ),
    "a torn tail stays": Mutant(
        "files/frame_file.py",
        [("                self._file.cut(self.recovery.ledger.end)\n", "                pass\n")],
        [f"{FILE}::test_cut_anywhere_a_run_goes_on_and_nothing_is_missing_or_twice", POWER],
    ),
    "a refused write is not cut back": Mutant(
        "files/append.py",
        [("                self._cut_back(taken, taken - whole(taken), last)\n", "                pass\n")],
        [f"{FILE}::test_a_batch_that_the_disk_refuses_in_the_middle_keeps_its_whole_frames"],
    ),
    "an fsync that failed is tried again": Mutant(
        "files/frame_file.py",
        [
            ("        if self._failed is None and end > self._synced:\n", "        if end > self._synced:\n"),
            (
                "            self.durable = Durable(end, lines, time.time())\n        if self._failed is not None:\n",
                "            self.durable = Durable(end, lines, time.time())\n        if False:\n",
            ),
        ],
        [f"{FILE}::test_an_fsync_that_failed_is_not_tried_again"],
    ),
    "what was left unsynced is not written again": Mutant(
        "files/frame_file.py",
        [("                self._renew()\n", "")],
        [f"{FILE}::test_what_was_left_unsynced_is_written_again_before_the_first_fsync"],
    ),
    "what could not be read is passed over": Mutant(
        "files/beside.py",
        [("    if exc.errno in _NO_FILE:\n", "    if exc:\n")],
        [f"{KILLS}::test_refused_at_a_call_on_the_logs_nothing_is_given_up"],
    ),
    "a file that is being packed is two": Mutant(
        "files/beside.py",
        [("if known is not None and not again and", "if known is not None and")],
        ["tests/files/test_beside.py"],
    ),
    "late lines are newer than what was read behind them": Mutant(
        "files/beside.py",
        [
            (
                "self._packed_since(min(map(_changed_ns, late)), left)",
                "self._packed_since(_changed_ns(late[-1]) + 1, left)",
            )
        ],
        [f"{ROTATED}::test_14_late_lines_that_are_older_than_what_was_read_behind_them"],
    ),
    "one hole is like another": Mutant(
        "files/beside.py",
        [("        begun = goes_on and not is_hole(wanted.entry)", "        begun = goes_on")],
        [f"{ROTATED}::test_22_a_copy_of_which_only_a_hole_was_read"],
    ),
    "names do not change during a search": Mutant(
        "files/beside.py",
        [("                if after == before or ", "                if True or ")],
        ["tests/files/test_beside.py"],
    ),
    "what was left is not stated": Mutant(
        "merge/batches.py",
        [("            if step.left is not None:\n", "            if False:\n")],
        [
            "tests/files/test_beside.py",
            "tests/net/test_send.py::test_rotated_file_is_known_again_by_the_next_connection",
        ],
    ),
    "the system tells the name that a file has": Mutant(
        "merge/engine.py",
        [("                    if tail.path in told:\n", "                    if changed is None:\n")],
        [f"{ROTATED}::test_14_late_lines_of_which_the_system_tells_under_another_name"],
    ),
    "futures stay locked after a fork": Mutant(
        "loops/call.py",
        [("    future._condition, future._waiters = threading.Condition(), []\n", "    pass\n")],
        [
            "tests/loops/test_thread.py::test_fork_while_a_thread_is_inside_a_future_leaves_no_lock_in_the_child",
            "tests/test_verify.py::test_fork_while_a_thread_is_inside_a_submission_leaves_no_lock_in_the_child",
        ],
    ),
    "room that is given back was written": Mutant(
        "files/tail.py",
        [
            (
                "                if padded is not None and padded <= there < reading.offset + length:\n",
                "                if False:\n",
            )
        ],
        ["tests/files/test_tail.py::test_room_that_is_given_back_while_it_is_read"],
    ),
    "who is killed has refused": Mutant(
        "net/client.py",
        [("                except SecretError as exc:\n", "                except BrokenResourceError as exc:\n")],
        ["tests/net/test_auth.py::test_send_to_a_server_that_ends_amid_the_handshake_tries_again"],
    ),
    "two writers": Mutant(
        "files/rolling.py",
        [("            lock(file.fd, live)\n", "")],
        [f"{FILE}::test_a_second_writer_is_refused"],
    ),
    "what a shorter source still has comes again": Mutant(
        "files/succession.py",
        [("        raise Shorter(path or self.path, known, live=live)\n", "        return 0\n")],
        [SHORTER, "tests/net/test_send.py::test_log_that_lost_its_end_is_compared_with_what_the_server_has"],
    ),
    "a line that begins like another is torn": Mutant(
        "merge/shorter.py",
        [("            common = common - len(before) + line if line else common\n", "")],
        [SHORTER],
    ),
    "a file that begins alike is a shorter one": Mutant(
        "merge/shorter.py", [("            if common < HEAD_BYTES:\n", "            if not common:\n")], [SHORTER]
    ),
    "a source that is as long as it was is the same": Mutant(
        "merge/mend.py",
        [("== header.payload_crc\n", ">= 0\n")],
        ["tests/merge/test_mend.py::test_a_source_that_lost_its_end_in_the_same_power_cut"],
    ),
    "a length is believed": Mutant(
        "net/wire.py", [("    if len(payload) < at:\n", "    if False:\n")], ["tests/fuzz/test_fuzz.py::test_messages"]
    ),
    "a drain takes what is not read for what is over": Mutant(
        "net/connection.py",
        [('        while self._holds <= {"full", "total"} and not self._ended:\n', "        while self.is_read:\n")],
        ["tests/net/test_server.py::test_drain_reads_on_where_memory_was_short"],
    ),
    "who presses Ctrl-C again wants to lose data": Mutant(
        "loops/thread.py",
        [("        _drain(pending, begun, time.monotonic() + _TO_END)\n", "")],
        ["tests/loops/test_exit.py::test_ctrl_c_while_the_program_drains_leaves_others_the_time_they_need"],
    ),
    "a reader that asks who writes is a writer": Mutant(
        "files/descriptor.py",
        [("                if time.monotonic() > patient_until:\n", "                if True:\n")],
        [f"{FILE}::test_a_reader_that_asks_who_writes_keeps_no_writer_out"],
    ),
    "a tail that is cut meanwhile is damage": Mutant(
        "files/frame_source.py",
        [
            (
                "                if len(found) < HEADER_BYTES and part is self.series.parts[-1]:\n",
                "                if False:\n",
            )
        ],
        [f"{FILE}::test_headers_are_read_while_a_writer_cuts_a_torn_tail"],
    ),
    "what was cut has a line behind it": Mutant(
        "cli_read.py",
        [("                    amid = True\n", "")],
        ["tests/test_cli.py::test_cat_follow_interrupted_amid_lines_adds_nothing_behind_them"],
    ),
    "nobody else opens files": Mutant(
        "merge/engine.py",
        [("                more = self._held.makes_room(exc)\n", "                more = False\n")],
        [f"{ROTATED}::test_16_descriptors_that_others_take"],
    ),
}
# Those that the rest of the world forgets; the others are tried at leisure.
FEW = (
    "no fsync",
    "no fsync of the folder",
    "offsets apart from the data",
    "no checksum of payloads",
    "no checksum of headers",
    "no tail guard",
)

QUICK = """
from hypothesis import Phase, settings
settings.register_profile("mutant", phases=[Phase.generate], database=None)  # it need not be a small example
settings.load_profile("mutant")
"""


def trials() -> list[tuple[str, str]]:
    every = [(name, test) for name, mutant in MUTANTS.items() for test in mutant.tests]
    if WANTED == "all":
        return every
    if WANTED:
        return [trial for trial in every if trial[0] == WANTED]
    return [(name, MUTANTS[name].tests[0]) for name in FEW]


@pytest.mark.parametrize(("name", "test"), trials())
def test_is_noticed(tmp_path: Path, name: str, test: str) -> None:
    """With this fault in the package, this test fails."""
    mutant = MUTANTS[name]
    for folder in ("offload", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("benchmarks", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "offload" / mutant.file
    code = path.read_text(encoding="utf-8")
    for old, new in mutant.changes:
        assert code.count(old) == 1, f"{mutant.file} has this {code.count(old)} times, expected once:\n{old}"
        code = code.replace(old, new)
    path.write_text(code, encoding="utf-8")
    (tmp_path / "quick.py").write_text(QUICK, encoding="utf-8")

    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "quick", "-p", "no:cacheprovider", test]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "OFFLOAD_LOOP_CUTS": "6", "OFFLOAD_SWEEP": "all"}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    done, tries = run(), 1
    while not done.returncode and "skipped" not in done.stdout and tries < TRIES:
        done, tries = run(), tries + 1
    if re.search(r"^\d+ skipped", done.stdout, re.MULTILINE):
        pytest.skip(f"{test} is skipped here")
    assert done.returncode == 1, f"nobody noticed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert re.search(r"^1 failed", done.stdout, re.MULTILINE), done.stdout[-2000:]
