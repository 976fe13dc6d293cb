"""The gateway's keys and certificates, looked at before anything starts.

What a gateway would refuse at its start is refused here with its line; what it would take but the
user should know is a warning.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from cluster.base.errors import ConfigError
from cluster.base.front_plan import TlsPlan
from cluster.base.load import ClusterFile, pinned_to_lines
from cluster.planner.front import plan_access
from router.access.api_keys import PARAM as KEYS_PARAM
from router.access.api_keys import exposure, read_keys
from router.access.tls import GatewayTls

_SOON = datetime.timedelta(days=14)


def check_front_files(file: ClusterFile) -> list[str]:
    """Read what `gateway.api_keys_file` and `gateway.tls` name; returns warnings.

    Raises:
        ClusterFileError: a gateway could not use it.
    """
    keys_file, tls = plan_access(file.spec.gateway, file.directory)
    with pinned_to_lines(file):
        return [
            *(_key_warnings(keys_file) if keys_file is not None else ()),
            *(_tls_warnings(tls) if tls is not None else ()),
        ]


def certificate_name(plan: TlsPlan) -> str:
    """The first name or address that the gateway's certificate is for; empty if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    certificate, *_ = _certificates(plan.certificate)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    found = [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]
    return found[0] if found else ""


def _key_warnings(file: str) -> Iterator[str]:
    if not read_keys(file):
        raise ConfigError(
            f"{file} has no keys, so nobody could call.",
            "Add one, for instance from `openssl rand -hex 32`; or delete gateway.api_keys_file.",
            param=KEYS_PARAM,
        )
    if who := exposure(file):
        yield f"{KEYS_PARAM}: {file}: {who}; `chmod 600` it."


def _tls_warnings(plan: TlsPlan) -> Iterator[str]:
    certificate, *_ = _certificates(plan.certificate)
    GatewayTls(plan)
    now = datetime.datetime.now(datetime.UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    label = f"gateway.tls.certificate: {plan.certificate}"
    if end <= now:
        yield f"{label} expired on {end:%Y-%m-%d}; clients refuse it."
    elif begin > now:
        yield f"{label} is not valid before {begin:%Y-%m-%d %H:%M} UTC; clients refuse it."
    elif end - now < _SOON:
        yield f"{label} expires on {end:%Y-%m-%d}."
    if not certificate_name(plan):
        yield f"{label} has no subject alternative name, so it is for no host; clients refuse it."
    if who := exposure(plan.key):
        yield f"gateway.tls.key: {plan.key}: {who}; `chmod 600` it."


def _certificates(file: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(Path(file).read_bytes())
    except OSError as error:
        cause, remedy = f"{file} cannot be read: {error.strerror}.", "Check the path."
    except ValueError:
        cause = f"{file} holds no certificate in PEM form."
        remedy = "Convert it with `openssl x509 -inform DER -in FILE -out NEW`."
    raise ConfigError(cause, remedy, param="gateway.tls.certificate")
