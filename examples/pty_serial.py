"""A serial device as a Service: your own class, each of its methods on the device's thread, awaited.

A pseudo-terminal stands for the serial port; at its other end a thermometer answers each question. Run it: three tasks
ask at once, and each gets the answer to its own question.
"""

import asyncio
import os
import pty
import tty

import offload


class Thermometer(offload.Service):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_open(self) -> None:
        self.port = os.open(self.path, os.O_RDWR | os.O_NOCTTY)

    def on_close(self) -> None:
        os.close(self.port)

    @offload.method
    def ask(self, room: str) -> float:
        """Question and answer are one call, so nobody else's question gets in between."""
        os.write(self.port, f"{room}?\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            answer += os.read(self.port, 100)  # blocks, but only this thread
        return float(answer)


def device(line: int, rooms: dict[str, float]) -> None:
    with open(line, "r+b", buffering=0, closefd=False) as stream:
        for _ in rooms:
            room = stream.readline().decode().strip("?\n")
            stream.write(f"{rooms[room]}\n".encode())


async def main() -> None:
    rooms = {"kitchen": 21.5, "cellar": 11.0, "attic": 27.25}
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    async with offload.LoopThread("device") as far_end, Thermometer(os.ttyname(theirs)) as thermometer:
        answering = far_end.call(device, ours, rooms)
        for room, degrees in zip(rooms, await asyncio.gather(*map(thermometer.ask, rooms)), strict=True):
            print(f"{room}: {degrees} °C")
        await answering
    os.close(ours)
    os.close(theirs)


if __name__ == "__main__":
    asyncio.run(main())
