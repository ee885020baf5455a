"""The site's port and addresses, and for the local network the certificate and the QR code to find it by."""

from __future__ import annotations

import contextlib
import datetime
import errno
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

from webapp.run import StartError
from webapp.run.data_dir import write_private


def check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As uvicorn does: a socket in TIME_WAIT is no matter
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise StartError(f"HOST is {host!r}: this machine has no such address.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = port + 1 if port < 65535 else port - 1
            raise StartError(
                f"Port {port} is in use by another program. Choose another: make run PORT={other}"
            ) from error
        if error.errno == errno.EACCES:
            raise StartError(
                f"Port {port} needs more rights than you have. Choose one above 1023: make run PORT=8000"
            ) from error
        raise StartError(f"HOST {host}, port {port} cannot be opened: {error.strerror}.") from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_addresses(host: str) -> list[str]:
    """The addresses under which others reach it, the likeliest first."""
    if host not in ("0.0.0.0", "::", ""):  # noqa: S104
        return [host]
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks the kernel which address would be the sender's
        found.append(str(probe.getsockname()[0]))
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")] or ["127.0.0.1"]


def ensure_certificate(folder: Path, names: Sequence[str], now: datetime.datetime) -> tuple[Path, Path]:
    """(certificate, key), self-signed for these names; kept until it expires or a name is new."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    certificate_path, key_path = folder / "certificate.pem", folder / "key.pem"
    wanted: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            wanted.append(x509.IPAddress(ipaddress.ip_address(name.strip("[]"))))
        except ValueError:
            wanted.append(x509.DNSName(name))
    if certificate_path.exists() and key_path.exists():
        there = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        covered = there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if there.not_valid_after_utc > now + datetime.timedelta(days=7) and set(wanted) <= set(covered):
            return certificate_path, key_path
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Fewshot Studio")])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=800))  # phones refuse more than 825
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(key_path, pem.decode())
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_path, key_path


def host_names() -> list[str]:
    name = socket.gethostname()
    return [name] if "." in name else [name, f"{name}.local"]


def in_url(name: str) -> str:
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def print_qr(address: str) -> None:
    import segno

    segno.make(address, error="l").terminal(compact=True)
