"""Hosts and addresses: which are public, which are well written, which an operator allows beside the public ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")  # stands for the IPv4 address of its last four bytes
_NEVER = tuple(
    map(
        ip_network,
        (
            "168.63.129.16/32",  # Azure's host, which holds metadata: public in form alone
            "192.0.0.0/24",  # for protocols, Oracle's metadata among them; older Pythons take most of it for public
            "192.88.99.0/24",  # leads to IPv4 addresses, as the next two do: 6to4's relays, 6to4, Teredo
            "2002::/16",
            "2001::/23",
            "3fff::/20",  # for documentation
        ),
    )
)


@dataclass(frozen=True)
class Allowed:
    """What an operator allows beside public addresses."""

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Self:
        """The entries of a list with commas: networks, addresses, names of hosts; ValueError names a wrong one."""
        networks, hosts = [], set()
        for entry in filter(None, (part.strip().lower() for part in text.split(","))):
            try:
                networks.append(ip_network(entry))
            except ValueError:
                if not is_name(entry):
                    wrong = f"{entry!r} is no network (such as 10.0.0.0/8), address or name of a host"
                    raise ValueError(wrong) from None
                hosts.add(entry)
        return cls(tuple(networks), frozenset(hosts))

    def has(self, host: str, address: Address) -> bool:
        """Whether the host is allowed by its name, or the address by its network."""
        return host in self.hosts or any(address in network for network in self.networks)


def is_public(address: Address) -> bool:
    """Whether the address belongs to the public Internet, where strangers are: unicast, and leads nowhere else."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(address.packed[-4:]))
        if address not in _UNICAST:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NEVER)


def read_address(host: str) -> Address | None:
    """The address that is written there, in its usual form; that of an IPv4-mapped one is IPv4. None if it is none."""
    try:
        return None if "%" in host else unmapped(ip_address(host))
    except ValueError:
        return None


def unmapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def is_name(host: str) -> bool:
    """Whether it is a plain name of a host, and nothing that the C library reads as an address.

    That takes 2130706433, 0x7f.1 and 0177.0.0.1 for 127.0.0.1.
    """
    return len(host) <= 253 and bool(_NAME.fullmatch(host)) and not _NUMBER.fullmatch(host.rpartition(".")[2])
