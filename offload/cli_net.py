"""The commands `offload serve` and `offload send`. What they need is imported when they run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .errors import BrokenResourceError, OffloadError, PacketError

if TYPE_CHECKING:
    import asyncio
    import ssl

    from .merge.engine import Progress
    from .net.connection import Connection
    from .net.fanout import Fanout
    from .net.receiver import Receiver
    from .net.server import PacketServer

R = TypeVar("R")

CLOSINGS = 10
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0  # seconds before `send` connects again: twice as long each time


class FsyncChoice(StrEnum):
    none = "none"
    interval = "interval"
    always = "always"


class OnErrorChoice(StrEnum):
    close = "close"
    skip = "skip"
    resync = "resync"


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
    on_error: Annotated[
        OnErrorChoice,
        typer.Option(
            help="What a packet that is too large or has a wrong digest does: its connection is closed, or the packet "
            "skipped as far as its size can be believed; resync looks for the next mark too."
        ),
    ] = OnErrorChoice.close,
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

    from .net.auth import server_context
    from .net.fanout import Fanout
    from .net.limits import Limits
    from .net.receiver import BATCH_BYTES
    from .net.server import PacketServer
    from .packets.framing import framer_factory
    from .verify import Verifier

    if output is None and not subscribers:
        raise typer.BadParameter("the packets go nowhere: give --output or --subscribers")
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
        raise typer.BadParameter("TLS needs --tls-cert and --tls-key")
    with _usage():
        limits = Limits(connections=max_connections, total_bytes=max_memory, idle=idle)
        make = functools.partial(framer_factory(framing), max_packet=max_packet, on_error=on_error.value)
        out = framer_factory(framing)(max_packet=max(max_packet, BATCH_BYTES))
        digest = make().digest
        secret = _secret(secret_file)

    async def run() -> tuple[Receiver | None, PacketServer]:
        tls = None
        if tls_cert is not None and tls_key is not None:
            with _about(tls_client_ca or tls_cert):
                tls = server_context(tls_cert, tls_key, tls_client_ca)
        fanout = Fanout(out)

        async def take(connection: Connection) -> None:
            while batch := await connection.batch():
                await fanout.forward(batch)

        async with contextlib.AsyncExitStack() as stack:
            receiver = None
            if output is not None:
                receiver = await _receiver(stack, output, framing, fsync, fanout)
            handle = receiver.handle if receiver else take
            verifier = await stack.enter_async_context(Verifier(digest)) if digest is not None else None
            server = PacketServer(handle, framing=make, limits=limits, secret=secret, verifier=verifier)
            # One for the subscribers too, so that they end last.
            give = functools.partial(fanout.give, policy=policy.value)
            unlimited = dataclasses.replace(limits, idle=None)
            others = PacketServer(give, framing=make, limits=unlimited, secret=secret)
            stop = asyncio.Event()
            with _on_signals(stop.set), _closings(quiet=quiet):
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
    else:
        names = summary.pop("senders", ())
        told = [f"{key} {value}" for key, value in summary.items() if value]
        _tell(", ".join(told + [f"sender {name}" for name in names]) or "nothing came", quiet=quiet)


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
            with _about(tls_cert or tls_ca or to):
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
                    with _about(to):
                        if await _until(stop, sending.start()) is None:
                            return sending.progress, False
                    try:
                        pause = FIRST_PAUSE
                        if told:
                            _tell(f"{to}: connected again", quiet=quiet)
                            told = ""
                        await _until(stop, sending.run(), sending.stop)
                        return sending.progress, follow or not stop.is_set() or sending.progress.caught_up
                    finally:
                        with contextlib.suppress(OffloadError):  # `run` has told
                            await sending.aclose()
                except RefusedError as exc:
                    raise BrokenResourceError(f"{to}: {exc}") from None
                except (BrokenResourceError, OSError) as exc:
                    if not retry:
                        raise exc if isinstance(exc, OSError) else BrokenResourceError(f"{to}: {exc}") from None
                    if stop.is_set():
                        return sending.progress, False
                    if told != (told := getattr(exc, "strerror", None) or str(exc)):
                        _tell(f"{to}: {told}; trying again", quiet=quiet)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await stop.wait()
                if stop.is_set():
                    return sending.progress, False
                pause = min(2 * pause, LAST_PAUSE)

    progress, complete = asyncio.run(run())
    problems = {path: exc.strerror or str(exc) for path, exc in sorted(progress.problems.items())}
    for path, reason in problems.items():
        _tell(f"{path}: {reason}", quiet=False)
    failed = [e for e in progress.problems.values() if not (follow and isinstance(e, FileNotFoundError))]
    if not complete:
        _tell("ended before everything was sent; start it again to go on", quiet=False)
    complete = complete and not failed
    if as_json:
        summary = {"lines": progress.lines, "bytes": progress.bytes, "sources": progress.sources, "complete": complete}
        print(json.dumps(summary), flush=True)
    else:
        _tell(f"{progress.lines:,} lines, {progress.bytes:,} bytes on the disk of {to}", quiet=quiet)
    if not complete:
        raise typer.Exit(1)


async def _until(stop: asyncio.Event, work: Awaitable[R], end: Callable[[], object] | None = None) -> R | None:
    """What `work` gives; when `stop` is set it is ended by `end`, or cancelled: None."""
    import asyncio

    running = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            if end is None:
                running.cancel()
                await asyncio.wait([running])
                return None
            end()
        return await running
    finally:
        stopping.cancel()
        await asyncio.wait([stopping])


async def _receiver(
    stack: contextlib.AsyncExitStack, output: Path, framing: str, fsync: FsyncChoice, fanout: Fanout
) -> Receiver:
    from .files.packet_stream import PacketWriter
    from .net.receiver import Receiver

    try:
        writer = await stack.enter_async_context(PacketWriter(output, fsync=fsync.value))
    except PacketError as exc:
        _tell(f"{output}: no packet file, or a damaged one: {exc}; it was not touched", quiet=False)
        raise typer.Exit(3) from None
    kind: Any = "lines" if framing == "lines" else "packets"
    return Receiver(
        writer, kind=kind, sends=framing == "u32", fanout=fanout, acknowledge_written=fsync is FsyncChoice.none
    )


async def _listen(server: PacketServer, address: str, tls: ssl.SSLContext | None) -> str:
    with _usage(), _about(address):
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


@contextlib.contextmanager
def _about(what: str | Path) -> Iterator[None]:
    """An OSError names what it is about, in the system's words."""
    try:
        yield
    except OSError as exc:
        import ssl

        if isinstance(exc, ssl.SSLError):
            reason = getattr(exc, "verify_message", "") or (exc.reason or "no certificate and key of PEM that match")
            exc.strerror = f"TLS: {reason.replace('_', ' ').lower()}"
        elif exc.errno and not isinstance(exc, socket.gaierror):
            exc.strerror = os.strerror(exc.errno)
        else:
            exc.strerror = exc.strerror or str(exc) or "the connection was closed"
        exc.filename = exc.filename or str(what)
        raise


@contextlib.contextmanager
def _closings(*, quiet: bool) -> Iterator[None]:
    """Tell why connections were closed, at most CLOSINGS a second: a flood of them must not become one of messages."""
    times: deque[float] = deque(maxlen=CLOSINGS)

    class Tell(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if len(times) == CLOSINGS and record.created - times[0] < 1:
                return
            times.append(record.created)
            _tell(self.format(record), quiet=quiet and record.levelno < logging.WARNING)

    handler, log = Tell(), logging.getLogger("offload")
    before = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


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
