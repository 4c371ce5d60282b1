"""Options of the command line, made from the settings.

Promises: every option is also an environment variable, its help says its
default, and its value is checked in one place (`config`).
Does not belong here: what a command does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from sse_labels.config import Parse, Settings, env_name, option_name, read
from sse_labels.errors import ConfigError

Command = Callable[..., Any]


def settings_options(*names: str) -> Callable[[Command], Command]:
    """Add the options of the settings named, or of all; values arrive as text or None."""
    chosen = [spec for spec in fields(Settings) if not names or spec.name in names]

    def decorate(command: Command) -> Command:
        for spec in reversed(chosen):
            flag = option_name(spec.name)
            extra = _extra(spec.name, _shown(spec.default))
            if isinstance(spec.default, bool):
                option = click.option(
                    f"{flag}/--no-{flag[2:]}", spec.name, default=None, callback=_as_text,
                    help=spec.metadata["help"] + extra,
                )  # fmt: skip
            else:
                option = click.option(
                    flag, spec.name, default=None, metavar=spec.metadata["metavar"],
                    help=spec.metadata["help"] + extra,
                )  # fmt: skip
            command = option(command)
        return command

    return decorate


def option(
    name: str, parse: Parse, text: str, *, metavar: str, default: str | None = None
) -> Callable[[Command], Command]:
    """Add one option that is no setting of the server; the command gets the parsed value."""

    def check(context: click.Context, parameter: click.Parameter, given: str | None) -> Any:
        found = read(name, parse, {name: given})
        if name in found:
            return found[name]
        return None if default is None else parse(default)

    return click.option(
        option_name(name), name, default=None, metavar=metavar, callback=check,
        help=text + _extra(name, default),
    )  # fmt: skip


def switch(name: str, text: str) -> Callable[[Command], Command]:
    """Add an option without a value, off by default."""

    def check(context: click.Context, parameter: click.Parameter, given: bool | None) -> bool:
        from sse_labels.config import boolean

        found = read(name, boolean, {name: _as_text(context, parameter, given)})
        return bool(found.get(name, False))

    return click.option(
        option_name(name), name, is_flag=True, default=None, callback=check,
        help=text + _extra(name, None),
    )  # fmt: skip


def required(value: Any, name: str, expected: str) -> Any:
    """Return `value`, or raise ConfigError when nothing was given."""
    if value is None:
        raise ConfigError(option_name(name), None, f"{expected} (also as {env_name(name)})")
    return value


def _extra(name: str, default: str | None) -> str:
    shown = f"default: {default}; " if default is not None else ""
    return f"  [{shown}env: {env_name(name)}]"


def _shown(default: Any) -> str | None:
    if default is None:
        return None
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _as_text(context: click.Context, parameter: click.Parameter, given: bool | None) -> str | None:
    return None if given is None else str(given).lower()
