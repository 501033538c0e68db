"""Signed bundles: who made this one? Ed25519 over the manifest's digest, which names all of it.

Hashes find accidents. Whoever can write a bundle can compute them anew; a signature only who has
the key can. It lies in the bundle as ``signature.json`` and is no file of the manifest, so that a
bundle can be signed after it was checked, by somebody else, on another machine.

Source: RFC 8032 (Ed25519), by the package ``cryptography``; keys as PKCS 8 and SubjectPublicKeyInfo
in PEM (RFC 8410), as OpenSSL and OpenSSH write them, or in an X.509 certificate.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engineworks.runtime import files
from engineworks.runtime.bundle import SIGNATURE_NAME, Bundle
from engineworks.runtime.errors import BackendError, BundleError, InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_CONTEXT = b"engineworks-bundle-signature-v1\0"  # a signature of something else is none of a bundle
_MAX_BYTES = 1 << 16  # of a key or signature

_Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=100)]


class Signature(BaseModel):
    """What ``signature.json`` holds.

    Attributes:
        public_key: 32 bytes in Base64, to name the signer; it proves nothing.
        signature: 64 bytes in Base64, of the digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    algorithm: Literal["ed25519"]
    public_key: _Base64
    signature: _Base64


def make_keys(private: Path, public: Path) -> None:
    """Write a new pair of keys as PEM; the private one is readable by its owner alone.

    Raises:
        BackendError: ``cryptography`` is not installed.
        InputError: one of the files is there already.
    """
    _need()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if found := [path for path in (private, public) if path.exists()]:
        raise InputError(f"{found[0]} exists", fix="choose another name: a key is never replaced")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    private.touch(mode=0o600, exist_ok=False)
    private.write_bytes(secret)
    open_key = key.public_key()
    files.write(
        public, open_key.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )


def sign(bundle: Bundle, key: Path, *, password: Callable[[], str] | None = None) -> None:
    """Sign a verified bundle; a signature that it had is replaced.

    Args:
        key: private, PEM or OpenSSH.
        password: asked where the key is encrypted.

    Raises:
        BackendError: ``cryptography`` is not installed.
        InputError: no private Ed25519 key.
    """
    _need()
    secret = _private(key, password)
    made = Signature(
        algorithm="ed25519",
        public_key=_text(secret.public_key().public_bytes_raw()),
        signature=_text(secret.sign(_message(bundle))),
    )
    files.write(
        bundle.root / SIGNATURE_NAME, json.dumps(made.model_dump(mode="json"), indent=2) + "\n"
    )


def check_signature(bundle: Bundle, keys: Sequence[Path]) -> str:
    """Refuse a bundle that none of the keys has signed as it is.

    Args:
        keys: public, PEM or OpenSSH, or a certificate, whose validity is not looked at.

    Returns:
        The signer's public key, in Base64.

    Raises:
        BackendError: ``cryptography`` is not installed.
        InputError: a file that holds no public Ed25519 key.
        BundleError: no signature, or none of these keys.
    """
    _need()
    from cryptography.exceptions import InvalidSignature

    trusted = [_public(key) for key in keys]
    found = _read(bundle)
    for key in trusted:
        try:
            key.verify(base64.b64decode(found.signature), _message(bundle))
        except InvalidSignature:
            continue
        return _text(key.public_bytes_raw())
    raise BundleError(
        f"bundle {bundle.root} is not signed by {' or '.join(map(str, keys))}: it was changed "
        f"since, or signed by another key ({found.public_key})",
        fix="get it from its maker again; after `bundle set-threshold` it has to be signed again",
    )


def _read(bundle: Bundle) -> Signature:
    path = bundle.root / SIGNATURE_NAME
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_BYTES:
            raise BundleError(f"{path} is no signature")
        return Signature.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(
            f"bundle {bundle.root} is not signed",
            fix="sign it: cli.py bundle sign BUNDLE --key KEY",
        ) from error
    except ValidationError as error:
        raise BundleError(f"{path} is no signature", fix="sign the bundle again") from error


def _message(bundle: Bundle) -> bytes:
    return _CONTEXT + bundle.manifest.digest.encode()


def _private(path: Path, password: Callable[[], str] | None) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
        load_ssh_private_key,
    )

    data = _content(path)
    load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data else load_pem_private_key
    try:
        try:
            key = load(data, None)
        except TypeError:  # it is encrypted
            if password is None:
                raise
            key = load(data, password().encode())
    except Exception as error:  # what it is written in raises a dozen kinds
        raise InputError(f"{path} holds no private key that can be read: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} is no Ed25519 key", fix="make one: cli.py bundle keygen KEY")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        load_pem_public_key,
        load_ssh_public_key,
    )
    from cryptography.x509 import load_pem_x509_certificate

    data = _content(path)
    try:
        if b"BEGIN CERTIFICATE" in data:
            key: object = load_pem_x509_certificate(data).public_key()
        elif data.startswith(b"ssh-"):
            key = load_ssh_public_key(data)
        else:
            key = load_pem_public_key(data)
    except Exception as error:  # as above
        raise InputError(
            f"{path} holds no public key: {error}", fix="give the file KEY.pub, not the private key"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} is no Ed25519 key", fix="make one: cli.py bundle keygen KEY")
    return key


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _need() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise BackendError(
            "signatures need the package 'cryptography', which is not installed",
            fix='pip install "engineworks[sign]"',
        ) from error
