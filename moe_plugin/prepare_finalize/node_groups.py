"""Ranks arranged as nodes: a group for the ranks of a node, and one for the ranks of equal place in all nodes (a rail).

Ranks of a node are consecutive in the EP group. Example, 6 ranks on 2 nodes:

    node 0: ranks 0 1 2    node 1: ranks 3 4 5    rails: 0 3, 1 4, 2 5
    rank 4: node group (3, 4, 5), local rank 1; rail group (1, 4), where its place, 1, is its node
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from moe_plugin.errors import ConfigError
from moe_plugin.prepare_finalize.communicator import Communicator

_PHASE = "node groups"

_groups: weakref.WeakKeyDictionary[Any, dict[tuple[int, float], tuple[Any, Any]]] = weakref.WeakKeyDictionary()
"""Node and rail group by EP group, then by number of nodes and time limit: layers of a stack share them."""

_generations: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class NodeGroups:
    """node: the L ranks of this node; its `rank` is the local rank. rail: one rank of each of N nodes, by node."""

    node: Communicator
    rail: Communicator


def node_groups(ep: Communicator, num_nodes: int) -> NodeGroups:
    """The node and the rail of this rank in `ep`; all ranks of `ep` call this alike, the first time collectively.

    Raises ConfigError when the ranks do not spread evenly over the nodes, PeerLostError when one does not come.
    """
    if num_nodes < 1 or ep.size % num_nodes:
        raise ConfigError(
            f"{ep.size} EP ranks do not spread evenly over num_nodes={num_nodes}; it must divide their number"
        )
    ranks_per_node = ep.size // num_nodes
    node_rank, local_rank = divmod(ep.rank, ranks_per_node)
    node, rail = _cached_groups(ep, num_nodes)
    return NodeGroups(
        node=Communicator(node, ranks_per_node, local_rank, ep.timeout_seconds),
        rail=Communicator(rail, num_nodes, node_rank, ep.timeout_seconds),
    )


def _cached_groups(ep: Communicator, num_nodes: int) -> tuple[Any, Any]:
    """(node group, rail group) of this rank; None where it has one rank."""
    if num_nodes == 1:
        return ep.group, None
    if num_nodes == ep.size:
        return None, ep.group
    made = _groups.setdefault(ep.group, {})
    key = num_nodes, ep.timeout_seconds
    if key not in made:
        ranks_per_node = ep.size // num_nodes
        node_rank, local_rank = divmod(ep.rank, ranks_per_node)
        ranks = dist.get_process_group_ranks(ep.group)
        # A name must not come twice, and all ranks must find the same; they make the groups of an EP group in step.
        name = f"moe_plugin/{ep.group.group_name}/{_generations[ep.group.group_name]}"
        _generations[ep.group.group_name] += 1
        node = _new_group(ep, ranks[node_rank * ranks_per_node :][:ranks_per_node], f"{name}/node{node_rank}")
        rail = _new_group(ep, ranks[local_rank::ranks_per_node], f"{name}/rail{local_rank}")
        made[key] = node, rail
    return made[key]


def _new_group(ep: Communicator, ranks: list[int], name: str) -> Any:
    """A process group of global `ranks`, in that order, which only its members make; ready to be captured.

    `torch.distributed.new_group(use_local_synchronization=True)` is not used: it names a group by how many groups its
    process has seen, and hangs where members differ in that (pytorch issue 173608). Ranks outside of the EP group may
    not know of this layer, so they cannot be asked to take part either.
    """

    def make() -> Any:
        backend = dist.get_backend(ep.group)
        # NCCL ends the process when a group's limit is over, so that of Communicator must come first.
        timeout = c10d.default_pg_timeout if "nccl" in str(backend) else timedelta(seconds=ep.timeout_seconds)
        with _unbound_world():
            group, _ = c10d._new_process_group_helper(
                len(ranks),
                ranks.index(dist.get_rank()),
                ranks,
                backend,
                c10d._get_default_store(),
                group_name=cast(Any, name),
                timeout=timeout,
                group_desc=name,
            )
        c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
        return group

    group = ep.guard(_PHASE, make)
    # NCCL connects in the first collective, which must not be one that is being captured.
    Communicator(group, len(ranks), ranks.index(dist.get_rank()), ep.timeout_seconds).gather_objects(None, _PHASE)
    return group


@contextlib.contextmanager
def _unbound_world() -> Iterator[None]:
    """Hide the device that the world is bound to: with one, NCCL would split the world, in which all must take part."""
    world = c10d._get_default_group()
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound
