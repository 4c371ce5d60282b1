"""Signatures: sign labels and check their signatures, as the AT Protocol specifies.

Promises: a signature covers the label exactly as given: no value is reformatted, and no absent
field is added. Our signature of a label equals the signature that Ozone makes with the same key. A
malformed signature, or a signature with a high S, is invalid and never an error.

Sources: https://atproto.com/specs/label#signatures (DAG-CBOR of the label with `ver` and without
`sig`, SHA-256, ECDSA); https://atproto.com/specs/cryptography (curves, low S, did:key).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Protocol

import libipld
from coincurve import PrivateKey as K256PrivateKey
from coincurve import PublicKey as K256PublicKey
from coincurve.ecdsa import cdata_to_der, deserialize_compact
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from sse_labels.protocol.label import Label, label_json

SIGNATURE_BYTES = 64
#: Multicodec prefixes of public keys, as varints (https://github.com/multiformats/multicodec).
K256_PREFIX = b"\xe7\x01"
P256_PREFIX = b"\x80\x24"
#: The order of P-256 (SEC 2, section 2.4.2). For K-256, coincurve itself refuses a high S.
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class Verdict(Enum):
    """The result of checking a label's signature."""

    VALID = "valid"
    INVALID = "invalid"
    UNSIGNED = "unsigned"
    #: No key of the label's source is known here.
    UNKNOWN = "unknown"


def signed_bytes(label: Label) -> bytes:
    """Return the bytes that the signature of `label` covers."""
    covered = label_json(*label)
    covered.pop("sig", None)
    return libipld.encode_dag_cbor(covered)


class SigningKey:
    """A k256 private key."""

    def __init__(self, secret: bytes) -> None:
        """`secret` has 32 bytes. Raises ValueError when they are not a valid key."""
        self._key = K256PrivateKey(secret)

    @property
    def did_key(self) -> str:
        """The public key as a `did:key`."""
        encoded = K256_PREFIX + self._key.public_key.format(compressed=True)
        return "did:key:" + libipld.encode_multibase("z", encoded)

    def has_signed(self, label: Label) -> bool:
        """Return whether this key made the signature of `label`."""
        sig = bytes(label.sig or b"")
        public = K256Key(self._key.public_key.format(compressed=True))
        return len(sig) == SIGNATURE_BYTES and public.verifies(sig, signed_bytes(label))

    def sign(self, label: Label) -> Label:
        """Return the label with its signature: r and a low s, 32 bytes each.

        The same label always gets the same signature. As in Ozone, a `neg` of False is left out.
        """
        bare = label._replace(neg=label.neg or None, sig=None)
        # Without the last byte, which tells two possible public keys apart.
        sig = self._key.sign_recoverable(signed_bytes(bare))[:SIGNATURE_BYTES]
        return bare._replace(sig=sig)


class PublicKey(Protocol):
    """A key that can check signatures."""

    def verifies(self, sig: bytes, message: bytes) -> bool:
        """Return whether `sig`, 64 bytes, is this key's signature of `message`."""


class K256Key:
    """A public key on secp256k1."""

    def __init__(self, encoded: bytes) -> None:
        """Raise ValueError when `encoded` is not a compressed point."""
        self._key = K256PublicKey(encoded)

    def verifies(self, sig: bytes, message: bytes) -> bool:
        """Return whether `sig` is valid. A high S is not accepted (libsecp256k1)."""
        try:
            return self._key.verify(cdata_to_der(deserialize_compact(sig)), message)
        except ValueError:
            return False


class P256Key:
    """A public key on NIST's P-256."""

    def __init__(self, encoded: bytes) -> None:
        """Raise ValueError when `encoded` is not a point."""
        self._key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), encoded)

    def verifies(self, sig: bytes, message: bytes) -> bool:
        """Return whether `sig` is valid. A high S is not (https://atproto.com/specs/cryptography)."""
        r, s = int.from_bytes(sig[:32], "big"), int.from_bytes(sig[32:], "big")
        if s > P256_ORDER // 2:
            return False
        try:
            self._key.verify(encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


def parse_public_key(text: str) -> PublicKey:
    """Return the key written as `did:key:z…`, or as `z…` alone; raise ValueError."""
    expected = "a key such as did:key:zQ3sh… (k256) or did:key:zDn… (p256)"
    multibase = text.removeprefix("did:key:")
    if not multibase.startswith("z"):
        raise ValueError(expected)
    try:
        _, encoded = libipld.decode_multibase(multibase)
        if encoded.startswith(K256_PREFIX) and len(encoded) == 35:
            return K256Key(encoded[2:])
        if encoded.startswith(P256_PREFIX) and len(encoded) == 35:
            return P256Key(encoded[2:])
    except ValueError:
        pass
    raise ValueError(expected)


class SourceKeys:
    """The public keys of the sources. The keys may change while the program runs."""

    def __init__(self, current: Callable[[], Mapping[str, Sequence[PublicKey]]]) -> None:
        """`current` returns the keys of each source. A source may have several keys."""
        self._current = current

    def deny(self, did: str, key: SigningKey) -> bool:
        """Return whether keys of this source are known, and `key` belongs to none of them."""
        probe = Label(did, did, "", "probe", None, "2026-01-01T00:00:00Z", None, None)
        return self.check(key.sign(probe)) is Verdict.INVALID

    def check(self, label: Label) -> Verdict:
        """Check the signature of `label`."""
        if not label.sig:
            return Verdict.UNSIGNED
        keys = self._current().get(label.src)
        if not keys:
            return Verdict.UNKNOWN
        sig = bytes(label.sig)
        if len(sig) != SIGNATURE_BYTES:
            return Verdict.INVALID
        message = signed_bytes(label)
        good = any(key.verifies(sig, message) for key in keys)
        return Verdict.VALID if good else Verdict.INVALID
