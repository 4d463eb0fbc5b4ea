"""What blocks a loop: `python scenarios.py CONTESTANT SCENARIO` runs one, and prints what was said of it, as JSON.

    {"true": 0.1502, "lines": [212], "claims": [{"seconds": 0.1503, "lines": [212], "cause": "wait", "how": ""}]}

A scenario makes what it needs, then the contestant is switched on, and then the scenario blocks its loop, most of them
for 150 ms. The lines that a reader would want to be shown have a comment at their end, `# here`. `Truth` times them.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

from detectors import CONTESTANTS, THRESHOLD, Claims, prepare

import offload

BLOCK = 0.15
SETTLE = 0.1  # before and after, so that nobody is judged by how it starts and stops


class Truth:
    """How long the program blocked, by the clock: from where it is first entered to where it is last left."""

    seconds = 0.0
    over = False

    def __init__(self) -> None:
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = self._began or time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.over = True

    async def wait(self) -> None:
        """Until it was left."""
        while not self.over:  # noqa: ASYNC110  # an event would be one more way to wake the loop
            await asyncio.sleep(0.002)


Body = Callable[[], Awaitable[object]]
Make = Callable[[Truth], Body]


@dataclass
class Scenario:
    """One way to block a loop, or not to.

    Attributes:
        make: makes what is needed and returns what is then run, on the main loop.
        causes: what a detector may rightly call the cause; empty: it blocks nothing.
        needs: a module without which it cannot run.
    """

    make: Make
    causes: tuple[str, ...] = ()
    needs: str = "asyncio"


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, *causes: str, needs: str = "asyncio") -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        SCENARIOS[name] = Scenario(make, causes, needs)
        return make

    return add


def marked(function: Callable[..., object]) -> list[int]:
    """The lines of a function with the comment."""
    lines, first = inspect.getsourcelines(function)
    return [first + n for n, line in enumerate(lines) if line.rstrip().endswith("# here")]


def later(function: Callable[..., object], *args: object) -> None:
    """Another thread calls this after a block's time."""
    wait = time.sleep

    def run() -> None:
        wait(BLOCK)
        function(*args)

    threading.Thread(target=run).start()


@scenario("`time.sleep` in a task", "wait")
def sleeps(truth: Truth) -> Body:
    async def body() -> None:
        with truth:
            time.sleep(BLOCK)  # noqa: ASYNC251  # here

    return lambda: asyncio.create_task(body())


@scenario("nested await", "wait")
def nests(truth: Truth) -> Body:
    async def inner() -> None:
        with truth:
            time.sleep(BLOCK)  # noqa: ASYNC251  # here

    async def outer() -> None:
        await inner()

    return lambda: asyncio.create_task(outer())


@scenario("`recv` of a blocking socket", "wait")
def receives(truth: Truth) -> Body:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()

    async def body() -> None:
        later(far.sendall, b"x")
        with truth:
            near.recv(1)  # here

    return body


