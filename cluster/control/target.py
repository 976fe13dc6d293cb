"""Which gateway a command talks to, how it shows who it is, and which model it means."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.base.errors import ConfigError
from cluster.control import run_state
from cluster.control.run_state import RunState
from router.access.api_keys import read_keys
from router.client import PenstockClient, tls_credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What the user says of it."""

    address: str | None = None
    """host:port; None: of a cluster on this machine."""
    cluster: str | None = None
    api_key: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_cert: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    @property
    def wants_tls(self) -> bool:
        """Whether the user says how to speak TLS."""
        return self.tls or self.ca_cert is not None


def open_client(wish: Connection, api_key: str | None = None) -> PenstockClient:
    """A client as the user wants it.

    A cluster of this machine is on record with its certificate and the file of its keys. That very
    certificate is trusted, and a key is taken from the file where the user may read it.

    Args:
        api_key: where `wish` has none.

    Raises:
        ConfigError: no address given and not exactly one matching cluster runs here; or files that
            cannot be read.
    """
    key = wish.api_key or api_key
    if wish.address is not None:
        return PenstockClient(wish.address, api_key=key, credentials=_credentials(wish))
    state = run_state.only(wish.cluster)
    is_pinned = bool(state.certificate) and not wish.wants_tls
    return PenstockClient(
        state.grpc,
        api_key=key or _own_key(state),
        credentials=_credentials(wish, Path(state.certificate) if is_pinned else None),
        server_name=state.server_name if is_pinned and state.server_name else None,
    )


def model_name(client: PenstockClient, model: str | None, deadline_s: float) -> str:
    """The given model, or the only one that is served.

    Raises:
        ConfigError: none was given and several are served.
    """
    if model is not None:
        return model
    served = [info.name for info in client.models(deadline_s=deadline_s)]
    if len(served) != 1:
        raise ConfigError(
            f"The cluster serves {len(served)} models: {', '.join(served)}.",
            "Say which with --model NAME.",
        )
    return served[0]


def _credentials(wish: Connection, pinned: Path | None = None) -> grpc.ChannelCredentials | None:
    ca_cert = wish.ca_cert or pinned
    if not wish.wants_tls and pinned is None:
        if wish.client_cert is None and wish.client_key is None:
            return None
        raise ConfigError(
            "A client certificate is only shown over TLS.", "Add --tls or --ca-cert FILE."
        )
    return tls_credentials(ca_cert, client_cert=wish.client_cert, client_key=wish.client_key)


def _own_key(state: RunState) -> str | None:
    """A key of a cluster on record; None where there is none that this user may read."""
    try:
        keys = read_keys(state.api_keys_file) if state.api_keys_file else ()
    except ConfigError:
        return None
    return keys[0].key if keys else None
