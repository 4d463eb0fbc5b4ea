"""A server in three lines: each packet goes back to who sent it, in order, however the stream is cut.

Run it: a client sends a thousand packets, in pieces, and reads them back. What a peer may use is bounded: its packets
that wait (then it is not read), the size of one, the time for one to become whole.
"""

import asyncio
import random

import offload


async def echo(connection: offload.Connection) -> None:
    async for packet in connection:
        await connection.send(packet.payload)


async def main() -> None:
    limits = offload.Limits(connections=100, connection_bytes=1 << 20, packet=10.0)
    async with offload.PacketServer(echo, framing=offload.PrefixFramer, limits=limits, max_packet=100_000) as server:
        address = await server.listen("127.0.0.1:0")
        async with offload.connect(address, offload.PrefixFramer) as connection:
            payloads = [random.randbytes(random.randrange(2000)) for _ in range(1000)]

            async def talk() -> None:
                for payload in payloads:
                    await connection.send(payload)

            talking = asyncio.create_task(talk())
            for payload in payloads:
                packet = await connection.packet()
                assert packet is not None
                assert packet.payload == payload
            await talking
    print(f"{len(payloads)} packets came back in order; {server.stats}")


asyncio.run(main())
