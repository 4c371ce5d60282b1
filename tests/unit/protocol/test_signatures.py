"""Signatures: what they cover, which are valid, and what a file of keys may hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from coincurve import PrivateKey
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from libipld import decode_dag_cbor, encode_multibase

from sse_labels.errors import ConfigError
from sse_labels.protocol.label import Label
from sse_labels.protocol.signatures import (
    P256_ORDER,
    P256_PREFIX,
    K256Key,
    SigningKey,
    SourceKeys,
    Verdict,
    signed_bytes,
)
from sse_labels.publishing.keys import signing_key_in, source_keys_in

SRC = "did:plc:" + "s" * 24
LABEL = Label(SRC, "at://did:plc:a/b/c", "", "spam", None, "2024-05-01T12:00:00.000Z", None, None)
KEY = SigningKey(b"\x1f" * 32)
KEY_HEX = PrivateKey(b"\x1f" * 32).public_key.format().hex()
#: The order of secp256k1 (SEC 2, section 2.4.1).
K256_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def keys_of(folder: Path, *did_keys: str) -> SourceKeys:
    file = folder / "keys"
    file.write_text("# of a test\n" + "".join(f"{SRC} {key}\n" for key in did_keys))
    return source_keys_in(file)


labels = st.builds(
    Label,
    src=st.just(SRC),
    uri=st.text(min_size=1),
    cid=st.sampled_from(["", "bafyreib2rxk3rh6kzwq"]),
    val=st.text(min_size=1),
    neg=st.sampled_from([None, False, True]),
    cts=st.sampled_from(["2024-05-01T12:00:00.000Z", "2024-05-01T12:00:00+02:00"]),
    exp=st.sampled_from([None, "2030-01-01T00:00:00Z"]),
    sig=st.none(),
)


@given(labels)
def test_what_is_signed_is_the_label_without_what_is_absent(label: Label) -> None:
    wanted = {"ver": 1, "src": label.src, "uri": label.uri, "val": label.val, "cts": label.cts}
    if label.cid:
        wanted["cid"] = label.cid
    if label.neg is not None:
        wanted["neg"] = label.neg
    if label.exp:
        wanted["exp"] = label.exp
    assert decode_dag_cbor(signed_bytes(label._replace(sig=b"x"))) == wanted


@given(labels)
def test_a_label_that_is_signed_here_is_valid_and_means_the_same(label: Label) -> None:
    signed = KEY.sign(label)
    assert signed == label._replace(neg=label.neg or None, sig=signed.sig)
    assert K256Key(bytes.fromhex(KEY_HEX)).verifies(signed.sig or b"", signed_bytes(signed))


def test_a_negation_that_a_signature_states_to_be_false_is_covered_by_it(tmp_path: Path) -> None:
    stated = LABEL._replace(neg=False, sig=b"?")
    sig = PrivateKey(b"\x1f" * 32).sign_recoverable(signed_bytes(stated))[:64]
    keys = keys_of(tmp_path, KEY.did_key)
    assert keys.check(stated._replace(sig=sig)) is Verdict.VALID
    assert keys.check(stated._replace(sig=sig, neg=None)) is Verdict.INVALID


@pytest.mark.parametrize("field", ["src", "uri", "cid", "val", "neg", "cts", "exp"])
def test_a_signature_is_invalid_once_any_field_has_changed(tmp_path: Path, field: str) -> None:
    keys = keys_of(tmp_path, KEY.did_key)
    signed = KEY.sign(LABEL)
    assert keys.check(signed) is Verdict.VALID
    changed = {"neg": True, "src": SRC}.get(field, "2031-01-01T00:00:00Z")
    if field == "src":
        # Of another source its own key says it.
        (tmp_path / "keys").write_text(f"did:web:other {KEY.did_key}\n")
        changed = "did:web:other"
        keys = source_keys_in(tmp_path / "keys")
    assert keys.check(signed._replace(**{field: changed})) is Verdict.INVALID


def test_the_same_label_has_the_same_signature_every_time() -> None:
    assert KEY.sign(LABEL) == KEY.sign(LABEL)
    assert len(KEY.sign(LABEL).sig or b"") == 64


def test_a_high_s_is_invalid(tmp_path: Path) -> None:
    sig = KEY.sign(LABEL).sig
    assert sig is not None
    s = int.from_bytes(sig[32:], "big")
    assert s <= K256_ORDER // 2
    high = sig[:32] + (K256_ORDER - s).to_bytes(32, "big")
    assert keys_of(tmp_path, KEY.did_key).check(LABEL._replace(sig=high)) is Verdict.INVALID


@pytest.mark.parametrize("sig", [b"x", b"\0" * 64, b"\xff" * 64, b"\1" * 63, b"\1" * 65])
def test_a_malformed_signature_is_invalid(tmp_path: Path, sig: bytes) -> None:
    assert keys_of(tmp_path, KEY.did_key).check(LABEL._replace(sig=sig)) is Verdict.INVALID


def test_a_key_on_p256_checks_too_and_refuses_a_high_s(tmp_path: Path) -> None:
    private = ec.derive_private_key(77, ec.SECP256R1())
    point = private.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    keys = keys_of(tmp_path, "did:key:" + encode_multibase("z", P256_PREFIX + point))
    r, s = decode_dss_signature(private.sign(signed_bytes(LABEL), ec.ECDSA(SHA256())))
    low, high = sorted((s, P256_ORDER - s))

    def check(s: int) -> Verdict:
        sig = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        return keys.check(LABEL._replace(sig=sig))

    assert check(low) is Verdict.VALID
    assert check(high) is Verdict.INVALID
    assert check(low ^ 1) is Verdict.INVALID


def test_one_of_several_keys_is_enough_and_without_a_key_nothing_is_known(tmp_path: Path) -> None:
    other = SigningKey(b"\2" * 32)
    keys = keys_of(tmp_path, KEY.did_key, other.did_key)
    assert keys.check(other.sign(LABEL)) is Verdict.VALID
    assert keys.check(LABEL) is Verdict.UNSIGNED
    stranger = KEY.sign(LABEL._replace(src="did:web:stranger"))
    assert keys.check(stranger) is Verdict.UNKNOWN


def test_a_key_that_is_added_to_the_file_works_at_once(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, SigningKey(b"\2" * 32).did_key)
    signed = KEY.sign(LABEL)
    assert keys.check(signed) is Verdict.INVALID
    keys_of(tmp_path, KEY.did_key)
    assert keys.check(signed) is Verdict.VALID


@pytest.mark.parametrize(
    "line",
    [
        SRC,
        f"{SRC} did:key:zzz0OIl",
        f"{SRC} did:key:Qabc",
        f"{SRC} {KEY.did_key} more",
        f"not-a-did {KEY.did_key}",
        # Of another kind: Ed25519.
        f"{SRC} did:key:z6MkhaXgBZDvotDkL5257faiztiGiC2QtKLGpbnnEGta2doK",
    ],
)
def test_a_bad_line_of_keys_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{SRC} {KEY.did_key}\n{line}\n")
    with pytest.raises(ConfigError, match=r"--source-keys-file: .*in line 2: a "):
        source_keys_in(file)


def test_a_signing_key_is_hex_or_pem(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("1f" * 32 + "\n")
    assert signing_key_in(file).did_key == KEY.did_key
    private = ec.derive_private_key(int("1f" * 32, 16), ec.SECP256K1())
    for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        file.write_bytes(private.private_bytes(Encoding.PEM, form, NoEncryption()))
        assert signing_key_in(file).did_key == KEY.did_key


def test_a_signing_key_that_is_none_is_refused_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "key"
    p256 = ec.derive_private_key(77, ec.SECP256R1())
    pem = p256.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"ab" * 31, b"zz" * 32, b"00" * 32, b"-----BEGIN nothing", pem):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"--signing-key-file: .*64 hex digits") as raised:
            signing_key_in(file)
        assert raised.value.__cause__ is None
    with pytest.raises(ConfigError, match="No such file"):
        signing_key_in(tmp_path / "none")


def test_the_public_key_is_written_as_a_did_key() -> None:
    # https://w3c-ccg.github.io/did-key-spec/, test vectors for secp256k1.
    seed = bytes.fromhex("9085d2bef69286a6cbb51623c8fa258629945cd55ca705cc4e66700396894e0c")
    assert SigningKey(seed).did_key == "did:key:zQ3shokFTS3brHcDQrn82RUDfCZESWL1ZdCEJwekUDPQiYBme"
    assert PrivateKey(seed).public_key.format()[0] in (2, 3)
