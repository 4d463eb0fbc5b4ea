"""A packet reader that checks a costly digest: before (all on the event loop), and after: a framer copies each byte
once, a Verifier digests on threads, in order, and the sender is not read while checks are behind. Run it: it shows the
longest stall of the loop for both."""

import asyncio
import hashlib
from functools import partial

from offload import LoopThread
from offload.net.connection import Connection
from offload.net.dial import connect
from offload.net.server import PacketServer
from offload.packets.framing import PrefixFramer
from offload.verify import Verifier

digest = partial(hashlib.pbkdf2_hmac, "sha256", salt=b"salt", iterations=20_000)  # some 10 ms
results: list[bool] = []
COUNT, FRAME = 50, PrefixFramer("!I", digest=digest).encode(bytes(50_000))


class Before(asyncio.Protocol):
    buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while len(view := bytes(self.buffer)) >= 4 and len(view) >= (end := 4 + int.from_bytes(view[:4], "big")) + 32:
            assert digest(view[4:end]) == view[end : end + 32]
            del self.buffer[: end + 32]


async def after(connection: Connection) -> None:
    async with Verifier(digest) as verifier:
        async for packet in connection:
            verifier.check(packet.payload, packet.digest).add_done_callback(lambda c: results.append(bool(c.result())))
            await verifier.room()


async def send(address: str) -> None:
    async with connect(address, PrefixFramer) as connection:
        connection.write_frames([FRAME] * COUNT)
        connection.send_eof()
        await connection.batch()  # ends when the server closes


async def stall(address: str) -> str:
    loop, longest = asyncio.get_running_loop(), 0.0
    async with LoopThread("sender") as sender:
        sending = sender.run(send, address)
        while not sending.done():
            longest = max(longest, await asyncio.sleep(0.001, -loop.time()) + loop.time() - 0.001)
    return f"longest stall of the loop {longest * 1000:.0f} ms"


async def main() -> None:
    async with await asyncio.get_running_loop().create_server(Before, "127.0.0.1", 0) as server:
        print("before:", await stall(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    async with PacketServer(after, framing=PrefixFramer, digest=digest, check_digest=False) as packets:
        print("after:", await stall(await packets.listen("127.0.0.1:0")), f"{sum(results)} of {COUNT} right")


asyncio.run(main())
