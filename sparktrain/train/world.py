"""Who I am among the ranks, and the collectives that are not a strategy's.

Every collective here is called by every rank in the same order.
"""

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This rank's place: ``rank`` of ``size``, on ``device`` of ``host``."""

    rank: int
    size: int
    device: torch.device
    host: str

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's ``data`` on every rank. Raw bytes, so that nothing from the network is unpickled."""
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, src=0)
        if not length:
            return b""
        payload = torch.zeros(int(length.item()), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(payload, src=0)
        return payload.cpu().numpy().tobytes()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total]

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over ranks, in float64."""
        most = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return [float(v) for v in most]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(0.0)


@contextlib.contextmanager
def start_world(threads: int, timeout_seconds: int) -> Iterator[World]:
    """Join the process group that the environment names (torchrun's variables); a group of one without them.

    Args:
        threads: CPU threads of this rank.
        timeout_seconds: bound on every collective; gloo's own default is half an hour of silence.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads)
    timeout = timedelta(seconds=timeout_seconds)
    store = _store(rank, size, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank if store else -1,
        world_size=size if store else -1,
        timeout=timeout,
    )
    try:
        yield World(rank, size, device, socket.gethostname())
    finally:
        dist.destroy_process_group()


def _store(rank: int, size: int, timeout: timedelta) -> "torch._C._distributed_c10d.Store | None":
    """Where ranks tell each other their addresses; None: where torchrun keeps one, for ranks that it was started for by
    hand. torch's own server would listen on every interface of rank 0's machine; this one does on ``MASTER_ADDR``'s."""
    if "MASTER_ADDR" not in os.environ:
        return torch._C._distributed_c10d.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = _listen(host, port) if rank == 0 else None
    store = torch._C._distributed_c10d.TCPStore
    return store(host, port, size, rank == 0, timeout, multi_tenant=True, master_listen_fd=listening)


def _listen(host: str, port: int) -> int | None:
    """A socket that takes connections on the address of ``host``; None where others know this machine by another one:
    behind a gateway, or where its name is the loopback's in its own /etc/hosts."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if ipaddress.ip_address(address[0]).is_loopback and host not in ("localhost", address[0]):
        return None
    try:
        return socket.create_server(address[:2], family=family).detach()
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    return None
