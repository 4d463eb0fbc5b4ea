"""Who may connect: TLS contexts, and an HMAC challenge for both sides of a shared secret.

The challenge is three packets of ASCII, so every framing carries it:

    server ─► client   offload-challenge S         S, C: 32 random bytes each, in hex
    client ─► server   offload-response C HMAC("client" S C)
    server ─► client   offload-welcome HMAC("server" S C), or offload-refused

HMAC is HMAC-SHA-256 (RFC 2104, RFC 6234) with the secret as the key, over the role and both nonces; the roles differ,
so that neither side's answer serves as the other's. Until then no packet is taken in or given out. It proves who is
there at the beginning and nothing about later bytes: on a wire that others may change, use TLS too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import ssl

from ..errors import BrokenResourceError
from .connection import Connection

MIN_SECRET_BYTES = 16
_REFUSED = b"offload-refused"  # said, or who asked would take it for a connection that broke, and try again
_HELLO_BYTES = 256  # no packet of the challenge is longer


def server_context(
    certificate: str | os.PathLike[str], key: str | os.PathLike[str], client_ca: str | os.PathLike[str] | None = None
) -> ssl.SSLContext:
    """TLS 1.2 or newer with this certificate; with `client_ca` only for clients with a certificate from there.

    Raises:
        OSError: a file cannot be read, or is no certificate or key (ssl.SSLError).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context


def client_context(
    ca: str | os.PathLike[str] | None = None,
    certificate: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
) -> ssl.SSLContext:
    """TLS that checks the server, by `ca` or by what the system trusts; with a certificate of one's own if given.

    Raises:
        OSError: as `server_context`.
    """
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def check_secret(secret: bytes) -> bytes:
    """Raises ValueError: it is too short to be one."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"secret is {len(secret)} bytes, expected at least {MIN_SECRET_BYTES}")
    return secret


class SecretError(BrokenResourceError):
    """The other side does not know the secret, or asks for none: trying again would not help."""


async def challenge(connection: Connection, secret: bytes) -> None:
    """Let a client in if it knows the secret.

    Raises:
        SecretError: it does not; it was told.
        BrokenResourceError: the connection ended, or nothing came within `Limits.handshake`.
    """
    own = secrets.token_hex(32).encode()
    limit, connection.framer.max_packet = connection.framer.max_packet, _HELLO_BYTES
    await connection.send(b"offload-challenge " + own)
    try:
        word, nonce, answer = await _words(connection, 3)
        if word != b"offload-response" or not hmac.compare_digest(answer, _answer(secret, b"client", own, nonce)):
            raise SecretError(f"{connection.peer} does not know the secret")
    except SecretError:
        await connection.send(_REFUSED)
        raise
    connection.framer.max_packet = limit
    await connection.send(b"offload-welcome " + _answer(secret, b"server", own, nonce))


async def respond(connection: Connection, secret: bytes) -> None:
    """Answer a server's challenge, and see that it knows the secret too.

    Raises:
        SecretError: it does not, or does not ask, or says that we do not.
        BrokenResourceError: the connection ended, or nothing came within `Limits.handshake`.
    """
    word, nonce = await _words(connection, 2)
    if word != b"offload-challenge":
        raise SecretError(f"{connection.peer} asks for no secret; leave ours out, or check the address")
    own = secrets.token_hex(32).encode()
    await connection.send(b"offload-response " + own + b" " + _answer(secret, b"client", nonce, own))
    word, answer = await _words(connection, 2)
    if word != b"offload-welcome" or not hmac.compare_digest(answer, _answer(secret, b"server", nonce, own)):
        raise SecretError(f"{connection.peer} does not know the secret")


async def _words(connection: Connection, count: int) -> list[bytes]:
    try:
        async with asyncio.timeout(connection.limits.handshake):
            packet = await connection.packet()
    except TimeoutError:
        raise BrokenResourceError(f"{connection.peer} has not answered for {connection.limits.handshake} s") from None
    if packet is None:
        raise BrokenResourceError(f"{connection.peer} has ended the connection before both had shown the secret")
    words = packet.payload[:_HELLO_BYTES].split(b" ")
    if len(words) != count:
        raise SecretError(f"{connection.peer} does not know the secret")
    return words


def _answer(secret: bytes, role: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.new(secret, b"%s %s %s" % (role, server, client), hashlib.sha256).hexdigest().encode()
