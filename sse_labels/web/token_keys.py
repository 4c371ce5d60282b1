"""The keys that check readers' tokens: an HS256 secret, or the public keys of a PEM or JWKS file.

Promises: each key has exactly one algorithm, which the type of the key decides. No part of a key is
in a message or in a repr.
Does not belong here: tokens (`auth`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import HMACAlgorithm

from sse_labels.watched_file import Unusable

#: RFC 7518, 3.2: an HS256 key has at least the size of the hash.
SECRET_MIN_BYTES = 32


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A key with its only algorithm."""

    algorithm: str
    material: bytes | EllipticCurvePublicKey | Ed25519PublicKey = field(repr=False)


#: One key, or several by their `kid`.
Keys = TokenKey | Mapping[str, TokenKey]


def parse_secret(content: bytes) -> TokenKey:
    """Return the HS256 key in `content`, without line ends. Raises Unusable."""
    secret = content.strip(b"\r\n")
    if len(secret) < SECRET_MIN_BYTES:
        raise Unusable(f"a secret of at least {SECRET_MIN_BYTES} bytes (RFC 7518, 3.2)")
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except jwt.InvalidKeyError:
        # Everybody has the public key. As a secret it would protect nothing.
        raise Unusable("a secret, not a PEM, SSH or JWK key (--jwt-key-file takes these)") from None
    return TokenKey("HS256", secret)


def parse_keys(content: bytes) -> Keys:
    """Return the public keys of a PEM file or a JWKS file (RFC 7517). Raises Unusable."""
    if content.lstrip().startswith(b"{"):
        return _parse_key_set(content)
    expected = "one public key, PEM, P-256 (ES256) or Ed25519 (EdDSA), or a JWKS"
    if b"PRIVATE KEY-----" in content:
        raise Unusable(f"{expected}; the private key is the issuer's alone")
    # `load_pem_public_key` would read the first of several keys and silently ignore the others.
    if content.count(b"-----BEGIN ") != 1:
        raise Unusable(expected)
    try:
        key = _key(load_pem_public_key(content))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if key is None:
        raise Unusable(expected)
    return key


def _parse_key_set(content: bytes) -> Mapping[str, TokenKey]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        raise Unusable("JSON") from None
    members = parsed.get("keys")
    if not isinstance(members, list):
        raise Unusable('a JWKS, {"keys": […]}')
    keys: dict[str, TokenKey] = {}
    for place, member in enumerate(members):
        if not isinstance(member, dict):
            raise Unusable(f"keys[{place}] to be an object")
        if "d" in member or member.get("kty") == "oct":
            raise Unusable(f"keys[{place}] to be a public key; the secret is the issuer's alone")
        key = _parse_jwk(member)
        if key is None:
            # RFC 7517, 5: keys of an unknown type should be ignored.
            continue
        kid = member.get("kid")
        if not isinstance(kid, str) or not kid or kid in keys:
            raise Unusable(f"keys[{place}] to have a kid, and one of its own")
        keys[kid] = key
    if not keys:
        raise Unusable("at least one key that signs with ES256 or EdDSA (Ed25519)")
    return keys


def _parse_jwk(member: Mapping[str, object]) -> TokenKey | None:
    """Return the key. None: the key has another type or another purpose."""
    algorithm = {"P-256": "ES256", "Ed25519": "EdDSA"}.get(str(member.get("crv")))
    operations = member.get("key_ops", ["verify"])
    if (
        algorithm is None
        or member.get("alg", algorithm) != algorithm
        or member.get("use", "sig") != "sig"
        or not (isinstance(operations, list) and "verify" in operations)
    ):
        return None
    try:
        return _key(jwt.PyJWK(dict(member), algorithm).key)
    except (jwt.PyJWTError, ValueError, TypeError):
        raise Unusable(f"{algorithm} keys with the coordinates of a point") from None


def _key(material: object) -> TokenKey | None:
    """Return a public key with the algorithm of its type. None: the type is not supported."""
    if isinstance(material, Ed25519PublicKey):
        return TokenKey("EdDSA", material)
    if isinstance(material, EllipticCurvePublicKey) and isinstance(material.curve, SECP256R1):
        return TokenKey("ES256", material)
    return None
