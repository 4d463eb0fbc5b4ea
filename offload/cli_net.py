"""The commands `offload serve` and `offload send`. What they need is imported when they run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import BrokenResourceError, OffloadError

if TYPE_CHECKING:
    import ssl

    from .merge.engine import Progress
    from .net.fanout import Fanout, Policy
    from .net.receiver import Receiver
    from .net.server import PacketServer

FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0  # seconds before `send` connects again: twice as long each time


class FsyncChoice(StrEnum):
    none = "none"
    interval = "interval"
    always = "always"


class PolicyChoice(StrEnum):
    wait = "wait"
    drop_oldest = "drop-oldest"
    disconnect = "disconnect"


SecretOption = Annotated[
    Path | None,
    typer.Option("--secret-file", metavar="FILE", help="What both sides must know, for a challenge by HMAC-SHA-256."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No messages but errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: a summary as JSON on stdout at the end.")]


def register(app: typer.Typer, epilog: str) -> None:
    """Add the commands of this module."""
    app.command(epilog=epilog)(serve)
    app.command(epilog=epilog)(send)


def serve(
    listen: Annotated[list[str], typer.Option(metavar="HOST:PORT|unix:PATH", help="Where to take connections.")],
    framing: Annotated[
        str,
        typer.Option(
            metavar="u32|octet|lines|STRUCT",
            help="How packets stand in the stream: behind their size (u32; `offload send` and Python's SocketHandler), "
            "behind a decimal count (octet; syslog), as lines, or behind a header in Python's struct format.",
        ),
    ] = "u32",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The packet file; one there is continued.")
    ] = None,
    subscribers: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT|unix:PATH", help="Where others get every packet.")
    ] = None,
    policy: Annotated[
        PolicyChoice, typer.Option(help="What happens to a subscriber that is too slow.")
    ] = PolicyChoice.wait,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate (PEM): serve TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only clients with a certificate from here.")
    ] = None,
    secret_file: SecretOption = None,
    fsync: Annotated[FsyncChoice, typer.Option(help="When to wait for the disk.")] = FsyncChoice.interval,
    max_packet: Annotated[int, typer.Option(metavar="BYTES", help="The largest packet.")] = 4 << 20,
    max_connections: Annotated[int, typer.Option(help="At once.")] = 10_000,
    max_memory: Annotated[int, typer.Option(metavar="BYTES", help="For packets that wait.")] = 256 << 20,
    idle: Annotated[float | None, typer.Option(metavar="SECONDS", help="Close what is silent for so long.")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take packets from the network into a packet file, or to subscribers, until Ctrl-C or SIGTERM.

    `offload send` is told when its lines are on the disk; all others send as they like.
    """
    import asyncio
    import functools

    from .net.limits import Limits
    from .net.server import PacketServer
    from .packets.framing import framer_factory

    if output is None and not subscribers:
        raise typer.BadParameter("the packets go nowhere: give --output or --subscribers")
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
        raise typer.BadParameter("TLS needs --tls-cert and --tls-key")
    limits = Limits(connections=max_connections, total_bytes=max_memory, idle=idle)
    with _usage():
        make = functools.partial(framer_factory(framing), max_packet=max_packet)
        secret = _secret(secret_file)

    async def run() -> tuple[Receiver | None, PacketServer]:
        from .net.auth import server_context
        from .net.fanout import Fanout

        tls = None if tls_cert is None or tls_key is None else server_context(tls_cert, tls_key, tls_client_ca)
        fanout = Fanout()
        async with contextlib.AsyncExitStack() as stack:
            receiver = None
            if output is not None:
                receiver = await _receiver(stack, output, framing, fsync, fanout)
            with _usage():
                server = PacketServer(
                    functools.partial(_take, receiver, fanout), framing=make, limits=limits, secret=secret
                )
                # One for the others too, so that they end last.
                others = PacketServer(
                    functools.partial(_give, fanout, policy.value),
                    framing=make,
                    limits=dataclasses.replace(limits, idle=None),
                    secret=secret,
                )
            stop = asyncio.Event()
            with _on_signals(stop.set):
                try:
                    for address in listen:
                        _tell(f"listening on {await _listen(server, address, tls)}", quiet=quiet)
                    for address in subscribers or ():
                        _tell(f"subscribers on {await _listen(others, address, tls)}", quiet=quiet)
                    await stop.wait()
                    _tell("ending", quiet=quiet)
                    await server.drain()
                    if receiver is not None:
                        await receiver.settled()
                    fanout.close()
                    await others.drain()
                finally:
                    await server.aclose()
                    await others.aclose()
        return receiver, server

    receiver, server = asyncio.run(run())
    summary: dict[str, Any] = dict(vars(server.stats))
    if receiver is not None:
        got = receiver.received
        summary |= {"packets": got.packets, "bytes": got.bytes, "batches": got.batches, "senders": sorted(got.senders)}
    if as_json:
        print(json.dumps(summary), flush=True)
    elif not quiet:
        _tell(", ".join(f"{key} {value}" for key, value in summary.items() if value), quiet=False)


