"""Public addresses, and all that only look so."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_server.intake.addresses import is_public

# fmt: off
INSIDE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1",
    "127.255.255.254", "168.63.129.16", "169.254.0.1", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255",
    "192.0.0.1", "192.0.0.9", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
]
OUTSIDE = [
    "1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.0", "126.255.255.255", "168.63.129.15",
    "172.15.255.255", "172.32.0.0",
]

INSIDE_V6 = [
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:0:8.8.8.8", "64:ff9b:1::808:808", "64:ff9b:1:a00:0:100::",
    "64:ff9b:0:1::808:808", "100::1", "2001::1", "2001:0:808:808::", "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1",
    "2002:7f00:1::", "2002:808:808::", "3fff::1", "3fff:fff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1",
    "fe80::5efe:7f00:1", "fec0::1", "ff02::1", "ff0e::1", "2606:4700::1%eth0",
]
OUTSIDE_V6 = [
    "2606:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "2001:200::1", "2003::1", "3ffe::1",
]
# fmt: on


@pytest.mark.parametrize("text", INSIDE + INSIDE_V6)
def test_inner_and_reserved_addresses_are_not_public(text: str) -> None:
    """No address of a special-purpose registry, of a cloud's own services, or with a zone is public."""
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", OUTSIDE + OUTSIDE_V6)
def test_addresses_of_the_internet_are_public(text: str) -> None:
    """Ordinary addresses are public, up to the edges of the special networks."""
    assert is_public(ip_address(text))


@given(st.ip_addresses(v=4) | st.sampled_from(INSIDE + OUTSIDE).map(IPv4Address))
def test_an_address_within_an_address_is_judged_as_itself(address: IPv4Address) -> None:
    """Mapped and NAT64 forms are as public as what they hold; compatible, 6to4, Teredo, and local NAT64 forms never are."""
    number = int(address)
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        assert is_public(IPv6Address(int(IPv6Address(prefix)) + number)) == is_public(address)
    teredo = int(IPv6Address("2001::")) + (number ^ 0xFFFF_FFFF)
    for hidden in (number, int(IPv6Address("2002::")) + (number << 80), teredo, int(IPv6Address("64:ff9b:1::")) + number):
        assert not is_public(IPv6Address(hidden))


@given(st.ip_addresses(v=4))
def test_what_python_calls_private_is_never_public(address: IPv4Address) -> None:
    """The tables here only ever take away from those of the standard library."""
    assert not is_public(address) or (address.is_global and not address.is_multicast and not address.is_reserved)


@given(st.ip_addresses(v=6))
def test_what_python_calls_private_is_never_public_in_ipv6(address: IPv6Address) -> None:
    """Outside the space that is given out to networks, only mapped and NAT64 addresses can be public."""
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert int(address) >> 125 == 1 or address.ipv4_mapped or int(address) >> 32 == 0x64_FF9B << 64
