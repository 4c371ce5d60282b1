"""Which JSON Web Tokens open a stream, which are refused and how, and what they narrow it to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, make_mocked_request
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from sse_labels.config import Settings
from sse_labels.errors import AuthRequired, ConfigError, Forbidden, InvalidRequest
from sse_labels.protocol.filters import Filter
from sse_labels.web.auth import (
    COOKIE,
    LEEWAY_SECONDS,
    PUBLIC,
    QUERY_TOKEN_MAX_SECONDS,
    Grant,
    StreamAuth,
    within_grant,
)

NOW = 1_800_000_000
SECRET = "0123456789abcdef0123456789abcdef"
ALICE, BOB, CAROL = "did:plc:alice", "did:web:bob.example", "did:plc:carol"
#: RFC 6750, 3: what an error_description is made of.
CHALLENGE = re.compile(
    r'Bearer realm="sse-labels", error="([a-z_]+)", '
    r'error_description="[\x20-\x21\x23-\x5b\x5d-\x7e]+"'
)

Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
EC_KEY, EC_OTHER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
ED_KEY, ED_OTHER = (ed25519.Ed25519PrivateKey.generate() for _ in range(2))


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


def pem(key: Any) -> bytes:
    made: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return made


def number(value: int) -> str:
    return base64.urlsafe_b64encode(value.to_bytes(32, "big")).rstrip(b"=").decode()


def jwk(key: Private, kid: str | None = None, **more: Any) -> dict[str, Any]:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        made = {"kty": "OKP", "crv": "Ed25519", "x": number(int.from_bytes(raw, "big"))}
    else:
        point = key.public_key().public_numbers()
        made = {"kty": "EC", "crv": "P-256", "x": number(point.x), "y": number(point.y)}
    return made | ({} if kid is None else {"kid": kid}) | more


def jwks(*members: Any) -> bytes:
    return json.dumps({"keys": members}).encode()


def signed(
    claims: dict[str, Any] | None = None,
    key: Any = SECRET,
    algorithm: str = "HS256",
    headers: dict[str, Any] | None = None,
    **more: Any,
) -> str:
    """A token that is right but for what is given; a claim of `...` is left out."""
    given = {"exp": NOW + 60, "iat": NOW} | (claims or {}) | more
    said = {name: value for name, value in given.items() if value is not ...}
    return jwt.encode(said, key, algorithm, headers=headers)


def by_hand(header: Any, payload: Any, key: bytes = SECRET.encode()) -> str:
    """A token that no library would make, with a right HS256 signature."""
    segments = [
        part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)
    ]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in segments)
    signature = hmac.new(key, text, hashlib.sha256).digest()
    return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def asking(
    token: str | None = None, *, cookie: str | None = None, query: str | None = None
) -> web.Request:
    headers = {}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    if cookie is not None:
        headers["Cookie"] = f"other=1; {COOKIE}={cookie}"
    path = "/stream" if query is None else f"/stream?cursor=0&access_token={query}"
    return make_mocked_request("GET", path, headers=headers)


def auth_of(*, clock: Callable[[], float] = time.time, **settings: Any) -> StreamAuth:
    return StreamAuth(Settings(**settings), clock)


def refusal(auth: StreamAuth, request: web.Request, *secrets: str) -> str:
    with pytest.raises(AuthRequired) as caught:
        auth.authorize(request)
    error = caught.value
    assert (error.status, error.name) == (401, "AuthRequired")
    matched = CHALLENGE.fullmatch(error.headers["WWW-Authenticate"])
    assert matched is not None
    assert matched[1] == "invalid_token"
    # Neither what is shown nor what is chained to it may hold a part of a token.
    shown = str(error) + repr(error) + error.headers["WWW-Authenticate"]
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    for secret in secrets:
        for segment in secret.split("."):
            assert len(segment) < 4 or segment not in shown
    return str(error)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def auth(clock: Clock) -> StreamAuth:
    return auth_of(jwt_secret=SECRET, clock=clock)


KeyFile = Callable[[bytes], Path]


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    """A function that writes the key file; each version is old, by times of its own."""
    versions: list[bytes] = []

    def write(content: bytes) -> Path:
        versions.append(content)
        path = tmp_path / "key"
        path.write_bytes(content)
        os.utime(path, (1_000_000_000, 1_000_000_000 + len(versions)))
        return path

    return write


class TestPublic:
    def test_without_a_key_everybody_may_read_everything(self) -> None:
        auth = auth_of()
        assert not auth.protected
        assert auth.authorize(asking()) == PUBLIC == Grant(None, None, None)

    def test_without_a_key_no_token_is_looked_at(self) -> None:
        assert auth_of().authorize(asking("junk", cookie="junk", query="junk")) == PUBLIC


class TestTokens:
    def test_a_right_token_grants_what_it_says_until_it_expires(self, auth: StreamAuth) -> None:
        assert auth.protected
        token = signed(sub="reader-7", sources=[ALICE, BOB, ALICE])
        grant = auth.authorize(asking(token))
        assert grant == Grant(frozenset({ALICE, BOB}), NOW + 60 + LEEWAY_SECONDS, "reader-7")

    def test_a_token_without_the_sources_claim_may_read_all(self, auth: StreamAuth) -> None:
        assert auth.authorize(asking(signed())) == Grant(None, NOW + 60 + LEEWAY_SECONDS, None)

    def test_no_token_is_asked_for_without_an_error_code(self, auth: StreamAuth) -> None:
        with pytest.raises(AuthRequired) as caught:
            auth.authorize(asking())
        assert caught.value.headers["WWW-Authenticate"] == 'Bearer realm="sse-labels"'

    @pytest.mark.parametrize("token", ["x", "a.b", "a.b.c", "....", "é" * 9, "[" * 9])
    def test_what_is_no_token_is_refused(self, auth: StreamAuth, token: str) -> None:
        assert refusal(auth, asking(token)) == "the token is malformed"

    async def test_bytes_that_are_no_text_are_answered_with_401(self, auth: StreamAuth) -> None:
        async def handle(request: web.Request) -> web.Response:
            return web.Response(text=refusal(auth, request))

        app = web.Application()
        app.router.add_get("/stream", handle)
        async with TestServer(app) as server:
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(
                b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Authorization: Bearer \xff\xfe.a.b\r\n\r\n"
            )
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
        assert answer.endswith(b"\r\n\r\nthe token is malformed")

    def test_a_token_with_one_byte_changed_is_refused(self, auth: StreamAuth) -> None:
        token = signed(sources=[ALICE])
        head, payload, signature = token.split(".")
        forged = json.dumps({"exp": NOW + 60, "sources": [BOB]}).encode()
        other = base64.urlsafe_b64encode(forged).rstrip(b"=").decode()
        for bad in (
            f"{head}.{other}.{signature}",
            f"{head}.{payload}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}",
            f"{head}.{payload}.",
        ):
            assert refusal(auth, asking(bad), bad) == "the signature does not fit the key"

    def test_a_token_of_another_secret_is_refused(self, auth: StreamAuth) -> None:
        token = signed(key="x" * 32)
        assert refusal(auth, asking(token), token) == "the signature does not fit the key"

    @pytest.mark.parametrize("payload", [[], "x", 1, None, b"{", b"\xff", b"[" * 3000])
    def test_claims_that_are_no_object_are_refused(self, auth: StreamAuth, payload: Any) -> None:
        token = by_hand({"alg": "HS256"}, payload)
        assert refusal(auth, asking(token), token) == "the token is malformed"

    @pytest.mark.parametrize(
        "header", [[], "x", b"\xff", {"alg": "HS256", "kid": 7}, {"alg": "HS256", "crit": ["x"]},
                   {"alg": "HS256", "b64": False, "crit": ["b64"]}, b"[" * 3000]
    )  # fmt: skip
    def test_a_header_that_is_wrong_or_asks_for_more_is_refused(
        self, auth: StreamAuth, header: Any
    ) -> None:
        token = by_hand(header, {"exp": NOW + 60})
        assert refusal(auth, asking(token), token) == "the token is malformed"

    @pytest.mark.parametrize("value", [7, None, ["x"]])
    def test_a_subject_that_is_no_string_is_refused(self, auth: StreamAuth, value: Any) -> None:
        token = by_hand({"alg": "HS256"}, {"exp": NOW + 60, "sub": value})
        assert refusal(auth, asking(token), token) == "the token is malformed"

    @pytest.mark.parametrize(
        "value", [None, [], {}, "*", ALICE, ["*"], [ALICE, 7], [ALICE, None], [[ALICE]], [""]]
    )
    def test_sources_that_are_no_dids_are_refused(self, auth: StreamAuth, value: Any) -> None:
        token = signed(sources=value)
        message = refusal(auth, asking(token), token)
        assert message == "the claim sources is not an array of DIDs"


class TestTimes:
    def test_a_token_without_an_end_is_refused(self, auth: StreamAuth) -> None:
        for value in (..., None):
            token = signed(exp=value)
            assert refusal(auth, asking(token), token) == "the claim exp is missing"

    def test_a_token_ends_with_its_grant_and_not_a_second_later(
        self, auth: StreamAuth, clock: Clock
    ) -> None:
        token = signed()
        clock.now = NOW + 60 + LEEWAY_SECONDS - 0.1
        end = auth.authorize(asking(token)).expires_at
        assert end is not None
        clock.now = end
        assert refusal(auth, asking(token), token) == "the token has expired"

    @pytest.mark.parametrize("name", ["nbf", "iat"])
    def test_a_token_from_the_future_is_refused(self, auth: StreamAuth, name: str) -> None:
        auth.authorize(asking(signed({name: NOW + LEEWAY_SECONDS})))
        token = signed({name: NOW + LEEWAY_SECONDS + 1})
        assert refusal(auth, asking(token), token) == "the token is not valid yet"

    @pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
    @pytest.mark.parametrize(
        "value",
        [True, "1800000060", [], {}, -1, (NOW + 60) * 1000, 10**400, float("nan"), float("inf")],
        ids=repr,
    )
    def test_a_time_that_is_none_is_refused(
        self, auth: StreamAuth, name: str, value: object
    ) -> None:
        # json.dumps writes NaN and Infinity, which Python's parser takes back.
        token = by_hand({"alg": "HS256"}, {"exp": NOW + 60, "iat": NOW} | {name: value})
        message = refusal(auth, asking(token), token)
        assert message == f"the claim {name} is not a time in seconds"

    def test_a_time_may_have_a_fraction(self, auth: StreamAuth) -> None:
        grant = auth.authorize(asking(signed(exp=NOW + 1.5)))
        assert grant.expires_at == NOW + 1.5 + LEEWAY_SECONDS


class TestIssuerAndAudience:
    @pytest.fixture
    def auth(self, clock: Clock) -> StreamAuth:
        return auth_of(
            jwt_secret=SECRET, jwt_issuer="https://id.example", jwt_audience="labels", clock=clock
        )

    RIGHT: dict[str, Any] = {"iss": "https://id.example", "aud": "labels"}  # noqa: RUF012

    def test_the_right_ones_are_taken(self, auth: StreamAuth) -> None:
        auth.authorize(asking(signed(self.RIGHT)))
        auth.authorize(asking(signed(self.RIGHT, aud=["other", "labels"])))

    @pytest.mark.parametrize(
        ("claim", "value", "message"),
        [
            ("iss", ..., "the claim iss is missing"),
            ("iss", "https://id.example/", "the issuer is not the one expected"),
            ("iss", "https://id", "the issuer is not the one expected"),
            ("aud", ..., "the claim aud is missing"),
            ("aud", [], "the claim aud is missing"),
            ("aud", "label", "the audience is not this service"),
            ("aud", ["other"], "the audience is not this service"),
            ("aud", {"labels": 1}, "the audience is not this service"),
        ],
    )
    def test_others_are_refused(
        self, auth: StreamAuth, claim: str, value: Any, message: str
    ) -> None:
        token = signed(self.RIGHT, **{claim: value})
        assert refusal(auth, asking(token), token) == message

    def test_an_issuer_that_is_no_string_is_refused(self, auth: StreamAuth) -> None:
        token = by_hand({"alg": "HS256"}, {"exp": NOW + 60, "aud": "labels", "iss": ["x"]})
        assert refusal(auth, asking(token), token) == "the issuer is not the one expected"

    def test_a_token_for_some_audience_is_refused_where_none_is_set(self, clock: Clock) -> None:
        auth = auth_of(jwt_secret=SECRET, clock=clock)
        token = signed(aud="another-service")
        assert refusal(auth, asking(token), token) == "the audience is not this service"


class TestAlgorithms:
    @pytest.mark.parametrize(("key", "algorithm"), [(EC_KEY, "ES256"), (ED_KEY, "EdDSA")])
    def test_a_public_key_takes_what_its_private_key_signed(
        self, key_file: KeyFile, clock: Clock, key: Private, algorithm: str
    ) -> None:
        auth = auth_of(jwt_key_file=key_file(pem(key)), clock=clock)
        token = signed(sources=[ALICE], key=key, algorithm=algorithm)
        assert auth.authorize(asking(token)).sources == frozenset({ALICE})
        # A PEM has no name, the token may give one.
        auth.authorize(asking(signed(key=key, algorithm=algorithm, headers={"kid": "x"})))

    @pytest.mark.parametrize(
        ("key", "other", "algorithm"), [(EC_KEY, EC_OTHER, "ES256"), (ED_KEY, ED_OTHER, "EdDSA")]
    )
    def test_a_signature_of_another_key_is_refused(
        self, key_file: KeyFile, clock: Clock, key: Private, other: Private, algorithm: str
    ) -> None:
        auth = auth_of(jwt_key_file=key_file(pem(key)), clock=clock)
        token = signed(key=other, algorithm=algorithm)
        assert refusal(auth, asking(token), token) == "the signature does not fit the key"

    @pytest.mark.parametrize("alg", ["none", "None", "NONE", "", None, ["HS256"], {}, 7])
    @pytest.mark.parametrize("kind", ["secret", "pem", "jwks"])
    def test_a_token_without_a_signature_is_refused(
        self, key_file: KeyFile, clock: Clock, alg: Any, kind: str
    ) -> None:
        auth = {
            "secret": lambda: auth_of(jwt_secret=SECRET, clock=clock),
            "pem": lambda: auth_of(jwt_key_file=key_file(pem(EC_KEY)), clock=clock),
            "jwks": lambda: auth_of(jwt_key_file=key_file(jwks(jwk(EC_KEY, "1"))), clock=clock),
        }[kind]()
        whole = by_hand({"alg": alg, "kid": "1"}, {"exp": NOW + 60, "iat": NOW})
        for token in (whole, whole.rpartition(".")[0] + "."):
            message = refusal(auth, asking(token), token)
            assert message == "the algorithm is not the one of the key"

    def test_a_token_without_an_algorithm_is_refused(self, auth: StreamAuth) -> None:
        token = by_hand({"typ": "JWT"}, {"exp": NOW + 60})
        assert refusal(auth, asking(token)) == "the algorithm is not the one of the key"

    @pytest.mark.parametrize("key", [EC_KEY, ED_KEY])
    def test_a_public_key_is_never_a_secret(
        self, key_file: KeyFile, clock: Clock, key: Private
    ) -> None:
        raw = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for known in (pem(key), pem(key).strip(), raw):
            auth = auth_of(jwt_key_file=key_file(pem(key)), clock=clock)
            token = by_hand({"alg": "HS256"}, {"exp": NOW + 60}, known)
            message = refusal(auth, asking(token), token)
            assert message == "the algorithm is not the one of the key"
        set_of_keys = jwks(jwk(key, "1"))
        for known in (pem(key), set_of_keys, json.dumps(jwk(key, "1")).encode()):
            auth = auth_of(jwt_key_file=key_file(set_of_keys), clock=clock)
            token = by_hand({"alg": "HS256", "kid": "1"}, {"exp": NOW + 60}, known)
            message = refusal(auth, asking(token), token)
            assert message == "the algorithm is not the one of the key"

    def test_one_key_takes_one_algorithm(self, key_file: KeyFile, clock: Clock) -> None:
        longer = SECRET * 2
        auth = auth_of(jwt_secret=longer, clock=clock)
        for algorithm in ("HS384", "HS512"):
            token = signed(key=longer, algorithm=algorithm)
            message = refusal(auth, asking(token), token)
            assert message == "the algorithm is not the one of the key"
        auth = auth_of(jwt_key_file=key_file(pem(EC_KEY)), clock=clock)
        token = signed(key=ED_KEY, algorithm="EdDSA")
        assert refusal(auth, asking(token)) == "the algorithm is not the one of the key"

    def test_a_key_in_the_token_itself_is_not_believed(self, clock: Clock) -> None:
        auth = auth_of(jwt_secret=SECRET, clock=clock)
        token = signed(key=EC_KEY, algorithm="ES256", headers={"jwk": jwk(EC_KEY)})
        assert refusal(auth, asking(token)) == "the algorithm is not the one of the key"


class TestKeySets:
    def test_the_kid_chooses_the_key_and_the_key_the_algorithm(
        self, key_file: KeyFile, clock: Clock
    ) -> None:
        content = jwks(jwk(EC_KEY, "a", alg="ES256", use="sig"), jwk(ED_KEY, "b"))
        auth = auth_of(jwt_key_file=key_file(content), clock=clock)
        auth.authorize(asking(signed(key=EC_KEY, algorithm="ES256", headers={"kid": "a"})))
        auth.authorize(asking(signed(key=ED_KEY, algorithm="EdDSA", headers={"kid": "b"})))
        crossed = signed(key=ED_KEY, algorithm="EdDSA", headers={"kid": "a"})
        assert refusal(auth, asking(crossed)) == "the algorithm is not the one of the key"
        wrong = signed(key=EC_OTHER, algorithm="ES256", headers={"kid": "a"})
        assert refusal(auth, asking(wrong)) == "the signature does not fit the key"

    @pytest.mark.parametrize("headers", [None, {"kid": "c"}, {"kid": ""}])
    def test_a_token_that_names_no_key_of_the_set_is_refused(
        self, key_file: KeyFile, clock: Clock, headers: dict[str, Any] | None
    ) -> None:
        auth = auth_of(jwt_key_file=key_file(jwks(jwk(EC_KEY, "a"))), clock=clock)
        token = signed(key=EC_KEY, algorithm="ES256", headers=headers)
        message = refusal(auth, asking(token), token)
        assert message == "the token names no key (kid) that is known here"

    def test_a_token_that_cannot_be_read_is_refused(self, key_file: KeyFile, clock: Clock) -> None:
        auth = auth_of(jwt_key_file=key_file(jwks(jwk(EC_KEY, "a"))), clock=clock)
        for token in ("x", by_hand({"alg": "ES256", "kid": 7}, {}), by_hand(b"[" * 3000, {})):
            assert refusal(auth, asking(token)) == "the token is malformed"

    @pytest.mark.parametrize(
        "other",
        [
            {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "r"},
            {"kty": "EC", "crv": "P-384", "x": "AA", "y": "AA"},
            {"kty": "future"},
            jwk(EC_OTHER, "enc", use="enc"),
            jwk(EC_OTHER, "ecdh", alg="ECDH-ES"),
            jwk(EC_OTHER, "wrap", key_ops=["wrapKey"]),
            jwk(EC_OTHER, "ops", key_ops="verify"),
        ],
        ids=lambda member: str(member.get("kid", member["kty"])),
    )
    def test_keys_of_other_kinds_are_passed_over(
        self, key_file: KeyFile, clock: Clock, other: dict[str, Any]
    ) -> None:
        auth = auth_of(jwt_key_file=key_file(jwks(other, jwk(EC_KEY, "a"))), clock=clock)
        auth.authorize(asking(signed(key=EC_KEY, algorithm="ES256", headers={"kid": "a"})))
        kid = {"kid": str(other.get("kid", "x"))}
        token = signed(key=EC_OTHER, algorithm="ES256", headers=kid)
        message = refusal(auth, asking(token))
        assert message == "the token names no key (kid) that is known here"
        with pytest.raises(ConfigError, match="at least one key that signs"):
            auth_of(jwt_key_file=key_file(jwks(other)))


class TestRotation:
    def test_a_new_key_set_counts_at_the_next_request(
        self, key_file: KeyFile, clock: Clock
    ) -> None:
        old = signed(key=EC_KEY, algorithm="ES256", headers={"kid": "old"})
        new = signed(key=EC_OTHER, algorithm="ES256", headers={"kid": "new"})
        auth = auth_of(jwt_key_file=key_file(jwks(jwk(EC_KEY, "old"))), clock=clock)
        auth.authorize(asking(old))
        refusal(auth, asking(new))
        key_file(jwks(jwk(EC_KEY, "old"), jwk(EC_OTHER, "new")))
        auth.authorize(asking(old))
        auth.authorize(asking(new))
        key_file(jwks(jwk(EC_OTHER, "new")))
        refusal(auth, asking(old))
        auth.authorize(asking(new))

    def test_a_new_secret_counts_at_the_next_request(self, key_file: KeyFile, clock: Clock) -> None:
        auth = auth_of(jwt_secret_file=key_file(SECRET.encode() + b"\n"), clock=clock)
        auth.authorize(asking(signed()))
        key_file(b"\xff" * 32)
        refusal(auth, asking(signed()))
        auth.authorize(asking(signed(key=b"\xff" * 32)))

    def test_a_key_file_that_went_bad_changes_nothing_and_is_logged_once(
        self, key_file: KeyFile, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        auth = auth_of(jwt_key_file=key_file(pem(EC_KEY)), clock=clock)
        token = signed(key=EC_KEY, algorithm="ES256")
        private = EC_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        key_file(private)
        with caplog.at_level(logging.DEBUG):
            for _ in range(3):
                auth.authorize(asking(token))
        assert len(caplog.records) == 1
        assert private.decode().splitlines()[1] not in caplog.text
        assert token not in caplog.text


class TestKeysThatCannotBeUsed:
    @pytest.mark.parametrize(
        ("secret", "expected"),
        [
            ("", "at least 32 bytes"),
            ("x" * 31, "at least 32 bytes"),
            ("x" * 31 + "\n", "at least 32 bytes"),
            (pem(EC_KEY).decode(), "not a PEM, SSH or JWK key"),
            (json.dumps(jwk(EC_KEY)), "not a PEM, SSH or JWK key"),
        ],
    )
    def test_a_secret_is_long_and_no_public_key(
        self, key_file: KeyFile, secret: str, expected: str
    ) -> None:
        with pytest.raises(ConfigError, match=expected) as caught:
            auth_of(jwt_secret=secret)
        assert caught.value.key == "--jwt-secret"
        assert not secret or secret not in str(caught.value)
        with pytest.raises(ConfigError, match=expected) as caught:
            auth_of(jwt_secret_file=key_file(secret.encode()))
        assert caught.value.key == "--jwt-secret-file"

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            SECRET.encode(),
            b"\xff" * 64,
            b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            pem(EC_KEY) + pem(EC_OTHER),
            pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
            pem(ec.generate_private_key(ec.SECP384R1())),
            pem(ec.generate_private_key(ec.SECP256K1())),
            pem(ed448.Ed448PrivateKey.generate()),
        ],
    )
    def test_a_key_file_holds_one_public_key_of_a_kind_we_take(
        self, key_file: KeyFile, content: bytes
    ) -> None:
        with pytest.raises(ConfigError, match="expected one public key, PEM") as caught:
            auth_of(jwt_key_file=key_file(content))
        assert caught.value.key == "--jwt-key-file"
        assert SECRET not in str(caught.value)

    def test_a_private_key_is_refused(self, key_file: KeyFile) -> None:
        content = EC_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(ConfigError, match="the private key is the issuer's alone"):
            auth_of(jwt_key_file=key_file(content))

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"{", "expected JSON"),
            (b'{"a":' * 100_000, "expected JSON"),
            (b"{\xff}", "expected JSON"),
            (b"{}", "a JWKS"),
            (b'{"keys":{}}', "a JWKS"),
            (json.dumps(jwk(EC_KEY)).encode(), "a JWKS"),
            (jwks(), "at least one key"),
            (jwks("x"), r"keys\[0\] to be an object"),
            (jwks(jwk(EC_KEY, "a"), jwk(EC_KEY, "b", d="AAAA")), r"keys\[1\] to be a public key"),
            (jwks({"kty": "oct", "k": "A" * 43, "kid": "a"}), r"keys\[0\] to be a public key"),
            (jwks(jwk(EC_KEY)), r"keys\[0\] to have a kid"),
            (jwks(jwk(EC_KEY, "")), r"keys\[0\] to have a kid"),
            (jwks(jwk(EC_KEY) | {"kid": 7}), r"keys\[0\] to have a kid"),
            (jwks(jwk(EC_KEY, "a"), jwk(ED_KEY, "a")), r"keys\[1\] to have a kid"),
            (jwks(jwk(EC_KEY, "a", x="AAAA")), "the coordinates of a point"),
            (jwks(jwk(EC_KEY, "a", y=number(1))), "the coordinates of a point"),
            (jwks(jwk(ED_KEY, "a", x="AAAA")), "the coordinates of a point"),
            (jwks(jwk(ED_KEY, "a", x=7)), "the coordinates of a point"),
            (jwks(jwk(ED_KEY, "a", kty="EC")), "the coordinates of a point"),
        ],
    )
    def test_a_key_set_is_refused_with_the_place_that_is_wrong(
        self, key_file: KeyFile, content: bytes, expected: str
    ) -> None:
        with pytest.raises(ConfigError, match=expected) as caught:
            auth_of(jwt_key_file=key_file(content))
        assert caught.value.key == "--jwt-key-file"

    def test_there_is_one_key_or_none(self, key_file: KeyFile) -> None:
        file = key_file(pem(EC_KEY))
        with pytest.raises(ConfigError, match="because --jwt-secret already") as caught:
            auth_of(jwt_secret=SECRET, jwt_key_file=file)
        assert SECRET not in str(caught.value)
        with pytest.raises(ConfigError, match="because --jwt-secret-file already"):
            auth_of(jwt_secret_file=file, jwt_key_file=file)

    def test_an_issuer_or_audience_without_a_key_protects_nothing_and_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="--jwt-issuer"):
            auth_of(jwt_issuer="https://id.example")
        with pytest.raises(ConfigError, match="--jwt-audience"):
            auth_of(jwt_audience="labels")

    def test_no_repr_shows_a_key(self, auth: StreamAuth) -> None:
        assert auth._keys is not None
        assert SECRET not in repr(auth) + repr(auth._keys())


class TestWhereTheTokenStands:
    def test_a_token_is_taken_from_the_header_the_cookie_or_the_url(self, auth: StreamAuth) -> None:
        token = signed(sub="x")
        for request in (asking(token), asking(cookie=token), asking(query=token)):
            assert auth.authorize(request).subject == "x"

    @pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
    def test_the_scheme_may_be_written_in_any_case(self, auth: StreamAuth, scheme: str) -> None:
        headers = {"Authorization": f"{scheme} {signed(sub='x')} "}
        request = make_mocked_request("GET", "/stream", headers=headers)
        assert auth.authorize(request).subject == "x"

    def test_a_token_in_the_url_lives_five_minutes_at_most(self, auth: StreamAuth) -> None:
        assert QUERY_TOKEN_MAX_SECONDS == 300
        auth.authorize(asking(query=signed(iat=NOW - 200, exp=NOW + 100)))
        for claims in (
            {"iat": NOW - 200, "exp": NOW + 102},
            {"iat": NOW, "exp": NOW + 301.5},
            {"iat": ..., "exp": NOW + 10},
        ):
            token = signed(claims)
            message = refusal(auth, asking(query=token), token)
            expected = "the claim iat is missing" if claims["iat"] is ... else "a token in the URL"
            assert message.startswith(expected)
            auth.authorize(asking(token))
            auth.authorize(asking(cookie=token))

    def test_what_the_client_puts_there_wins_over_the_cookie(self, auth: StreamAuth) -> None:
        chosen, ambient = signed(sub="chosen"), signed(sub="ambient")
        for cookie in (ambient, signed(exp=NOW - 999), "junk"):
            assert auth.authorize(asking(chosen, cookie=cookie)).subject == "chosen"
            assert auth.authorize(asking(cookie=cookie, query=chosen)).subject == "chosen"
        # And a bad one is not made good by the cookie.
        refusal(auth, asking("junk", cookie=ambient))
        refusal(auth, asking(query="junk", cookie=ambient))

    @pytest.mark.parametrize(
        ("path", "headers"),
        [
            ("/stream?access_token={0}", [("Authorization", "Bearer {0}")]),
            ("/stream?access_token={0}&access_token={0}", []),
            ("/stream", [("Authorization", "Bearer {0}"), ("Authorization", "Bearer {0}")]),
            ("/stream?access_token=", [("Authorization", "Bearer {0}")]),
            ("/stream?access_token=", []),
            ("/stream", [("Authorization", "Bearer")]),
            ("/stream", [("Authorization", "Bearer  ")]),
        ],
    )
    def test_two_tokens_or_an_empty_one_are_an_invalid_request(
        self, auth: StreamAuth, path: str, headers: list[tuple[str, str]]
    ) -> None:
        from multidict import CIMultiDict

        token = signed()
        given = CIMultiDict((name, value.format(token)) for name, value in headers)
        request = make_mocked_request("GET", path.format(token), headers=given)
        with pytest.raises(InvalidRequest) as caught:
            auth.authorize(request)
        assert (caught.value.status, caught.value.name) == (400, "InvalidRequest")
        challenge = caught.value.headers["WWW-Authenticate"]
        matched = CHALLENGE.fullmatch(challenge)
        assert matched is not None
        assert matched[1] == "invalid_request"
        assert token not in str(caught.value) + challenge
        # What one error was told must not show on the next.
        assert not InvalidRequest("x").headers

    def test_another_scheme_and_an_emptied_cookie_are_no_token(self, auth: StreamAuth) -> None:
        headers = {"Authorization": "Basic dXNlcjpwYXNz", "Cookie": f"{COOKIE}="}
        with pytest.raises(AuthRequired) as caught:
            auth.authorize(make_mocked_request("GET", "/stream", headers=headers))
        assert "error=" not in caught.value.headers["WWW-Authenticate"]
        token = signed(sub="x")
        headers = {"Authorization": "Basic dXNlcjpwYXNz", "Cookie": f"{COOKIE}={token}"}
        request = make_mocked_request("GET", "/stream", headers=headers)
        assert auth.authorize(request).subject == "x"


class TestNarrowing:
    GRANT = Grant(frozenset({ALICE, BOB}))

    def test_an_open_grant_leaves_what_was_asked(self) -> None:
        asked = Filter(sources=frozenset({CAROL}))
        assert within_grant(None, PUBLIC) is None
        assert within_grant(asked, PUBLIC) is asked

    def test_who_asks_for_nothing_gets_what_is_granted(self) -> None:
        assert within_grant(None, self.GRANT) == Filter(sources=frozenset({ALICE, BOB}))
        asked = Filter(
            uris=frozenset({"at://x"}), uri_prefixes=("at://y",), values=frozenset({"v"})
        )
        filter = within_grant(asked, self.GRANT)
        assert filter == Filter(
            frozenset({ALICE, BOB}), asked.uris, asked.uri_prefixes, asked.values
        )

    def test_who_asks_for_less_gets_less(self) -> None:
        asked = Filter(sources=frozenset({BOB}), values=frozenset({"spam"}))
        assert within_grant(asked, self.GRANT) == asked

    def test_who_asks_for_more_is_forbidden_to(self) -> None:
        asked = Filter(sources=frozenset({ALICE, CAROL}))
        with pytest.raises(Forbidden, match=r"may not read 'did:plc:carol'") as caught:
            within_grant(asked, self.GRANT)
        assert caught.value.status == 403
        matched = CHALLENGE.fullmatch(caught.value.headers["WWW-Authenticate"])
        assert matched is not None
        assert matched[1] == "insufficient_scope"
