"""The demo: its proof holds, it can fail, and it never empties a folder that it did not make."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.merge import demo
from offload.merge.audit import verify
from offload.merge.split import split, stat

LINES = 40


async def run(folder: Path) -> list[str]:
    return [sentence async for sentence in demo.demo(folder, lines=LINES)]


async def test_five_programs_are_merged_and_proved(tmp_path: Path) -> None:
    """Every line of five live logs is in the packet file, which is left where it says."""
    demo.clear(tmp_path)
    told = await run(tmp_path)
    merged = tmp_path / "merged.opk"
    assert any(f"Merged: {5 * LINES} lines" in sentence for sentence in told)
    assert any(str(merged) in sentence for sentence in told[-3:])
    assert verify(merged).ok
    assert {entry.name: entry.lines for entry in stat(merged).sources} == {f"{n}.log": LINES for n in demo.NAMES}
    for name in demo.NAMES:
        log = (tmp_path / "logs" / f"{name}.log").read_bytes()
        assert log.count(b"\n") == LINES
        assert (tmp_path / "split" / f"{name}.log").read_bytes() == log


async def test_it_runs_again_in_its_own_folder(tmp_path: Path) -> None:
    """A former demo's folder is emptied of what the demo made, and of nothing else."""
    folder = tmp_path / "new" / "folder"
    demo.clear(folder)
    await run(folder)
    (folder / "my notes").write_text("keep")
    demo.clear(folder)
    assert not (folder / "merged.opk").exists()
    assert (folder / "my notes").read_text() == "keep"
    assert (await run(folder))[-1]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """A folder that holds anything else is left as it is."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "precious").write_text("keep")
    with pytest.raises(FileExistsError, match="the folder holds other files; give an empty or a new one"):
        demo.clear(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["logs", "precious"]


async def test_the_proof_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one byte of a log were not what came out, the demo would say so."""
    demo.clear(tmp_path)

    def damaged(merged: Path, folder: Path) -> object:
        done = split(merged, folder)
        path = folder / "web.log"
        path.write_bytes(path.read_bytes()[:-2] + b"!\n")
        return done

    monkeypatch.setattr(demo, "split", damaged)
    with pytest.raises(AssertionError, match="differs from"):
        await run(tmp_path)


PROOF = """
import time
from offload.cli import main
from offload.merge import demo

def check(merged):
    print("the proof begins", flush=True)
    time.sleep(0.5)
    return verify(merged)

verify, demo.verify = demo.verify, check
main()
"""


@pytest.mark.slow
def test_ctrl_c_while_it_proves_itself_ends_it(tmp_path: Path) -> None:
    """The loop is free meanwhile, and hears it."""
    command = [sys.executable, "-c", PROOF, "demo", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("the proof begins" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
