"""Memory that every rank of a group has at the same offsets and that the others can write.

On GPUs it is torch's symmetric memory, which maps the peers' allocations into this process (NVLink or PCIe peer
access, one host). On a CPU, where Triton's interpreter runs the kernels, it is a file in shared memory, so that the
same kernels run between processes of one machine.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch

from moe_plugin.prepare_finalize.communicator import Communicator

UNIT = 16
"""Bytes in which distances between ranks' buffers are counted; all regions begin at a multiple of it."""


class SymmetricMemory:
    """`nbytes` of zeros on each rank of `communicator`'s group. Making one is a collective.

    memory: uint8 [nbytes], this rank's. addresses: of all ranks' in this process.
    peer_offsets: int64 [R] on the device, how far rank r's lies from this one's, in units of 16 bytes.
    Raises PeerLostError when a rank does not take part in time, RuntimeError when the devices cannot reach each other.
    """

    def __init__(self, communicator: Communicator, nbytes: int, device: torch.device) -> None:
        self.nbytes = -(-nbytes // UNIT) * UNIT
        if communicator.size == 1:
            self.memory = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
            addresses = [self.memory.data_ptr()]
        elif device.type == "cuda":
            addresses = self._map_devices(communicator, device)
        else:
            addresses = self._map_file(communicator)
        # No rank may write before all have zeroed theirs.
        communicator.gather_objects(None, "symmetric memory")
        self.addresses = addresses
        base = addresses[communicator.rank]
        offsets = [(address - base) // UNIT for address in addresses]
        self.peer_offsets = torch.tensor(offsets, dtype=torch.int64, device=device)

    def _map_devices(self, communicator: Communicator, device: torch.device) -> list[int]:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.memory = symmetric_memory.empty(self.nbytes, dtype=torch.uint8, device=device)
        # A rank that is lost here would be waited for without end.
        communicator.gather_objects(None, "symmetric memory")
        self._handle: Any = symmetric_memory.rendezvous(self.memory, communicator.group)
        self.memory.zero_()
        torch.cuda.synchronize(device)
        return list(self._handle.buffer_ptrs)

    def _map_file(self, communicator: Communicator) -> list[int]:
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
        mine = tempfile.NamedTemporaryFile(dir=folder, prefix="moe_plugin_", delete=False)  # noqa: SIM115
        mine.truncate(self.nbytes)
        mine.close()
        names = communicator.gather_objects(mine.name, "symmetric memory")
        self._maps = [torch.from_file(name, shared=True, size=self.nbytes, dtype=torch.uint8) for name in names]
        communicator.gather_objects(None, "symmetric memory")
        os.unlink(mine.name)  # the mappings keep it
        self.memory = self._maps[communicator.rank]
        return [mapped.data_ptr() for mapped in self._maps]

    def region(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view of this rank's memory that begins `offset` bytes in, at the same place as on the other ranks."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        return self.memory[offset : offset + size].view(dtype).view(shape)


def reachable_peers(communicator: Communicator, device: torch.device) -> str:
    """Empty when every rank of the group can map the others' device memory, else why not; the same on all ranks.

    A collective. Ranks must be on one host, each with a device of its own, and all pairs must have peer access.
    """
    if communicator.size == 1:
        return ""
    host = _boot_id()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    facts = communicator.gather_objects((host, uuid), "symmetric memory")
    problem = ""
    if len({where for where, _ in facts}) > 1:
        problem = "ranks are on several hosts; give their number as num_nodes"
    elif len({which for _, which in facts}) < len(facts):
        problem = "two ranks share a device"
    else:
        visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        for _, which in facts:
            peer = visible.get(which)
            # A device that CUDA_VISIBLE_DEVICES hides cannot be asked about; mapping it will tell.
            if peer not in (None, device.index) and not torch.cuda.can_device_access_peer(device, peer):
                problem = f"no peer access from {device} to cuda:{peer}"
    found = communicator.gather_objects(problem, "symmetric memory")
    return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), "")


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return os.uname().nodename
