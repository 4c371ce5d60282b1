"""Who the client is, and how much one address may hold."""

from __future__ import annotations

from ipaddress import ip_network
from unittest.mock import Mock

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from sse_labels.errors import TooManyFromAddress
from sse_labels.web.addresses import PerAddress, TrustedProxies, group

PROXIES = TrustedProxies([ip_network("127.0.0.0/8"), ip_network("10.1.0.0/16"), ip_network("::1")])


def client_of(peer: str, *forwarded: str) -> str:
    transport = Mock()
    transport.get_extra_info.side_effect = {"peername": (peer, 4711)}.get
    headers = CIMultiDict([("X-Forwarded-For", value) for value in forwarded])
    return PROXIES.client(make_mocked_request("GET", "/", headers, transport=transport))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("198.51.100.7", [], "198.51.100.7"),
        ("198.51.100.7", ["203.0.113.9"], "198.51.100.7"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("127.0.0.1", ["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        ("127.0.0.1", ["6.6.6.6", "203.0.113.9"], "203.0.113.9"),
        ("127.0.0.1", ["6.6.6.6, 203.0.113.9, 10.1.2.3"], "203.0.113.9"),
        ("127.0.0.1", ["6.6.6.6, 10.2.2.3"], "10.2.2.3"),
        ("127.0.0.1", ["10.1.0.8, 10.1.2.3"], "10.1.0.8"),
        ("127.0.0.1", ["203.0.113.9, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["203.0.113.9, <script>, 10.1.2.3"], "10.1.2.3"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", ["203.0.113.9:5555"], "203.0.113.9"),
        ("127.0.0.1", ["[2001:db8::1]:5555"], "2001:db8::1"),
        ("127.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("127.0.0.1", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("::ffff:127.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("::1", ["203.0.113.9"], "203.0.113.9"),
    ],
)
def test_client_is_the_last_address_that_no_trusted_proxy_has(
    peer: str, forwarded: list[str], client: str
) -> None:
    assert client_of(peer, *forwarded) == client


def test_unix_socket_has_no_address() -> None:
    transport = Mock()
    transport.get_extra_info.side_effect = {"peername": ""}.get
    request = make_mocked_request("GET", "/", {"X-Forwarded-For": "6.6.6.6"}, transport=transport)
    assert PROXIES.client(request) == ""


@pytest.mark.parametrize(
    ("address", "counted_under"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_ipv6_addresses_are_counted_by_network(address: str, counted_under: str) -> None:
    assert group(address) == counted_under


def test_one_address_holds_as_many_as_it_may() -> None:
    per_address = PerAddress(2, exempt=PROXIES.trusts)
    held = [per_address.take(f"2001:db8::{number}") for number in (1, 2)]
    with pytest.raises(TooManyFromAddress, match="2001:db8::/64") as refused:
        per_address.take("2001:db8::3")
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "30"}
    held.append(per_address.take("2001:db8:0:1::1"))
    assert len(per_address) == 2
    per_address.give_back(held.pop(0))
    held.append(per_address.take("2001:db8::3"))
    for place in held:
        per_address.give_back(place)
    assert len(per_address) == 0


def test_trusted_proxies_hold_without_end() -> None:
    per_address = PerAddress(1, exempt=PROXIES.trusts)
    for _ in range(10):
        per_address.give_back(per_address.take("127.0.0.1"))
        per_address.take("10.1.2.3")
    assert len(per_address) == 0
