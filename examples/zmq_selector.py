"""A loop thread whose selector polls ZeroMQ sockets beside descriptors, so `loop.add_reader(socket, …)` just works.
Run it (`pip install pyzmq`): you see what that loop receives from a blocking socket on another thread."""

import asyncio
import selectors
from typing import Any

import zmq

import offload


class ZmqSelector(selectors.BaseSelector):
    def __init__(self) -> None:
        self.keys, self.poller = dict[Any, selectors.SelectorKey](), zmq.Poller()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self.poller.register(fileobj, events)  # POLLIN is EVENT_READ, POLLOUT is EVENT_WRITE
        key = selectors.SelectorKey(fileobj, getattr(fileobj, "fileno", lambda: fileobj)(), events, data)
        return self.keys.setdefault(fileobj, key)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        self.poller.unregister(fileobj)
        return self.keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = self.poller.poll(None if timeout is None else max(0, int(timeout * 1000) + (timeout > 0)))
        return [(self.keys[name], events & 3 or selectors.EVENT_READ) for name, events in found]

    def get_map(self) -> dict[Any, selectors.SelectorKey]:
        return self.keys


def make(kind: int) -> "zmq.Socket[bytes]":
    return zmq.Context.instance().socket(kind)


async def receive(count: int) -> list[bytes]:
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    loop, socket = asyncio.get_running_loop(), make(zmq.PULL)
    socket.bind("inproc://lines")
    loop.add_reader(socket, lambda: queue.put_nowait(socket.recv(zmq.NOBLOCK)))
    lines = [await queue.get() for _ in range(count)]
    loop.remove_reader(socket)
    socket.close()
    return lines


async def main() -> None:
    thread = offload.LoopThread("zmq", loop_factory=lambda: asyncio.SelectorEventLoop(ZmqSelector()))
    async with thread, offload.Resource(lambda: make(zmq.PUSH)) as sender:
        received = thread.run(receive, 5)
        await sender.call(lambda socket: socket.connect("inproc://lines"))
        await asyncio.gather(*(sender.call(zmq.Socket.send, b"message %d" % number) for number in range(5)))
        print(*await received, sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
