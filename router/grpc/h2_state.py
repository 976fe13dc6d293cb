"""A server's h2 state machine for one connection, with what a client is promised in it."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings

from router.grpc.header_block import LiteralEncoder
from router.grpc.peer_conduct import ConnectionLimits

_CONFIG = H2Configuration(
    client_side=False,
    header_encoding=None,
    # Our own headers are well-formed by construction.
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
)


def new_h2(limits: ConnectionLimits) -> H2Connection:
    """The state machine before its first byte; `greet` makes that."""
    h2 = H2Connection(config=_CONFIG)
    h2.encoder = LiteralEncoder()
    h2.local_settings = Settings(
        client=False,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: limits.max_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_metadata_bytes,
            SettingCodes.INITIAL_WINDOW_SIZE: limits.receive_window_bytes,
        },
    )
    bound_headers(h2, limits)
    return h2


def greet(h2: H2Connection, limits: ConnectionLimits) -> None:
    """Announce the settings and the window of the whole connection."""
    h2.initiate_connection()
    h2.increment_flow_control_window(limits.receive_window_bytes)


def bound_headers(h2: H2Connection, limits: ConnectionLimits) -> None:
    """Set the size of headers at which the connection ends.

    h2 takes the announced size for it, above which we only refuse the call, whenever the client
    acknowledges settings.
    """
    h2.decoder.max_header_list_size = limits.hard_metadata_bytes
