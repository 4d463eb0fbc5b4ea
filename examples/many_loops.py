"""Several event loops, each in its own thread, share one resource; each awaits it as if it were its own.

Run it: four loops count on one shared object that takes no lock, since only one thread ever touches it.
"""

import asyncio
import threading

import offload

LOOPS, CALLS = 4, 500


class Counter:
    """Not safe for threads: reads, then writes."""

    def __init__(self) -> None:
        self.value = 0
        self.threads: set[str] = set()

    def add(self) -> int:
        self.threads.add(threading.current_thread().name)
        value = self.value
        self.value = value + 1
        return self.value


async def count(shared: offload.Handle[Counter]) -> None:
    for _ in range(CALLS // 10):
        await asyncio.gather(*(shared.call(Counter.add) for _ in range(10)))


def main() -> None:
    with offload.Resource(Counter, name="counter") as shared:
        threads = [threading.Thread(target=asyncio.run, args=(count(shared),)) for _ in range(LOOPS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = shared.submit(lambda c: c.value).result()  # a plain thread may ask too
        names = shared.submit(lambda c: sorted(c.threads)).result()
    print(f"{LOOPS} loops counted to {total}; the object was touched by {', '.join(names)} only")


if __name__ == "__main__":
    main()
