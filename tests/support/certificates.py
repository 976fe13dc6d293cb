"""Authorities and certificates made for a test, as PEM files."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.base.front_plan import TlsPlan

DAY = datetime.timedelta(days=1)
LOOPBACK = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


@dataclass(frozen=True)
class Pair:
    """Files of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates of servers and clients."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        extension = x509.BasicConstraints(ca=True, path_length=None)
        built = _builder(self._name, self._name, self._key, 0, 365).add_extension(extension, True)
        self.certificate = folder / f"{name.replace(' ', '-')}.pem"
        self.certificate.write_bytes(_pem(built.sign(self._key, hashes.SHA256())))

    def issue(
        self, name: str, *, names=LOOPBACK, begins: int = -1, ends: int = 365, password: bytes = b""
    ) -> Pair:
        """A certificate that is valid between two days, counted from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        built = _builder(_name(name), self._name, key, begins, ends)
        if names:
            built = built.add_extension(x509.SubjectAlternativeName(names), False)
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(_pem(built.sign(self._key, hashes.SHA256())))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password)
                if password
                else serialization.NoEncryption(),
            )
        )
        pair.key.chmod(0o600)
        return pair


def tls_plan(pair: Pair, client_ca: Path | None = None) -> TlsPlan:
    """The files of a gateway."""
    return TlsPlan(
        certificate=str(pair.certificate),
        key=str(pair.key),
        client_ca=None if client_ca is None else str(client_ca),
    )


def _builder(subject, issuer, key, begins: int, ends: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins * DAY - DAY / 24)
        .not_valid_after(now + ends * DAY)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
