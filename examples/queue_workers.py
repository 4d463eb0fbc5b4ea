"""A blocking queue between plain threads and an event loop: one end is a Resource, the other stays as it was.

Run it: a producer in an ordinary thread fills a small `queue.Queue`, tasks on the loop take from it, and while the
queue is empty only the queue's thread waits.
"""

import asyncio
import queue
import threading
from collections import Counter

import offload

ITEMS, WORKERS = 300, 3


def produce(jobs: queue.Queue[int | None]) -> None:
    for number in range(ITEMS):
        jobs.put(number)  # blocks while the queue is full
    for _ in range(WORKERS):
        jobs.put(None)


async def work(name: str, jobs: offload.Handle[queue.Queue[int | None]], done: Counter[str]) -> None:
    while (number := await jobs.call(queue.Queue.get)) is not None:
        await asyncio.sleep(number % 3 / 10_000)
        done[name] += 1


async def main() -> None:
    shared: queue.Queue[int | None] = queue.Queue(maxsize=10)
    done: Counter[str] = Counter()
    producer = threading.Thread(target=produce, args=(shared,))
    async with offload.Resource(lambda: shared, name="jobs") as jobs:
        producer.start()
        await asyncio.gather(*(work(f"worker {n}", jobs, done) for n in range(WORKERS)))
        stats = jobs.stats()
    producer.join()
    for name, count in sorted(done.items()):
        print(f"{name}: {count} jobs")
    print(f"{done.total()} jobs by {stats.submitted} calls, {stats.failed} failed")


if __name__ == "__main__":
    asyncio.run(main())
