"""Which addresses are out on the public internet.

`ipaddress` alone does not say so: its tables follow the Python release (3.11.7 calls ``3fff::1`` and ``168.63.129.16`` global),
it calls multicast groups and ``::127.0.0.1`` global, and it judges an IPv6 address by its prefix, not by the IPv4 address
inside. The networks below are those of IANA's special-purpose registries (RFC 6890) that are not reachable from everywhere,
and those that clouds answer on.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

_NOT_PUBLIC_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network (RFC 791); Linux takes 0.0.0.0 for the machine itself
            "10.0.0.0/8",  # private (RFC 1918)
            "100.64.0.0/10",  # behind a carrier's translation (RFC 6598); 100.100.100.200 is Alibaba's metadata service
            "127.0.0.0/8",  # loopback (RFC 1122)
            "168.63.129.16/32",  # Azure's platform service: registered as public, answered from inside
            "169.254.0.0/16",  # link-local (RFC 3927); 169.254.169.254 and .170.2 are metadata services
            "172.16.0.0/12",  # private (RFC 1918)
            "192.0.0.0/24",  # protocol assignments (RFC 6890); 192.0.0.192 is Oracle's metadata service
            "192.0.2.0/24",  # documentation (RFC 5737)
            "192.88.99.0/24",  # relays of 6to4, withdrawn (RFC 7526)
            "192.168.0.0/16",  # private (RFC 1918)
            "198.18.0.0/15",  # benchmarks (RFC 2544)
            "198.51.100.0/24",  # documentation (RFC 5737)
            "203.0.113.0/24",  # documentation (RFC 5737)
            "224.0.0.0/4",  # multicast (RFC 5771)
            "240.0.0.0/4",  # reserved (RFC 1112), broadcast included
        ),
    )
)

_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All that IANA has given out (RFC 4291); outside lie loopback, ``::127.0.0.1``, fc00::/7, fd00:ec2::254, fe80::/10, ff00::/8."""

_NOT_PUBLIC_V6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments (RFC 2928): Teredo, benchmarks, ORCHID
            "2001:db8::/32",  # documentation (RFC 3849)
            "2002::/16",  # 6to4 (RFC 3056): an IPv4 address in disguise, withdrawn by RFC 7526
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)

_NAT64 = IPv6Network("64:ff9b::/96")
"""IPv4 addresses as the translator of an IPv6-only network shows them (RFC 6052). Its sibling for local use, 64:ff9b:1::/48
(RFC 8215), stays refused: where in it the IPv4 address stands is the network's secret, so none can be checked."""


def is_public(address: Address) -> bool:
    """Say whether an address belongs to one machine on the public internet, and cannot mean one inside.

    An IPv4 address within an IPv6 one, mapped (``::ffff:…``) or translated (NAT64), is judged in its place. Those in Teredo and
    6to4 are refused whole, and so is every address with a zone.
    """
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _NOT_PUBLIC_V4)
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in _GLOBAL_UNICAST and address.is_global and not any(address in network for network in _NOT_PUBLIC_V6)
