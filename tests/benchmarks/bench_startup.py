"""How long commands take that do next to nothing, from before the process starts to after it has ended."""

from __future__ import annotations

import sys

from measure import Figures, Options, Table, memory_folder, offload_command, run_program, shuffled, tell


def run(options: Options) -> list[Table]:
    rounds = options.round_count(20)
    figures = Figures()
    with memory_folder() as folder:
        (folder / "tiny.log").write_text("one line\n")
        output = folder / "out.opk"
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import asyncio'": [sys.executable, "-c", "import asyncio"],
            "python -c 'import typer'": [sys.executable, "-c", "import typer"],
            "offload --version": [*offload_command(), "--version"],
            "offload --help": [*offload_command(), "--help"],
            "offload merge tiny.log": [*offload_command(), "merge", str(folder / "tiny.log"), "-o", str(output), "-q"],
        }
        for argv in commands.values():  # so that byte code is compiled and files are in the cache
            run_program(*argv)
        for i in range(rounds):
            tell(f"startup: round {i + 1} of {rounds}")
            for name in shuffled(list(commands), i):
                output.unlink(missing_ok=True)
                done = run_program(*commands[name])
                figures.add(name, "ms", done.seconds * 1e3)
                figures.add(name, "CPU", done.cpu * 1e3)
                figures.add(name, "MiB", done.rss / 2**20)
    table = Table("Start to end of a process", ("command", "ms", "CPU ms", "over `pass`", "peak MiB"))
    for name in commands:
        table.rows.append(
            (
                name,
                figures.show(name, "ms"),
                figures.show(name, "CPU"),
                figures.ratio(name, "python -c pass", "ms"),
                figures.show(name, "MiB"),
            )
        )
    table.notes.append(f"{rounds} rounds")
    return [table]
