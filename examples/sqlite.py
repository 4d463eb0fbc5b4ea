"""A SQLite connection on its own thread: one hop for many statements, a transaction nobody gets into, a query cut off.

Run it: twenty tasks move money at once and the sum stays the same; then a query that would take for ever is given up.
"""

import asyncio
import sqlite3

import offload

ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n"


def connect() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("create table account (name text primary key, cents integer)")
    db.executemany("insert into account values (?, ?)", [("ann", 1000), ("bob", 1000)])
    return db


def balances(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("select name, cents from account"))


async def move(db: offload.Handle[sqlite3.Connection], cents: int) -> None:
    async with db.exclusive() as tx:  # without it, two tasks would begin in one transaction
        await tx.call(sqlite3.Connection.execute, "begin")
        before = await tx.call(balances)
        await asyncio.sleep(0)  # another task would like to get in here
        values = [(before["ann"] - cents, "ann"), (before["bob"] + cents, "bob")]
        await tx.call(sqlite3.Connection.executemany, "update account set cents = ? where name = ?", values)
        await tx.call(sqlite3.Connection.execute, "commit")


async def main() -> None:
    async with offload.Resource(connect, interrupt=sqlite3.Connection.interrupt) as db:
        await asyncio.gather(*(move(db, cents) for cents in range(20)))
        print("after 20 transfers:", await db.call(balances))
        try:
            await db.options(timeout=0.2).call(lambda c: c.execute(ENDLESS).fetchall())
        except TimeoutError as error:
            print("given up:", error)
        print("and the connection still answers:", await db.call(lambda c: c.execute("select 6 * 7").fetchone()[0]))


if __name__ == "__main__":
    asyncio.run(main())
