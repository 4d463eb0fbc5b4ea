"""Connections to servers: `connect`, and what an address is."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..packets.framer import Framer
from .auth import respond
from .connection import Connection
from .limits import Limits


@contextlib.asynccontextmanager
async def connect(
    address: str,
    framing: Callable[..., Framer],
    *,
    tls: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
    secret: bytes | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> AsyncIterator[Connection]:
    """A connection to a server, as `async with`; closed behind the block.

    Args:
        address: HOST:PORT or unix:PATH.
        framing: makes the framer, for example `PrefixFramer`; `options` are for it.
        tls: encrypt, and check the server, as this context says.
        secret: what the server asks for, and must know too.

    Raises:
        OSError: there is no way to it, or the TLS handshake failed.
        BrokenResourceError: it does not know the secret, or does not ask for one.
        ValueError: no address.
    """
    loop = asyncio.get_running_loop()

    def made() -> Connection:
        return Connection(framing(**options), limits=limits)

    place = parse_address(address)
    extra: dict[str, Any] = {}
    if tls is not None:
        host = "localhost" if isinstance(place, str) else place[0]
        timeout = (limits or Limits()).handshake
        extra = {"ssl": tls, "server_hostname": server_hostname or host, "ssl_handshake_timeout": timeout}
    if isinstance(place, str):
        _, connection = await loop.create_unix_connection(made, place, **extra)
    else:
        _, connection = await loop.create_connection(made, *place, **extra)
    try:
        if secret is not None:
            await respond(connection, secret)
        yield connection
    finally:
        connection.give_back()
        await connection.aclose()


def parse_address(text: str) -> str | tuple[str, int]:
    """The path of `unix:PATH`, or host and port of `HOST:PORT`, `[::1]:PORT`, `:PORT`.

    Raises:
        ValueError: neither.
    """
    if text.startswith("unix:"):
        if not text[5:]:
            raise ValueError(f"address is {text!r}, expected unix:PATH")
        if not hasattr(socket, "AF_UNIX"):
            raise ValueError(f"address is {text!r}, and this system has no Unix sockets")
        return text[5:]
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"address is {text!r}, expected HOST:PORT or unix:PATH")
    return host.removeprefix("[").removesuffix("]"), int(port)
