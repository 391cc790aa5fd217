"""Which network interface this machine will use to talk to the others, and what it can do."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from partial_fc.doctor.findings import Identity, Notes

# Linux: the address of an interface.
_SIOCGIFADDR = 0x8915
_USUAL_MTU = 1500


class Interface(NamedTuple):
    """One interface.

    Attributes:
        name: such as ``eth0``.
        address: IPv4; None: it has none.
        speed: Mb/s; None: unknown (virtual ones don't say).
        mtu: bytes of a packet; None: unknown.
        others: IPv6 addresses.
    """

    name: str
    address: str | None
    speed: int | None
    mtu: int | None
    others: tuple[str, ...] = ()

    @property
    def loopback(self) -> bool:
        """Whether it leads to this machine only."""
        return self.name.startswith("lo") or (self.address or "").startswith("127.")


class Network(NamedTuple):
    """What this machine says of its network; tests make their own.

    Attributes:
        interfaces: all of them.
        resolved: addresses that the machine's own name resolves to.
        route: this machine's address on the way to MASTER_ADDR; None: unknown.
        rdma: names of InfiniBand and RoCE devices.
    """

    interfaces: tuple[Interface, ...]
    resolved: tuple[str, ...]
    route: str | None
    rdma: tuple[str, ...]

    def named(self, name: str) -> Interface | None:
        """The interface with this name."""
        return next((one for one in self.interfaces if one.name == name), None)

    def at(self, address: str | None) -> Interface | None:
        """The interface with this address; all of 127.0.0.0/8 is the loopback's."""
        if address is not None and (address.startswith("127.") or address == "::1"):
            return next((one for one in self.interfaces if one.loopback), None)
        return next(
            (one for one in self.interfaces if address is not None and address in (one.address, *one.others)), None
        )


def read_network(host: str, master: str | None, sys_class: Path = Path("/sys/class")) -> Network:
    """Look at this machine.

    Args:
        host: its name.
        master: MASTER_ADDR; None: there is no other machine.
        sys_class: where Linux tells of devices.
    """
    interfaces = tuple(
        Interface(
            name,
            _address(name),
            _number(sys_class / "net" / name / "speed"),
            _number(sys_class / "net" / name / "mtu"),
            tuple(address for owner, address in _addresses6() if owner == name),
        )
        for _, name in socket.if_nameindex()
    )
    rdma = sys_class / "infiniband"
    devices = tuple(sorted(entry.name for entry in rdma.iterdir())) if rdma.is_dir() else ()
    return Network(interfaces, _resolve(host), _route(master), devices)


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            answer = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _addresses6(table: Path = Path("/proc/net/if_inet6")) -> list[tuple[str, str]]:
    """(interface, IPv6 address) of all; none where the system has no such table."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    return [(line.split()[5], socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0]))) for line in lines]


def _number(path: Path) -> int | None:
    """A number above 0 that the kernel shows; None where it doesn't (a link that is down, or virtual)."""
    try:
        value = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return value if value > 0 else None


def _resolve(host: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def _route(master: str | None) -> str | None:
    """This machine's address in packets to the master; no packet is sent."""
    if not master:
        return None
    try:
        for family, kind, protocol, _, target in socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
    except OSError:
        return None
    return None


def check_interfaces(notes: Notes, me: Identity, network: Network, environ: Mapping[str, str], *, on_gpu: bool) -> None:
    """Say which interface gloo and NCCL will take, and whether it leads to the other machines."""
    route = network.at(network.route)
    advice = route.name if route is not None and not route.loopback else _first_real(network)
    gloo, how = _gloo(notes, me, network, environ)
    nccl = _nccl(notes, network, environ) if on_gpu else None
    notes.facts["gloo"] = {**_facts(gloo), "how": how}
    if nccl is not None:
        notes.facts["nccl"] = {**_facts(nccl), "rdma": list(network.rdma)}
    if not me.several_hosts:
        return
    if gloo is not None and gloo.loopback:
        own = [address for address in network.resolved if network.at(address) == gloo] if how == "host name" else []
        cause = f", since the name {me.host} resolves to {own[0]}" if own else ""
        notes.warn(
            f"gloo takes {gloo.name}, which no other machine reaches{cause}. "
            f"export GLOO_SOCKET_IFNAME={advice}{', or correct /etc/hosts' if own else ''}"
        )
    if nccl is not None and nccl.loopback:
        notes.warn(f"NCCL takes {nccl.name}, which no other machine reaches. export NCCL_SOCKET_IFNAME={advice}")
    for name, one in (("gloo", gloo), ("NCCL", nccl)):
        if one is not None and one.mtu is not None and one.mtu < _USUAL_MTU and not one.loopback:
            notes.warn(
                f"{name} takes {one.name} with an MTU of {one.mtu}, expected {_USUAL_MTU} or 9000: packets are split "
                f"more than needed (ip link set {one.name} mtu {_USUAL_MTU}, if the network allows it)"
            )


def _gloo(notes: Notes, me: Identity, network: Network, environ: Mapping[str, str]) -> tuple[Interface | None, str]:
    """(interface, how it is chosen): the named one, else that of the address that the host's name resolves to."""
    given = environ.get("GLOO_SOCKET_IFNAME")
    if given:
        first = given.split(",")[0]
        one = network.named(first)
        if one is None:
            notes.fail(
                f"GLOO_SOCKET_IFNAME is {given!r}, expected one of {_names(network)}: correct it on this machine"
            )
        return one, "GLOO_SOCKET_IFNAME"
    own = [one for one in map(network.at, network.resolved) if one is not None]
    if own:
        return own[0], "host name"
    if me.several_hosts:
        got = ", ".join(network.resolved) or "nothing"
        notes.warn(
            f"the name {me.host} resolves to {got}, expected an address of this machine: gloo then takes the loopback. "
            f"export GLOO_SOCKET_IFNAME={_first_real(network)}, or add the name to /etc/hosts"
        )
    return next((one for one in network.interfaces if one.loopback), None), "fallback"


def _nccl(notes: Notes, network: Network, environ: Mapping[str, str]) -> Interface | None:
    """As NCCL chooses: by NCCL_SOCKET_IFNAME, else ib*, then any but docker* and lo, then docker*, then lo."""
    usable = [one for one in network.interfaces if one.address is not None]
    given = environ.get("NCCL_SOCKET_IFNAME")
    if given:
        chosen = select_interfaces(given, [one.name for one in usable])
        if not chosen:
            notes.fail(
                f"NCCL_SOCKET_IFNAME is {given!r}, which fits none of {_names(network)}: correct it on this machine"
            )
        return network.named(chosen[0]) if chosen else None

    def rank(one: Interface) -> int:
        return 0 if one.name.startswith("ib") else 3 if one.loopback else 2 if one.name.startswith("docker") else 1

    return min(usable, key=rank, default=None)


def select_interfaces(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that NCCL_SOCKET_IFNAME allows: prefixes; whole names after ``=``; all others after ``^``."""
    excluded = pattern.startswith("^")
    exact = pattern.removeprefix("^").startswith("=")
    parts = pattern.removeprefix("^").removeprefix("=").split(",")
    return [
        name for name in names if any(name == part if exact else name.startswith(part) for part in parts) != excluded
    ]


def _first_real(network: Network) -> str:
    real = [one.name for one in network.interfaces if one.address is not None and not one.loopback]
    return real[0] if real else "INTERFACE"


def _names(network: Network) -> str:
    return ", ".join(one.name for one in network.interfaces) or "no interface"


def _facts(one: Interface | None) -> dict[str, Any]:
    empty = dict.fromkeys(Interface._fields)
    return {**(empty if one is None else one._asdict()), "loopback": one is not None and one.loopback}


def master_address() -> str | None:
    """MASTER_ADDR of the job."""
    return os.environ.get("MASTER_ADDR")
