"""Packets with a digest, checked off the event loop and delivered in their order, while the loop stays responsive.

Run it: first every packet is hashed on the event loop itself, then by a Verifier. You see that both deliver the same
packets in the same order, which one was damaged on the way, and how long a ticker had to wait at worst in each.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator

from offload.verify import Verifier

Packet = tuple[bytes, bytes]  # digest, payload


async def stream() -> AsyncIterator[Packet]:
    """As from a network: two large packets for every small one, and one of them damaged."""
    large, small = os.urandom(16 << 20), b"a small one"
    for number in range(24):
        payload = small if number % 3 == 2 else large
        yield hashlib.sha256(payload).digest() if number != 17 else bytes(32), payload
        await asyncio.sleep(0)


async def on_the_loop(packets: list[Packet]) -> list[int]:
    good = []
    for number, (digest, payload) in enumerate(packets):
        if hashlib.sha256(payload).digest() == digest:
            good.append(number)
        await asyncio.sleep(0)
    return good


async def with_verifier(packets: list[Packet]) -> list[int]:
    async with Verifier("sha256", max_bytes=64 << 20) as verifier:
        checks = []
        for digest, payload in packets:
            checks.append(verifier.check(payload, digest))
            await verifier.room()  # no more than 64 MiB under way
        return [number for number, check in enumerate(checks) if await check]


async def main() -> None:
    packets = [packet async for packet in stream()]
    for name, deliver in (("on the loop", on_the_loop), ("verifier", with_verifier)):
        late: list[float] = []
        task = asyncio.create_task(deliver(packets))
        while not task.done():
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - start - 0.001)
        damaged = set(range(len(packets))) - set(task.result())
        order = "in order" if task.result() == sorted(task.result()) else "out of order"
        print(f"{name:12}: delivered {order}, all but {damaged}; the ticker waited {max(late) * 1000:.1f} ms at worst")


if __name__ == "__main__":
    asyncio.run(main())
