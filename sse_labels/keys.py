"""The keys that this server signs with and checks by, as the settings name them."""

from __future__ import annotations

from sse_labels.config import Settings, option_name
from sse_labels.errors import ConfigError
from sse_labels.signatures import SigningKey, SourceKeys


class Keys:
    """What `--signing-key-file`, `--signing-did` and `--source-keys-file` say."""

    def __init__(self, settings: Settings) -> None:
        """Raise ConfigError for a file that is no key, or keys that contradict each other."""
        self.signing_did = settings.signing_did
        self.signing_key: SigningKey | None = None
        self.source_keys: SourceKeys | None = None
        if settings.signing_key_file is not None:
            self.signing_key = SigningKey.load(settings.signing_key_file)
        elif settings.signing_did is not None:
            raise ConfigError(
                option_name("signing_did"), settings.signing_did, "--signing-key-file as well"
            )
        if settings.source_keys_file is not None:
            self.source_keys = SourceKeys(settings.source_keys_file)
        self._check(settings)

    def _check(self, settings: Settings) -> None:
        """Refuse to sign what this server itself would call wrongly signed."""
        did, key = self.signing_did, self.signing_key
        if did is None or key is None or self.source_keys is None:
            return
        if self.source_keys.deny(did, key):
            raise ConfigError(
                option_name("signing_key_file"), str(settings.signing_key_file),
                f"a key of {did} in --source-keys-file; the public one of this is {key.did_key}",
            )  # fmt: skip
