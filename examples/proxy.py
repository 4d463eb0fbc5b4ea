"""A proxy: each connection gets one of its own to the server behind. Where should that one be opened?

Not in a protocol's `connection_made`: it is a plain function, in which nothing may block and nothing can be awaited, so
bytes would arrive before there is somewhere to put them. A handler is a coroutine: it opens the onward connection
first, and until it reads, the peer waits (its socket is not read beyond a bound). Whoever is slow slows down the other
side, not the proxy's memory.
"""

import asyncio

import offload


async def shout(connection: offload.Connection) -> None:
    """The server behind."""
    async for packet in connection:
        await connection.send(packet.payload.upper())


async def pass_on(source: offload.Connection, target: offload.Connection) -> None:
    async for packet in source:
        await target.send(packet.payload)
    target.send_eof()


async def main() -> None:
    behind = offload.PacketServer(shout, framing=offload.LineFramer)
    address = await behind.listen("127.0.0.1:0")

    async def proxy(connection: offload.Connection) -> None:
        async with offload.connect(address, offload.LineFramer) as onward, asyncio.TaskGroup() as group:
            group.create_task(pass_on(connection, onward))
            group.create_task(pass_on(onward, connection))

    front = offload.PacketServer(proxy, framing=offload.LineFramer)
    async with behind, front, offload.connect(await front.listen("127.0.0.1:0"), offload.LineFramer) as connection:
        for word in (b"one", b"two", b"three"):
            await connection.send(word)
            packet = await connection.packet()
            assert packet is not None
            print(f"sent {word.decode()}, got {packet.payload.decode()}")


asyncio.run(main())
