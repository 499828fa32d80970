"""Where ranks meet, and on which address: as little as possible that others can connect to.

Pickled by value together with ``task.py``, and like it without imports of ours.
"""

import os
import socket
import struct
import sys
import tempfile
from contextlib import suppress


def meeting_file() -> str:
    """Where agents of one machine meet: what they leave there is pickled, so only this user may write it, and no port
    is opened for it, as ``--standalone`` would on all interfaces."""
    descriptor, path = tempfile.mkstemp(prefix="sparktrain-")
    os.close(descriptor)
    return path


def own_address(master: str) -> str:
    """This machine's address on the way to ``master``; empty where that is the loopback by a name that others resolve
    to something else, as in many an /etc/hosts."""
    own = _address_towards(master)
    return "" if own.startswith("127.") and not master.startswith(("127.", "localhost")) else own


def interface_to(address: str) -> str | None:
    """Name of the network interface that leads to ``address``. Left alone, gloo takes the one that the host's name
    resolves to, which on many machines is the loopback, and ranks of other hosts cannot connect."""
    if sys.platform != "linux":
        return None
    import fcntl

    get_interface_address, mine = 0x8915, _address_towards(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), get_interface_address, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == mine:
                    return name
    return None


def _address_towards(other: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):
            probe.connect((other, 9))  # sends nothing: it asks the routing table for our own address
        return str(probe.getsockname()[0])
