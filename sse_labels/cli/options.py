"""Options of the command line, made from the settings.

Promises: every option is also an environment variable. Its help shows its default. Only
`setting_parsers` checks its value. An error names the option or the variable, as the user gave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from typing import Any
from urllib.parse import SplitResult, urlsplit

import click
from click.core import ParameterSource

from sse_labels.cli.layout import Option
from sse_labels.config import Settings, env_name, option_name, read
from sse_labels.embedded import default_data_dir
from sse_labels.errors import ConfigError
from sse_labels.setting_parsers import Expected, Parse, boolean, words

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def settings_options(*names: str, **defaults: str) -> Decorator:
    """Add the options of the named settings, or of all settings; each value is a text or None.

    `defaults` are shown instead of the settings' defaults; give them to `load`, too.
    """
    chosen, group = [], None
    for spec in fields(Settings):
        group = spec.metadata["group"] or group
        if not names or spec.name in names:
            chosen.append((spec, group))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for spec, group in reversed(chosen):
            flag = option_name(spec.name)
            more: dict[str, Any] = {"metavar": spec.metadata["metavar"]}
            if isinstance(spec.default, bool):
                flag = f"{flag}/--no-{flag[2:]}"
                more = {"callback": _as_text}
            elif isinstance(spec.default, tuple):
                # `--host a,b` and `--host a --host b` mean the same.
                more |= {"multiple": True, "callback": _joined}
            add = click.option(
                flag, spec.name, cls=Option, default=None, env=env_name(spec.name),
                shown_default=defaults.get(spec.name, _shown(spec.name, spec.default)),
                group=group, help=spec.metadata["help"], **more,
            )  # fmt: skip
            command = add(command)
        return command

    return decorate


def option(
    name: str, parse: Parse, text: str, *, metavar: str | None = None, default: str | None = None,
    shown_default: str | None = None, secret: bool = False,
) -> Decorator:  # fmt: skip
    """Add one option that is not a setting of `serve`; the command gets the parsed value."""

    def check(context: click.Context, parameter: click.Parameter, given: str | None) -> Any:
        found = read(name, parse, {name: given}, secret=secret)
        if name in found:
            return found[name]
        return None if default is None else parse(default)

    return click.option(
        option_name(name), name, cls=Option, default=None, metavar=metavar, callback=check,
        env=env_name(name), shown_default=shown_default or default or "none", group=None, help=text,
    )  # fmt: skip


def url_argument(parse: Parse, default: str | None = None) -> Decorator:
    """Add the argument URL or SSE_LABELS_URL; the command gets the parsed value."""

    def check(context: click.Context, parameter: click.Parameter, given: str | None) -> Any:
        try:
            found = read("url", parse, {"url": given})
        except ConfigError as error:
            key = error.key.replace("--url", "URL")
            raise ConfigError(key, error.value, error.expected) from None
        return found.get("url") or (default and parse(default))

    return click.argument("url", required=False, callback=check)


def switch(name: str, text: str) -> Decorator:
    """Add an option without a value, off by default."""

    def check(context: click.Context, parameter: click.Parameter, given: bool | None) -> bool:
        found = read(name, boolean, {name: _as_text(context, parameter, given)})
        return bool(found.get(name, False))

    return click.option(
        option_name(name), name, cls=Option, is_flag=True, default=None, callback=check,
        env=env_name(name), shown_default="off", group=None, help=text,
    )  # fmt: skip


def key_of(name: str) -> str:
    """Return how the user gave the setting `name`: its option, or its environment variable."""
    source = click.get_current_context().get_parameter_source(name)
    in_environment = source is not ParameterSource.COMMANDLINE and read(name, str, {})
    return env_name(name) if in_environment else option_name(name)


@contextlib.contextmanager
def named_as_given() -> Iterator[None]:
    """Let a ConfigError of the block name SSE_LABELS_PORT when the user did not write --port."""
    try:
        yield
    except ConfigError as error:
        name = error.key.removeprefix("--").replace("-", "_")
        if not error.key.startswith("--") or key_of(name) == error.key:
            raise
        raise type(error)(key_of(name), error.value, error.expected) from error


def url_parts(text: str, schemes: Collection[str], expected: str) -> SplitResult:
    """Return the parts of an address; raise Expected when it has another scheme or no host."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in schemes and parts.hostname and parts.port != 0
        # The resolver encodes the name too, and would raise another error.
        (parts.hostname or "").encode("idna")
    except ValueError:
        good = False
    if not good or not text.isprintable() or " " in text:
        raise Expected(expected)
    return parts


def server_url(text: str) -> str:
    """Read the address of a server or of a stream; an ending slash is dropped."""
    url_parts(text, ("http", "https"), "an address such as http://127.0.0.1:8080")
    return text.rstrip("/")


def token_text(text: str) -> str:
    """Read a token that can stand in a header (RFC 9110, 5.5: visible ASCII)."""
    if text.isascii() and text.isprintable() and " " not in words(text):
        return text
    raise Expected("a token of visible ASCII characters, without spaces")


#: The option of commands that read streams.
token_option = option(
    "token", token_text, "Token of a reader, for a server that needs one.", secret=True
)


def _shown(name: str, default: Any) -> str:
    if name == "data_dir":
        return shown_data_dir()
    if default is None:
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    if name.endswith("_bytes"):
        return _shown_bytes(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def shown_data_dir() -> str:
    """Return the default of --data-dir for the help; never raises."""
    try:
        return str(default_data_dir())
    except ConfigError:
        return "none, without a home"


def _shown_bytes(number: int) -> str:
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if number and number % factor == 0:
            return f"{number // factor}{unit}"
    return str(number)


def _joined(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...] | None
) -> str | None:
    return ",".join(given) if given else None


def _as_text(context: click.Context, parameter: click.Parameter, given: bool | None) -> str | None:
    return None if given is None else str(given).lower()