def send(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders and globs, as for merge.", show_default=False)
    ],
    to: Annotated[str, typer.Option(metavar="HOST:PORT|unix:PATH", help="Where `offload serve` listens.")],
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who sends; sources are called NAME:PATH.", show_default="this host's name"),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C or SIGTERM.")
    ] = False,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt; the server must have a certificate we trust.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Trust this CA alone (implies --tls).")] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Our certificate, for who asks.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    secret_file: SecretOption = None,
    retry: Annotated[bool, typer.Option(help="Connect again when the connection breaks.")] = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send the lines of many files to `offload serve`, each exactly once, in order for each file.

    Nothing is kept here: where each file was read up to stands in the server's packet file. Started again, or connected
    again, it goes on there. It ends when everything is on the server's disk.
    """
    import asyncio

    with _usage():
        secret = _secret(secret_file)
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("a certificate needs its key: give --tls-cert and --tls-key")

    async def run() -> tuple[Progress, bool]:
        from .net.auth import client_context
        from .net.client import RefusedError, Send

        context: ssl.SSLContext | None = None
        if tls or tls_ca is not None or tls_cert is not None:
            context = client_context(tls_ca, tls_cert, tls_key)
        stop = asyncio.Event()
        pause, told = FIRST_PAUSE, ""
        with _on_signals(stop.set):
            while True:
                with _usage():
                    sending = Send(
                        paths, to, name=name or socket.gethostname(), follow=follow, tls=context, secret=secret
                    )
                try:
                    async with sending:
                        pause = FIRST_PAUSE
                        if told:
                            _tell(f"{to}: connected again", quiet=quiet)
                            told = ""
                        return await _until(stop, sending)
                except RefusedError:
                    raise
                except (BrokenResourceError, OSError) as exc:
                    if not retry or stop.is_set():
                        raise
                    if told != str(exc):
                        told = str(exc)
                        _tell(f"{to}: {told}; trying again", quiet=quiet)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await stop.wait()
                pause = min(2 * pause, LAST_PAUSE)

    progress, stopped = asyncio.run(run())
    problems = {path: exc.strerror or str(exc) for path, exc in sorted(progress.problems.items())}
    for path, reason in problems.items():
        _tell(f"{path}: {reason}", quiet=False)
    failed = [e for e in progress.problems.values() if not (follow and isinstance(e, FileNotFoundError))]
    complete = not failed and (follow or not stopped or progress.caught_up)
    if as_json:
        summary = {"lines": progress.lines, "bytes": progress.bytes, "sources": progress.sources, "complete": complete}
        print(json.dumps(summary), flush=True)
    else:
        _tell(f"{progress.lines:,} lines, {progress.bytes:,} bytes on the disk of {to}", quiet=quiet)
    if not complete:
        raise typer.Exit(1)


async def _until(stop: Any, sending: Any) -> tuple[Progress, bool]:
    import asyncio

    running = asyncio.ensure_future(sending.run())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            sending.stop()
        return await running, stop.is_set()
    finally:
        stopping.cancel()
        await asyncio.wait([stopping])


async def _receiver(
    stack: contextlib.AsyncExitStack, output: Path, framing: str, fsync: FsyncChoice, fanout: Fanout
) -> Receiver:
    from .files.packet_stream import PacketWriter
    from .net.receiver import Receiver

    writer = await stack.enter_async_context(PacketWriter(output, fsync=fsync.value))
    kind: Any = "lines" if framing == "lines" else "packets"
    return Receiver(
        writer, kind=kind, sends=framing == "u32", fanout=fanout, acknowledge_written=fsync is FsyncChoice.none
    )


async def _take(receiver: Receiver | None, fanout: Fanout, connection: Any) -> None:
    """The handler of those who send."""
    if receiver is not None:
        await receiver.handle(connection)
        return
    while batch := await connection.batch():
        await fanout.publish([packet.payload for packet in batch])


async def _give(fanout: Fanout, policy: Policy, connection: Any) -> None:
    """The handler of a subscriber."""
    import asyncio

    with fanout.subscribe(policy) as subscription:

        async def give() -> None:
            while packets := await subscription.batch():
                await connection.send_frames([part for p in packets for part in connection.framer.parts(p)])

        async def listen() -> None:
            while await connection.batch():
                pass  # what it says is nobody's business, but that it has gone is ours

        tasks = [asyncio.ensure_future(give()), asyncio.ensure_future(listen())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _listen(server: PacketServer, address: str, tls: ssl.SSLContext | None) -> str:
    with _usage():
        return await server.listen(address, tls=tls)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """What cannot be meant is wrong usage."""
    try:
        yield
    except OffloadError:
        raise
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None


def _secret(path: Path | None) -> bytes | None:
    from .net.auth import check_secret

    return None if path is None else check_secret(path.read_bytes().strip())


@contextlib.contextmanager
def _on_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` for the first Ctrl-C or SIGTERM; the second one ends the process."""
    import asyncio

    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    asked = 0.0

    def on_signal() -> None:
        nonlocal asked
        now = time.monotonic()
        if asked and now - asked > 1:  # sooner it is the same signal, once to us and once to our group
            os._exit(130)
        asked = asked or now
        stop()

    for number in numbers:
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels
            loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)


def _tell(message: str, *, quiet: bool) -> None:
    if not quiet:
        text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message)
        print(f"offload: {text}", file=sys.stderr, flush=True)
