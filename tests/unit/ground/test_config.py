"""Settings: where each comes from, and what is said about one that cannot be used."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_labels import config
from sse_labels.config import ENV_PREFIX, Settings, env_name, load, option_name, read
from sse_labels.errors import ConfigError
from sse_labels.logs import configure_logging
from sse_labels.setting_parsers import (
    Expected,
    boolean,
    integer,
    one_of,
    origins,
    path,
    seconds,
    size,
    words,
)


class Sample(NamedTuple):
    """One setting: a text other than its default, what that means, and a text it refuses."""

    text: str
    value: Any
    wrong: str


SAMPLES = {
    "host": Sample("::1, localhost,::1", ("::1", "localhost"), " , "),
    "port": Sample("0", 0, "65536"),
    "workers": Sample("8", 8, "65"),
    "dsn": Sample("host=db password=secret", "host=db password=secret", "  "),
    "data_dir": Sample("/var/lib/x", Path("/var/lib/x"), "\t"),
    "source": Sample("ozone", "ozone", "Ozone"),
    "unsigned": Sample("withhold", "withhold", "drop"),
    "migrate": Sample("no", False, "maybe"),
    "publish_token": Sample("hunter2", "hunter2", "\n"),
    "publish_tokens_file": Sample("/etc/x/tokens", Path("/etc/x/tokens"), " "),
    "jwt_secret": Sample("s" * 32, "s" * 32, "\t "),
    "jwt_secret_file": Sample("/etc/x/secret", Path("/etc/x/secret"), " "),
    "jwt_key_file": Sample("/etc/x/jwks.json", Path("/etc/x/jwks.json"), " "),
    "jwt_issuer": Sample("https://issuer.example", "https://issuer.example", " "),
    "jwt_audience": Sample("labels", "labels", " "),
    "signing_key_file": Sample("/etc/x/key", Path("/etc/x/key"), " "),
    "signing_did": Sample("did:web:a.example", "did:web:a.example", "a.example"),
    "source_keys_file": Sample("/etc/x/keys", Path("/etc/x/keys"), " "),
    "cors_origins": Sample("https://a.example", ("https://a.example",), "a.example"),
    "heartbeat_seconds": Sample("7.5", 7.5, "0"),
    "retry_min_seconds": Sample("1", 1.0, "-1"),
    "retry_max_seconds": Sample("60", 60.0, "3601"),
    "send_timeout_seconds": Sample("10", 10.0, "soon"),
    "slow_grace_seconds": Sample("0", 0.0, "-0.1"),
    "drain_seconds": Sample("0.5", 0.5, "nan"),
    "page_max_events": Sample("100000", 100_000, "0"),
    "outbox_max_events": Sample("77", 77, "1e3"),
    "ring_max_bytes": Sample("1GiB", 1024**3, "1GB"),
    "page_cache_max_bytes": Sample("0", 0, "-1"),
    "backfill_max_reads": Sample("9", 9, "101"),
    "poll_seconds": Sample("0.25", 0.25, "0.001"),
    "gather_seconds": Sample("0", 0.0, "11"),
    "query_timeout_seconds": Sample("3600", 3600.0, "inf"),
    "connect_timeout_seconds": Sample("2", 2.0, "0x2"),
    "body_max_bytes": Sample("64 KiB", 65536, "0"),
    "publish_max_labels": Sample("1", 1, "+1"),
    "retention_max_age_seconds": Sample("86400", 86_400.0, "0.5"),
    "retention_max_labels": Sample("1000000", 1_000_000, "0"),
    "retention_sweep_seconds": Sample("5", 5.0, "0.01"),
    "retention_batch_labels": Sample("10", 10, "100001"),
    "max_streams": Sample("3", 3, "3.0"),
    "max_connections": Sample("5", 5, "0"),
    "max_per_address": Sample("2", 2, "-1"),
    "trusted_proxies": Sample("10.0.0.0/8", (ip_network("10.0.0.0/8"),), "10.0.0.1/8"),
    "request_seconds": Sample("3", 3.0, "0"),
    "keepalive_seconds": Sample("60", 60.0, "3601"),
    "publish_rate_labels": Sample("100", 100, "0.5"),
    "publish_burst_labels": Sample("5", 5, "0"),
    "send_buffer_bytes": Sample("4KiB", 4096, "4095"),
    "log_level": Sample("debug", "debug", "DEBUG"),
    "log_format": Sample("json", "json", "xml"),
    "log_lines_per_address": Sample("60", 60, "1"),
}
SECRETS = {"dsn", "jwt_secret", "publish_token"}
NAMES = [spec.name for spec in fields(Settings)]


def refusal(options: dict[str, str | None], environ: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(options, environ)
    return caught.value


class TestEverySetting:
    def test_each_is_tried_here(self) -> None:
        assert SAMPLES.keys() == set(NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_taken_from_its_option(self, name: str) -> None:
        sample = SAMPLES[name]
        assert getattr(load({name: sample.text}, {}), name) == sample.value

    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_taken_from_its_environment_variable(self, name: str) -> None:
        sample = SAMPLES[name]
        settings = load({name: None}, {f"SSE_LABELS_{name.upper()}": sample.text})
        assert getattr(settings, name) == sample.value

    @pytest.mark.parametrize("name", NAMES)
    def test_the_option_wins_over_the_environment(self, name: str) -> None:
        sample = SAMPLES[name]
        settings = load({name: sample.text}, {env_name(name): sample.wrong})
        assert getattr(settings, name) == sample.value

    @pytest.mark.parametrize("name", NAMES)
    def test_it_has_a_default_that_its_own_parser_accepts(self, name: str) -> None:
        [spec] = [spec for spec in fields(Settings) if spec.name == name]
        default = getattr(load({}, {}), name)
        assert default == spec.default == getattr(Settings(), name)
        assert default != SAMPLES[name].value
        if default is not None:
            written = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert spec.metadata["parse"](written) == default

    @pytest.mark.parametrize("name", NAMES)
    def test_an_empty_variable_is_an_unset_one(self, name: str) -> None:
        assert load({}, {env_name(name): ""}) == Settings()

    @pytest.mark.parametrize("name", NAMES)
    def test_a_wrong_option_is_named_as_it_was_written(self, name: str) -> None:
        error = refusal({name: SAMPLES[name].wrong}, {})
        assert error.key == "--" + name.replace("_", "-")
        assert str(error).startswith(f"{error.key}: got ")

    @pytest.mark.parametrize("name", NAMES)
    def test_a_wrong_variable_is_named_as_it_was_written(self, name: str) -> None:
        error = refusal({}, {env_name(name): SAMPLES[name].wrong})
        assert error.key == "SSE_LABELS_" + name.upper()
        assert str(error).startswith(f"{error.key}: got ")

    @pytest.mark.parametrize("name", NAMES)
    def test_a_wrong_one_is_shown_with_what_was_expected_unless_it_is_secret(
        self, name: str
    ) -> None:
        error = refusal({name: SAMPLES[name].wrong}, {})
        assert error.value == ("(not shown)" if name in SECRETS else SAMPLES[name].wrong)
        assert repr(error.value) in str(error)
        assert str(error).endswith(f"expected {error.expected}")
        assert error.expected
        # The parser's error would show the value again in a traceback.
        assert error.__cause__ is None
        assert error.__suppress_context__

    @pytest.mark.parametrize("name", NAMES)
    def test_it_has_a_line_of_help_and_a_unit_in_its_name(self, name: str) -> None:
        [spec] = [spec for spec in fields(Settings) if spec.name == name]
        assert spec.metadata["help"].endswith(".")
        assert spec.metadata["secret"] == (name in SECRETS)
        if isinstance(spec.default, int | float) and not isinstance(spec.default, bool):
            units = ("_seconds", "_bytes", "_events", "_reads", "_labels", "_streams")
            counted = ("port", "workers", "max_connections", "max_per_address")
            assert name.endswith((*units, "_lines_per_address")) or name in counted

    @pytest.mark.parametrize("name", sorted(SECRETS))
    @pytest.mark.parametrize("secret", ["", " ", "\t\n"])
    def test_no_secret_is_ever_shown(self, name: str, secret: str) -> None:
        error = refusal({name: secret}, {})
        assert "(not shown)" in str(error)
        assert repr(secret) not in str(error)


class TestLoading:
    def test_without_anything_all_are_defaults(self) -> None:
        assert load({}, {}) == Settings()

    def test_all_can_be_given_at_once(self) -> None:
        options: dict[str, str | None] = {name: sample.text for name, sample in SAMPLES.items()}
        environ = {env_name(name): sample.text for name, sample in SAMPLES.items()}
        expected = Settings(**{name: sample.value for name, sample in SAMPLES.items()})
        assert load(options, {}) == load({}, environ) == expected

    def test_they_are_frozen(self) -> None:
        settings = load({}, {})
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.port = 1  # type: ignore[misc]

    def test_the_processs_environment_is_read_when_none_is_given(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSE_LABELS_PORT", "1234")
        assert load({}).port == 1234
        assert load({}, {}).port == 8080

    def test_variables_of_others_and_in_another_case_are_not_ours(self) -> None:
        assert load({}, {"PORT": "1", "sse_labels_port": "2", "SSE_LABELS_PORTS": "3"}).port == 8080

    def test_what_is_no_setting_is_not_looked_at(self) -> None:
        assert load({"unknown": "x"}, {"SSE_LABELS_UNKNOWN": "x"}) == Settings()

    def test_an_option_that_is_not_a_setting_is_read_alike(self) -> None:
        parse = seconds(1, 10)
        assert read("pause_seconds", parse, {"pause_seconds": "2"}, {}) == {"pause_seconds": 2.0}
        assert read("pause_seconds", parse, {}, {"SSE_LABELS_PAUSE_SECONDS": "3"}) == {
            "pause_seconds": 3.0
        }
        assert read("pause_seconds", parse, {"pause_seconds": None}, {}) == {}
        with pytest.raises(ConfigError, match="--pause-seconds: got '0'"):
            read("pause_seconds", parse, {"pause_seconds": "0"}, {})

    def test_names_are_derived_from_one_word(self) -> None:
        assert option_name("poll_seconds") == "--poll-seconds"
        assert env_name("poll_seconds") == "SSE_LABELS_POLL_SECONDS"
        assert ENV_PREFIX == "SSE_LABELS_"

    def test_only_this_file_reads_the_environment(self) -> None:
        package = Path(config.__file__).parent
        readers = {
            file.name
            for file in package.rglob("*.py")
            if any(word in file.read_text() for word in ("os.environ", "os.getenv", "environb"))
        }
        # The database's child process gets an environment; it takes no setting from it.
        assert readers - {"embedded.py"} == {"config.py"}


class TestSettingsTogether:
    def test_the_longest_retry_is_not_below_the_shortest(self) -> None:
        error = refusal({"retry_min_seconds": "10", "retry_max_seconds": "9.5"}, {})
        assert (error.key, error.value) == ("--retry-max-seconds", 9.5)
        assert error.expected == "at least --retry-min-seconds, which is 10"

    def test_a_shortest_above_the_default_longest_is_refused_too(self) -> None:
        assert refusal({}, {"SSE_LABELS_RETRY_MIN_SECONDS": "6"}).key == "--retry-max-seconds"

    def test_both_may_be_the_same(self) -> None:
        settings = load({"retry_min_seconds": "3", "retry_max_seconds": "3"}, {})
        assert settings.retry_min_seconds == settings.retry_max_seconds == 3.0


class TestParsers:
    @given(st.integers(-(10**20), 10**20))
    def test_a_whole_number_is_taken_within_its_limits(self, number: int) -> None:
        parse = integer(5, 10**18)
        if 5 <= number <= 10**18:
            assert parse(str(number)) == number
        else:
            with pytest.raises(Expected, match=r"a whole number from 5 to 1000000000000000000"):
                parse(str(number))

    @pytest.mark.parametrize(
        "text", ["", " 7", "7 ", "1_0", "+7", "٧", "²", "7.0", "0x7", "7" * 5000]
    )
    def test_only_plain_digits_are_a_whole_number(self, text: str) -> None:
        with pytest.raises(Expected):
            integer(0, 10**18)(text)

    @pytest.mark.parametrize("text", ["0.05", "1", "1.", ".5", "1e1", "3600"])
    def test_seconds_may_have_a_fraction(self, text: str) -> None:
        assert seconds(0.05, 3600)(text) == float(text)

    @pytest.mark.parametrize("text", ["", "x", "0.04", "3600.1", "-1", "nan", "inf", "-inf", "1,5"])
    def test_other_seconds_are_refused(self, text: str) -> None:
        with pytest.raises(Expected, match=r"^seconds from 0\.05 to 3600$"):
            seconds(0.05, 3600)(text)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0", 0),
            ("1048576", 2**20),
            ("1KiB", 2**10),
            ("3 KiB", 3 * 2**10),
            ("64MiB", 64 * 2**20),
            ("2GiB", 2 * 2**30),
            ("0GiB", 0),
        ],
    )
    def test_a_size_is_bytes_or_has_a_unit(self, text: str, expected: int) -> None:
        assert size(0, 2 * 2**30)(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            *("", "KiB", " KiB", "1kib", "1KB", "1K", "1.5KiB", "-1KiB", "1KiB ", "1 0KiB"),
            *("1KiBKiB", "1TiB", "3GiB", "9" * 30 + "KiB"),
        ],
    )
    def test_other_sizes_are_refused(self, text: str) -> None:
        with pytest.raises(Expected, match=r"bytes from 0 to 2147483648, e\.g\. 1048576 or 1MiB"):
            size(0, 2 * 2**30)(text)

    @given(st.integers(0, 2**40), st.sampled_from(["", "KiB", "MiB", "GiB"]))
    def test_a_size_keeps_its_limits_whatever_the_unit(self, number: int, unit: str) -> None:
        factor = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
        low, high = 2**12, 2**36
        if low <= number * factor <= high:
            assert size(low, high)(f"{number}{unit}") == number * factor
        else:
            with pytest.raises(Expected):
                size(low, high)(f"{number}{unit}")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [(text, True) for text in ("1", "true", "True", "YES", "on")]
        + [(text, False) for text in ("0", "false", "FALSE", "no", "Off")],
    )
    def test_a_switch_is_read_the_way_shells_write_it(self, text: str, expected: bool) -> None:
        assert boolean(text) is expected

    @pytest.mark.parametrize("text", ["", "2", "y", "enabled", " true"])
    def test_no_other_word_is_a_switch(self, text: str) -> None:
        with pytest.raises(Expected, match="true or false"):
            boolean(text)

    def test_words_lose_the_space_around_them(self) -> None:
        # A token read from a file ends with a line feed.
        assert words(" a b\n") == "a b"

    def test_a_path_may_begin_at_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ada")
        assert path("~/data") == Path("/home/ada/data")
        assert path("data/~") == Path("data/~")

    def test_one_of_a_list_is_taken_exactly(self) -> None:
        parse = one_of("info", "error")
        assert parse("info") == "info"
        for text in ("Info", "info ", "", "warning"):
            with pytest.raises(Expected, match="one of info, error"):
                parse(text)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("*", ("*",)),
            ("https://a.example", ("https://a.example",)),
            (" https://a , http://localhost:3000,", ("https://a", "http://localhost:3000")),
            ("http://[::1]:8080", ("http://[::1]:8080",)),
            (" , ", ()),
        ],
    )
    def test_origins_are_separated_by_commas(self, text: str, expected: tuple[str, ...]) -> None:
        assert origins(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "https://a.example/",
                "https://a.example/path",
                "a.example",
                "//a.example",
                "ftp://a",
            ),
            *("null", "https://a.example?x", "https://*.example/x", "https://a.example, b"),
        ],
    )
    def test_what_is_no_origin_is_refused(self, text: str) -> None:
        with pytest.raises(Expected, match=r"origins such as https://example\.com"):
            origins(text)


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_every_log_level_is_one_that_logging_knows(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(logging, "basicConfig", lambda **options: given.update(options))
    configure_logging(level)
    assert given["level"] in logging.getLevelNamesMapping()
    assert load({"log_level": level}, {}).log_level == level


def test_each_worker_gets_its_share_of_limits_rounded_down_and_at_least_one() -> None:
    settings = Settings(
        workers=4, max_connections=4003, max_per_address=3, publish_rate_labels=10,
        publish_burst_labels=100,
    )  # fmt: skip
    share = settings.of_one_worker()
    assert (share.max_connections, share.max_per_address, share.publish_rate_labels) == (1000, 1, 2)
    assert (share.max_streams, share.backfill_max_reads) == (3750, 1)
    # A request of so many labels is one worker's.
    assert share.publish_burst_labels == 100
    # Fewer than two would write no stream's lines, which come in pairs.
    assert Settings(workers=40, log_lines_per_address=60).of_one_worker().log_lines_per_address == 2
    # Of no limit each has none.
    assert Settings(workers=4).of_one_worker().publish_rate_labels is None
    assert Settings().of_one_worker() == Settings()
