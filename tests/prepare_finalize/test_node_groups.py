"""Node and rail groups: who is in them, that layers share them, and that they can be made where groups are uneven."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_plugin.errors import ConfigError
from moe_plugin.prepare_finalize.communicator import Communicator
from moe_plugin.prepare_finalize.node_groups import node_groups
from moe_plugin.testing import shared_pool
from moe_plugin.testing.rank_pool import RankContext


def ep_of(context: RankContext, timeout_seconds: float = 30.0) -> Communicator:
    parallel = context.parallel(timeout_seconds=timeout_seconds)
    return Communicator(parallel.ep_group, parallel.ep_size, parallel.ep_rank, timeout_seconds)


@pytest.mark.parametrize("num_nodes", [0, 2, 3])
def test_nodes_must_divide_the_ranks(num_nodes: int) -> None:
    with pytest.raises(ConfigError, match=f"1 EP ranks do not spread evenly over num_nodes={num_nodes}"):
        node_groups(Communicator(None, 1, 0, 30.0), num_nodes)


def test_one_rank_is_a_node_of_its_own() -> None:
    groups = node_groups(Communicator(None, 1, 0, 30.0), 1)
    for communicator in (groups.node, groups.rail):
        assert (communicator.group, communicator.size, communicator.rank) == (None, 1, 0)


def two_nodes(context: RankContext) -> dict[str, Any]:
    ep = ep_of(context)
    groups = node_groups(ep, 2)
    sums = []
    for communicator in (groups.node, groups.rail):
        total = torch.tensor([1 << context.rank])
        communicator.all_reduce(total, "x").wait()
        sums.append(int(total))
    again = node_groups(ep_of(context), 2)
    other_limit = node_groups(ep_of(context, 20.0), 2)
    return {
        "node": (dist.get_process_group_ranks(groups.node.group), groups.node.rank, groups.node.size),
        "rail": (dist.get_process_group_ranks(groups.rail.group), groups.rail.rank, groups.rail.size),
        "sums": sums,
        "shared": again.node.group is groups.node.group and again.rail.group is groups.rail.group,
        "other limit": other_limit.node.group is groups.node.group or other_limit.node.timeout_seconds != 20.0,
        "flat": (node_groups(ep, 1).node.group is ep.group, node_groups(ep, 4).rail.group is ep.group),
        "known groups": len(dist.distributed_c10d._world.pg_names),
    }


@pytest.mark.slow
def test_two_nodes_of_two_ranks() -> None:
    answers = shared_pool("cpu", 4).run(two_nodes, ranks=4)
    assert [answer["node"] for answer in answers] == [([0, 1], 0, 2), ([0, 1], 1, 2), ([2, 3], 0, 2), ([2, 3], 1, 2)]
    assert [answer["rail"] for answer in answers] == [([0, 2], 0, 2), ([1, 3], 0, 2), ([0, 2], 1, 2), ([1, 3], 1, 2)]
    assert [answer["sums"] for answer in answers] == [
        [0b0011, 0b0101],
        [0b0011, 0b1010],
        [0b1100, 0b0101],
        [0b1100, 0b1010],
    ]
    assert all(answer["shared"] and not answer["other limit"] for answer in answers)
    assert all(answer["flat"] == (True, True) for answer in answers)
    # Ranks that have seen different numbers of groups, where torch's own local form of new_group would hang.
    assert len({answer["known groups"] for answer in answers}) > 1
