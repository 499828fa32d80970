"""Public implementations under the methods that the loop of ``rank.py`` calls; bytes are of what they really reduce.

torchft (``pip install torchft==0.2.0``) runs as it does on a cluster: a lighthouse, a manager per rank, its own gloo
group, a quorum and a vote in every round. Bytes of quorum and vote are left out.
"""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from sparktrain.config import Optimizer
from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.inner import adamw

_LONG = datetime.timedelta(hours=1)


class Counting(ProcessGroupGloo):
    """Gloo that counts what is reduced, as a ring does it."""

    def __init__(self) -> None:
        super().__init__(timeout=_LONG)
        self.traffic = Traffic()

    def allreduce(self, tensors: Any, opts: Any) -> Any:
        listed = tensors if isinstance(tensors, list) else [tensors]
        self.traffic.add_ring_all_reduce(sum(t.nbytes for t in listed), self.size())
        return super().allreduce(tensors, opts)


class Torchft:
    """What both strategies have in common: a manager per rank, and the optimizer whose steps they hook."""

    def __init__(self, model: torch.nn.Module, settings: Optimizer, sync_every: int) -> None:
        self.model, self.every, self._group = model, sync_every, Counting()
        self.traffic = self._group.traffic
        self._light = LighthouseServer("[::]:0", min_replicas=2) if dist.get_rank() == 0 else None
        address = [self._light.address() if self._light else None]
        dist.broadcast_object_list(address)
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            self._group,
            load_state_dict=None,
            state_dict=None,
            min_replica_size=2,
            use_async_quorum=False,
            timeout=_LONG,
            quorum_timeout=_LONG,
            rank=0,
            world_size=1,
            store_addr="localhost",
            store_port=self._store.port,
            lighthouse_addr=address[0],
            replica_id=f"rank{dist.get_rank()}_",
            # All ranks have drawn the same weights.
            init_sync=False,
        )
        self.optimizer = adamw(dict(model.named_parameters()), settings)

    def average_gradients(self) -> None:
        pass

    def step(self, lr: float, tokens: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def sync(self) -> None:
        """Runs are of whole rounds."""
        self.manager.shutdown()

    def extract(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}


class TorchftDiLoCo(Torchft):
    """Its DiLoCo; the defaults are those of its examples."""

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Optimizer,
        sync_every: int,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
    ) -> None:
        super().__init__(model, settings, sync_every)
        outer = torch.optim.SGD(model.parameters(), lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)
        self._diloco = DiLoCo(self.manager, [model], self.optimizer, outer, sync_every, pin_memory=False)
        self._diloco.__enter__()


class TorchftLocalSGD(Torchft):
    """Its LocalSGD: parameters are averaged."""

    def __init__(self, model: torch.nn.Module, settings: Optimizer, sync_every: int) -> None:
        super().__init__(model, settings, sync_every)
        self._local = LocalSGD(self.manager, model, self.optimizer, sync_every)
        self._local.__enter__()


KINDS = {"torchft": TorchftDiLoCo, "torchft_local_sgd": TorchftLocalSGD}
