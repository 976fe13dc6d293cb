"""Server-side TLS of both fronts: one context for each, since they agree on other protocols.

A client certificate is asked for, not required, by TLS: requests without one are refused by the
guard, which lets health checks pass and says why. Only contexts are made here: `tls_listener.py`
takes connections through the handshake.
"""

from __future__ import annotations

import ssl
from typing import NoReturn

from cluster.base.errors import ConfigError
from cluster.base.front_plan import TlsPlan


class GatewayTls:
    """The contexts, made of one set of files; new connections take those of the moment.

    Raises:
        ConfigError: the files cannot be read or do not belong together.
    """

    def __init__(self, plan: TlsPlan) -> None:
        self._plan = plan
        self.reload()

    def reload(self) -> None:
        """Take the files as they are now; connections that are open keep what they have.

        New contexts, not new files in the old ones: a handshake may be using those in another
        thread, and a context that is given a certificate without its key forgets the key it had.

        Raises:
            ConfigError: as the constructor; nothing has changed then.
        """
        self._grpc, self._http = _context(self._plan, "h2"), _context(self._plan, "http/1.1")

    def grpc(self) -> ssl.SSLContext:
        """Of the gRPC front."""
        return self._grpc

    def http(self) -> ssl.SSLContext:
        """Of the HTTP front."""
        return self._http


def _context(plan: TlsPlan, protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols([protocol])
    _load_pair(context, plan)
    if plan.client_ca is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(plan.client_ca)
        except OSError as error:  # ssl.SSLError is one
            _refuse(plan.client_ca, error, "gateway.tls.client_ca")
    return context


def _load_pair(context: ssl.SSLContext, plan: TlsPlan) -> None:
    for file, key in ((plan.certificate, "certificate"), (plan.key, "key")):
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            _refuse(file, error, f"gateway.tls.{key}")
    try:
        context.load_cert_chain(plan.certificate, plan.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"{plan.key} is not the key of {plan.certificate}.",
                "Name the key that the certificate was made for.",
                param="gateway.tls.key",
            ) from None
        _refuse(f"{plan.certificate} or {plan.key}", error, "gateway.tls.certificate")


def _no_password() -> NoReturn:
    raise ConfigError(
        "The private key is encrypted, and nobody is there to give a password.",
        "Decrypt it (`openssl pkey -in KEY -out FILE`) and let only its owner read it.",
        param="gateway.tls.key",
    )


def _refuse(file: str, error: OSError, param: str) -> NoReturn:
    if isinstance(error, ssl.SSLError):
        why, remedy = "is not in PEM form", "Convert it with `openssl x509` or `openssl pkey`."
    else:
        why, remedy = f"cannot be read: {error.strerror}", "Check the path and who may read it."
    raise ConfigError(f"{file} {why}.", remedy, param=param) from None
