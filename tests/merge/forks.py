"""The `offload` command, again and again, for strace: each run is a fork of this process, as importing takes longest.

For each line on stdin, a JSON list (file for stderr, arguments …), the process number of the run is printed, and how it
ended once it has. A run begins when it is traced.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from offload import cli

PATIENCE = 20.0  # seconds for strace to come
ANYBODY = ctypes.c_ulong(-1)
PR_SET_PTRACER = 0x59616D61


def run(stderr: str, arguments: list[str]) -> NoReturn:
    code: object = 99
    try:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)  # where only parents may trace
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        deadline = time.monotonic() + PATIENCE
        while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
            assert time.monotonic() < deadline, "nobody traces this"
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGURG)  # at which who is traced stops, until strace has it go on by calls
        sys.argv = ["offload", *arguments]
        cli.main()
    except SystemExit as exc:
        code = exc.code
    finally:
        os._exit(code if isinstance(code, int) else 98)


def main() -> None:
    for name in ("offload.merge.engine", "offload.files.packet_stream", "offload.merge.sources", "gzip", "resource"):
        importlib.import_module(name)
    for line in sys.stdin:
        stderr, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(stderr, arguments)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
