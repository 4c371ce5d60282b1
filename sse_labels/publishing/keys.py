"""Keys: reads the keys that sign labels and check signatures from the files in the settings."""

from __future__ import annotations

from binascii import unhexlify
from collections import defaultdict
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sse_labels.config import Settings, option_name
from sse_labels.errors import ConfigError
from sse_labels.protocol.formats import is_did
from sse_labels.protocol.signatures import PublicKey, SigningKey, SourceKeys, parse_public_key
from sse_labels.watched_file import FILE_MAX_BYTES, Unusable, WatchedFile, each_line

KEY_SETTING = "--signing-key-file"
SOURCE_KEYS_SETTING = "--source-keys-file"
_EXPECTED_KEY = "a file with a k256 private key: 64 hex digits, or PEM (secp256k1)"


class Keys:
    """The keys of `--signing-key-file`, `--signing-did` and `--source-keys-file`."""

    def __init__(self, settings: Settings) -> None:
        """Raise ConfigError for a file without a key, or for keys that contradict each other."""
        self.signing_did = settings.signing_did
        self.signing_key: SigningKey | None = None
        self.source_keys: SourceKeys | None = None
        if settings.signing_key_file is not None:
            self.signing_key = signing_key_in(settings.signing_key_file)
        elif settings.signing_did is not None:
            raise ConfigError(
                option_name("signing_did"), settings.signing_did, "--signing-key-file as well"
            )
        if settings.source_keys_file is not None:
            self.source_keys = source_keys_in(settings.source_keys_file)
        self._check(settings)

    def _check(self, settings: Settings) -> None:
        """Refuse a key whose signatures this server itself would call wrong."""
        did, key = self.signing_did, self.signing_key
        if did is None or key is None or self.source_keys is None:
            return
        if self.source_keys.deny(did, key):
            raise ConfigError(
                option_name("signing_key_file"), str(settings.signing_key_file),
                f"a key of {did} in --source-keys-file; the public one of this is {key.did_key}",
            )  # fmt: skip


def signing_key_in(file: Path) -> SigningKey:
    """Read a key. Raises ConfigError, which never shows the content of the file."""
    try:
        with file.open("rb") as opened:
            content = opened.read(FILE_MAX_BYTES)
    except OSError as error:
        raise ConfigError(KEY_SETTING, str(file), f"a file to read ({error.strerror})") from None
    try:
        if content.lstrip().startswith(b"-----BEGIN"):
            return SigningKey(_secret_of_pem(content))
        secret = unhexlify(content.strip())
        if len(secret) == 32:
            return SigningKey(secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass
    raise ConfigError(KEY_SETTING, str(file), _EXPECTED_KEY)


def _secret_of_pem(content: bytes) -> bytes:
    key = load_pem_private_key(content, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256k1":
        raise ValueError("not on secp256k1")
    return key.private_numbers().private_value.to_bytes(32, "big")


def source_keys_in(file: Path) -> SourceKeys:
    """Return the keys of a file with lines `DID did:key:z…`. `#` begins a comment.

    A source may have several keys. The file is read again when it changes. Raises ConfigError.
    """
    return SourceKeys(WatchedFile(SOURCE_KEYS_SETTING, file, _source_keys).value)


def _source_keys(content: bytes) -> dict[str, list[PublicKey]]:
    """Return the keys of each source. Raises Unusable with the number of the first bad line."""
    found: defaultdict[str, list[PublicKey]] = defaultdict(list)

    def take(words: list[str]) -> None:
        if len(words) != 2 or not is_did(words[0]):
            raise Unusable("a DID and a key, did:plc:… did:key:z…")
        try:
            found[words[0]].append(parse_public_key(words[1]))
        except ValueError as error:
            raise Unusable(str(error)) from None

    each_line(content, take)
    return dict(found)
