"""A packet reader that checks a costly digest: before (all on the event loop), and after: a framer copies each byte
once, a Verifier digests on threads, in order, and the sender is not read while checks are behind. Run it: a detector
(`offload.watch`) shows how often and how long the loop stood still, for both."""

import asyncio
import hashlib
from functools import partial

import offload

digest = partial(hashlib.pbkdf2_hmac, "sha256", salt=b"salt", iterations=100_000)  # some 50 ms, without the GIL
results: list[bool] = []
COUNT, FRAME = 15, offload.PrefixFramer(digest=digest).encode(bytes(50_000))


class Before(asyncio.Protocol):
    buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while len(view := bytes(self.buffer)) >= 4 and len(view) >= (end := 4 + int.from_bytes(view[:4], "big")) + 32:
            results.append(digest(view[4:end]) == view[end : end + 32])
            del self.buffer[: end + 32]


async def after(connection: offload.Connection) -> None:
    async with offload.Verifier(digest) as verifier:
        async for packet in connection:
            verifier.check(packet.payload, packet.digest).add_done_callback(lambda c: results.append(bool(c.result())))
            await verifier.room()


async def send(address: str) -> None:
    async with offload.connect(address, offload.PrefixFramer) as connection:
        connection.write_frames([FRAME] * COUNT)
        connection.send_eof()
        await connection.batch()  # ends when the server closes


async def measure(name: str, address: str) -> None:
    results.clear()
    with offload.watch(threshold=0.02, log=False) as detector:
        async with offload.LoopThread("sender") as sender:
            await sender.run(send, address)
    stalls = [stall.duration for stall in detector.report().stalls if stall.loop == "main"]
    print(f"{name}: {sum(results)} of {COUNT} right; {len(stalls)} stalls, longest {max(stalls, default=0):.3f} s")


async def main() -> None:
    async with await asyncio.get_running_loop().create_server(Before, "127.0.0.1", 0) as server:
        await measure("before", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with offload.PacketServer(after, digest=digest, check_digest=False) as packets:
        await measure("after", await packets.listen("127.0.0.1:0"))


asyncio.run(main())
