"""Channel options of both clients."""

from __future__ import annotations


def channel_options() -> list[tuple[str, int]]:
    """Keepalive that finds a dead gateway; answers of any size (a long prompt's logprobs)."""
    return [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Each client its own connection: a process may open several to spread over gateways.
        ("grpc.use_local_subchannel_pool", 1),
    ]