@scenario("`urllib`, slow server", "wait")
def asks(truth: Truth) -> Body:
    server = socket.create_server(("127.0.0.1", 0))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def serve() -> None:
        connection, _ = server.accept()
        connection.recv(4096)
        later(connection.sendall, b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async def body() -> None:
        with truth:
            opener.open(f"http://127.0.0.1:{server.getsockname()[1]}/")  # here

    threading.Thread(target=serve, daemon=True).start()
    return body


@scenario("`subprocess.run`", "wait")
def runs(truth: Truth) -> Body:
    async def body() -> None:
        with truth:
            subprocess.run(["sleep", str(BLOCK)], check=True)  # noqa: ASYNC221  # here

    return body


@scenario("lock of another thread", "lock")
def locks(truth: Truth) -> Body:
    lock = threading.Lock()
    lock.acquire()

    async def body() -> None:
        later(lock.release)
        with truth:
            lock.acquire()  # here

    return body


@scenario("loop in Python", "cpu-python")
def computes(truth: Truth) -> Body:
    async def body() -> None:
        with truth:
            until = time.thread_time() + BLOCK
            while time.thread_time() < until:  # here
                pass  # here

    return body


@scenario("`json.loads`", "cpu-c")
def parses(truth: Truth) -> Body:
    text = json.dumps([{"name": f"name {n}", "values": [n, n + 1, str(n)]} for n in range(120_000)])

    async def body() -> None:
        with truth:
            json.loads(text)  # here

    return body


@scenario("regular expression", "cpu-c")
def matches(truth: Truth) -> Body:
    async def body() -> None:
        with truth:
            re.match(r"(a+)+$", "a" * 22 + "b")  # here

    return body


@scenario("`sorted`", "cpu-c")
def sorts(truth: Truth) -> Body:
    numbers = random.Random(1).sample(range(10_000_000), 400_000)

    async def body() -> None:
        with truth:
            sorted(numbers)  # here

    return body


@scenario("`zlib.compress`", "cpu-c")
def compresses(truth: Truth) -> Body:
    data = random.Random(1).randbytes(5_000_000)

    async def body() -> None:
        with truth:
            zlib.compress(data)  # here

    return body


@scenario("`gc.collect`", "gc", "cpu-c")
def collects(truth: Truth) -> Body:
    kept = [[n] for n in range(1_500_000)]

    async def body() -> None:
        with truth:
            gc.collect()  # here
        assert kept

    return body


@scenario("`x in list`, never gives up the GIL", "cpu-c", "cpu-python")
def searches(truth: Truth) -> Body:
    numbers = list(range(5_000_000))

    async def body() -> None:
        with truth:
            _ = -1 in numbers or -2 in numbers  # here

    return body


@scenario("GIL held by another thread", "gil")
def hogs(truth: Truth) -> Body:
    def match() -> None:
        with truth:
            re.match(r"(a+)+$", "a" * 22 + "b")  # here

    async def body() -> None:
        threading.Thread(target=match).start()
        await truth.wait()

    return body


def block(truth: Truth) -> None:
    with truth:
        time.sleep(BLOCK)  # here


@scenario("`call_soon`", "wait")
def calls_soon(truth: Truth) -> Body:
    async def body() -> None:
        asyncio.get_running_loop().call_soon(block, truth)
        await truth.wait()

    return body


@scenario("`call_later`", "wait")
def calls_later(truth: Truth) -> Body:
    async def body() -> None:
        asyncio.get_running_loop().call_later(0.01, block, truth)
        await truth.wait()

    return body


@scenario("`add_reader`", "wait")
def reads(truth: Truth) -> Body:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)

        def readable() -> None:
            loop.remove_reader(near)
            block(truth)

        loop.add_reader(near, readable)
        far.send(b"x")
        await truth.wait()

    return body


@scenario("`data_received`", "wait")
def talks(truth: Truth) -> Body:
    class Receiver(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            block(truth)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Receiver, "127.0.0.1", 0)
        transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
        transport.write(b"x")
        await truth.wait()
        server.close()

    return body


@scenario("40 callbacks of 4 ms in one turn", "saturated")
def saturates(truth: Truth) -> Body:
    def short() -> None:
        with truth:
            until = time.thread_time() + 0.004
            while time.thread_time() < until:  # here
                pass  # here

    async def body() -> None:
        for _ in range(40):
            asyncio.get_running_loop().call_soon(short)
        await truth.wait()

    return body


@scenario("loop on another thread", "wait")
def runs_elsewhere(truth: Truth) -> Body:
    async def body() -> None:
        await asyncio.sleep(SETTLE)
        block(truth)

    return lambda: asyncio.to_thread(lambda: asyncio.run(body()))


@scenario("loop of a resource", "wait")
def blocks_resource(truth: Truth) -> Body:
    async def body() -> None:
        asyncio.get_running_loop().slow_callback_duration = THRESHOLD  # which LoopThread had switched off
        block(truth)

    async def main() -> None:
        async with offload.LoopThread("db") as thread:
            await thread.run(body)

    return main


scenario("uvloop: `time.sleep`", "wait", needs="uvloop")(sleeps)
scenario("uvloop: `data_received`", "wait", needs="uvloop")(talks)


@scenario("clean: short steps")
def cooperates(truth: Truth) -> Body:
    async def one() -> None:
        for _ in range(50):
            until = time.thread_time() + 0.001
            while time.thread_time() < until:
                pass
            await asyncio.sleep(0)

    return lambda: asyncio.gather(*(one() for _ in range(5)))


@scenario("clean: `to_thread(time.sleep)`")
def delegates(truth: Truth) -> Body:
    return lambda: asyncio.to_thread(time.sleep, BLOCK)


BLOCKING = marked(block)


async def attempt(contestant: str, body: Body) -> Claims:
    claims: Claims = []
    async with CONTESTANTS[contestant](claims):
        await asyncio.sleep(SETTLE)
        await body()
        await asyncio.sleep(SETTLE)
    return claims


def main(contestant: str, name: str) -> None:
    prepare(contestant)
    chosen = SCENARIOS[name]
    gc.disable()  # the heap is large, and a collection would be a stall of its own
    truth = Truth()
    body = chosen.make(truth)
    factory = importlib.import_module(chosen.needs).new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        claims = runner.run(attempt(contestant, body))
    result = {"true": truth.seconds, "lines": marked(chosen.make) or BLOCKING, "claims": [asdict(c) for c in claims]}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
