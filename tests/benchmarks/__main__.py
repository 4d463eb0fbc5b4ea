"""`python tests/benchmarks [hop|sink|merge|startup|follow|large|detector|verify|net|torture] …`: beside its peers.

Figures of one machine at one time: compare within a table, not between machines. No test depends on them.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from measure import Options, Table, machine

BENCHMARKS = ("hop", "sink", "merge", "startup", "follow", "large", "detector", "verify", "net", "torture")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description="offload beside its peers, in one run")
    parser.add_argument("which", nargs="*", metavar="|".join(BENCHMARKS), help="all of them if none is named")
    parser.add_argument("--rounds", type=int, help="how often each contestant runs")
    parser.add_argument("--quick", action="store_true", help="little work: does it run at all?")
    parser.add_argument("--large", action="store_true", help="also what takes minutes and gigabytes of memory")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    given = parser.parse_args()
    if unknown := set(given.which) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    options = Options(given.rounds, quick=given.quick, large=given.large)
    texts = [f"{machine()}. Median over the rounds (quartiles).\n"]
    print(texts[0], flush=True)
    for name in given.which or BENCHMARKS:
        tables: list[Table] = importlib.import_module(f"bench_{name}").run(options)
        for table in tables:
            texts.append(str(table))
            print(table, flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
