"""Who may call: one check that both fronts make before they look at a request."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.base.errors import UnauthenticatedError
from router.access.api_keys import ApiKeys

_HOW = "Send `authorization: Bearer KEY` with a key of the cluster."


class AccessGuard:
    """Asks for an API key, a client certificate, both or nothing.

    Args:
        keys: those that are accepted; None asks nobody for one.
        needs_certificate: whether a connection must have shown a client certificate. TLS itself has
            refused one that is not good; health checks may come without.
    """

    def __init__(self, keys: ApiKeys | None = None, *, needs_certificate: bool = False) -> None:
        self._keys = keys
        self._needs_certificate = needs_certificate

    def replace_keys(self, keys: ApiKeys) -> None:
        """Accept these from now on; what runs already goes on."""
        self._keys = keys

    def check(self, authorization: Sequence[bytes], *, has_certificate: bool) -> None:
        """Let a request pass.

        Args:
            authorization: the values of all its `authorization` headers.
            has_certificate: whether its connection has shown a client certificate.

        Raises:
            UnauthenticatedError: it may not.
        """
        if self._needs_certificate and not has_certificate:
            raise UnauthenticatedError(
                "The connection shows no client certificate.",
                "Connect with one of an authority that the cluster trusts.",
            )
        if self._keys is None:
            return
        if not authorization:
            raise UnauthenticatedError("The request has no API key.", _HOW)
        scheme, _, key = authorization[0].partition(b" ")
        if len(authorization) > 1 or scheme.lower() != b"bearer":
            raise UnauthenticatedError("The authorization header is not one bearer key.", _HOW)
        if not self._keys.accept(key.strip(b" ")):
            raise UnauthenticatedError("The API key is not known here.", _HOW)


OPEN = AccessGuard()
"""Lets everybody pass."""
