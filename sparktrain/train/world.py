"""Who I am among the ranks, and the collectives that are not a strategy's.

Every collective here is called by every rank in the same order.
"""

import contextlib
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
    store = torch._C._distributed_c10d.HashStore() if "MASTER_ADDR" not in os.environ else None
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank if store else -1,
        world_size=size if store else -1,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield World(rank, size, device, socket.gethostname())
    finally:
        dist.destroy_process_group()
