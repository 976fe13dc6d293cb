"""What gRPC puts into HTTP/2: message prefixes, timeouts, status text, binary metadata. Pure.

After https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections.abc import Iterator

import grpc

_PREFIX = struct.Struct(">BI")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])\Z")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_INFLATERS = {b"gzip": 31, b"deflate": 15}
"""Window bits of zlib by message encoding."""

ACCEPTED_ENCODINGS = b"identity,deflate,gzip"

Header = tuple[bytes, bytes]


class CallError(Exception):
    """Ends a call with a status that is not the handler's own."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def prefixed(message: bytes) -> bytes:
    """An uncompressed message as it goes into DATA frames."""
    return _PREFIX.pack(0, len(message)) + message


class MessageReader:
    """Cuts a call's DATA into messages, none longer than `limit` bytes, packed or not."""

    def __init__(self, limit: int, encoding: bytes) -> None:
        """`encoding` is the call's `grpc-encoding`, empty if it has none."""
        self.limit = limit
        self._encoding = encoding
        self._unread = bytearray()

    @property
    def is_within_message(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._unread)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add what arrived; the messages that are whole now.

        Raises:
            CallError: a message is too long, or packed in a way that is not known.
        """
        self._unread += data
        while len(self._unread) >= _PREFIX.size:
            packed, length = _PREFIX.unpack_from(self._unread)
            if length > self.limit:
                raise self._too_long(length)
            end = _PREFIX.size + length
            if len(self._unread) < end:
                return
            message = bytes(self._unread[_PREFIX.size : end])
            del self._unread[:end]
            yield self._unpacked(message) if packed else message

    def _unpacked(self, message: bytes) -> bytes:
        window_bits = _INFLATERS.get(self._encoding)
        if window_bits is None:
            raise CallError(grpc.StatusCode.INTERNAL, "The message's encoding was not announced.")
        inflater = zlib.decompressobj(window_bits)
        try:
            data = inflater.decompress(message, self.limit + 1)
        except zlib.error:
            raise CallError(grpc.StatusCode.INTERNAL, "The message cannot be unpacked.") from None
        if len(data) > self.limit:
            raise self._too_long(len(data))
        if not inflater.eof:
            raise CallError(grpc.StatusCode.INTERNAL, "The packed message is cut off.")
        return data

    def _too_long(self, length: int) -> CallError:
        return CallError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"The message has {length} bytes or more; the limit is {self.limit}.",
        )


def check_encoding(encoding: bytes) -> None:
    """Raise CallError for a message encoding that is not known here."""
    if encoding and encoding != b"identity" and encoding not in _INFLATERS:
        raise CallError(grpc.StatusCode.UNIMPLEMENTED, "This message encoding is not known here.")


def timeout_s(value: bytes) -> float:
    """Seconds of a `grpc-timeout`.

    Raises:
        CallError: it is none.
    """
    match = _TIMEOUT.match(value)
    if match is None:
        raise CallError(grpc.StatusCode.INTERNAL, "The grpc-timeout is malformed.")
    return int(match[1]) * _UNIT_S[match[2]]


def status_headers(code: grpc.StatusCode, text: str) -> list[Header]:
    """The trailers of an ending."""
    headers = [(b"grpc-status", b"%d" % code.value[0])]
    if text:
        headers.append((b"grpc-message", _percent_encoded(text)))
    return headers


def metadata_headers(metadata: tuple[tuple[str, str | bytes], ...]) -> list[Header]:
    """Custom metadata; values of keys in `-bin` may be any bytes."""
    return [
        (key.encode(), base64.b64encode(_as_bytes(value)).rstrip(b"="))
        if key.endswith("-bin")
        else (key.encode(), _as_bytes(value))
        for key, value in metadata
    ]


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _percent_encoded(text: str) -> bytes:
    return b"".join(
        b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in text.encode()
    )
