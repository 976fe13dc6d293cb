"""How both clients connect: channel options, TLS, the API key."""

from __future__ import annotations

from pathlib import Path

import grpc

from cluster.base.errors import ConfigError


def channel_options(server_name: str | None = None) -> list[tuple[str, int | str]]:
    """Keepalive that finds a dead gateway; answers of any size (a long prompt's logprobs).

    `server_name`: the name to look for in the gateway's certificate, if not that of the target.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Each client its own connection: a process may open several to spread over gateways.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def tls_credentials(
    ca_cert: str | Path | None = None,
    *,
    client_cert: str | Path | None = None,
    client_key: str | Path | None = None,
) -> grpc.ChannelCredentials:
    """TLS for a client, from PEM files.

    Args:
        ca_cert: authorities that the gateway's certificate may be of, or itself if it is its own;
            None: those of the system.
        client_cert: the client's own certificate, for a gateway that asks for one.
        client_key: its private key.

    Raises:
        ConfigError: a file cannot be read, or one of the client's two is missing.
    """
    if (client_cert is None) != (client_key is None):
        raise ConfigError(
            "A client certificate and its key belong together; one of them is not given.",
            "Give both, or none.",
        )
    return grpc.ssl_channel_credentials(_read(ca_cert), _read(client_key), _read(client_cert))


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What a call carries so that the gateway lets it pass.

    Raises:
        ConfigError: the key cannot be sent; says nothing of it.
    """
    if api_key is None:
        return ()
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigError(
            "The API key is empty or has characters that no header can carry.",
            "Keys are printable ASCII without blanks; look for a line break at its end.",
            param="api_key",
        )
    return (("authorization", f"Bearer {api_key}"),)


def _read(file: str | Path | None) -> bytes | None:
    try:
        return None if file is None else Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.", "Check the path.") from None
