"""Signals, bounded waits and what they report, by a kernel that has nothing else to do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from moe_plugin.kernels.peer_memory import (
    ALL_DONE,
    ERROR_BITS,
    MAX_PEERS,
    PROGRESS_BITS,
    await_peers,
    errors_of,
    report,
    signal_peers,
    signal_value,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANKS, EPOCH, PHASE = 3, 7, 2


@triton.jit
def _wait_kernel(
    flags_ptr, found_ptr, lost_ptr, reports_ptr, epoch, progress, limit_ns, RANKS: tl.constexpr, PHASE: tl.constexpr
):  # fmt: skip
    epoch = epoch.to(tl.int64)
    seen = await_peers(flags_ptr, 1, epoch, progress, RANKS, limit_ns)
    errors, missing = errors_of(seen, epoch, progress)
    report(reports_ptr, lost_ptr, errors, missing, limit_ns, epoch, PHASE)
    tl.store(found_ptr, errors)
    tl.store(found_ptr + 1, missing)


@triton.jit
def _signal_kernel(flag_ptr, peer_offsets_ptr, epoch, progress, errors, RANKS: tl.constexpr):
    signal_peers(flag_ptr, peer_offsets_ptr, signal_value(epoch.to(tl.int64), progress, errors), RANKS)


def word(epoch: int, progress: int, errors: int = 0) -> int:
    return (((epoch << PROGRESS_BITS) + progress) << ERROR_BITS) | errors


def wait(flags: list[int], progress: int, limit_ns: int) -> tuple[int, int, int, list[int], tuple[int, int, int]]:
    """Errors, first missing rank, the lost word, error words, and (rank + 1, phase, epoch) of the record."""
    words = torch.tensor(flags, dtype=torch.int64, device=DEVICE)
    found, reports = (torch.zeros(8, dtype=torch.int32, device=DEVICE) for _ in range(2))
    lost = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    _wait_kernel[(1,)](words, found, lost, reports, EPOCH, progress, limit_ns, RANKS=RANKS, PHASE=PHASE)
    record = int(reports[6:].view(torch.int64))
    named = (record & 0xFF, (record >> 8) & 0xFF, record >> 16)
    return int(found[0]), int(found[1]), int(lost), reports[:4].tolist(), named


@pytest.mark.parametrize("progress", [1, ALL_DONE])
def test_a_wait_ends_when_all_have_come(progress: int) -> None:
    """Later epochs and further progress count as well."""
    flags = [word(EPOCH, progress), word(EPOCH + 1, 0), word(EPOCH, ALL_DONE)]
    assert wait(flags, progress, 10**9) == (0, MAX_PEERS, 0, [0, 0, 0, 0], (0, 0, 0))


def test_errors_of_all_ranks_are_collected() -> None:
    flags = [word(EPOCH, ALL_DONE, 1), word(EPOCH, ALL_DONE, 4), word(EPOCH, ALL_DONE, 5)]
    errors, missing, lost, words, record = wait(flags, ALL_DONE, 10**9)
    assert (errors, missing, lost, words, record) == (5, MAX_PEERS, 0, [1, 0, 4, 0], (0, 0, 0))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([word(EPOCH, ALL_DONE), word(EPOCH, 1), word(EPOCH, ALL_DONE)], 1),
        ([word(EPOCH, ALL_DONE), word(EPOCH, ALL_DONE), word(EPOCH - 1, ALL_DONE, 1)], 2),
        ([0, word(EPOCH, ALL_DONE), 0], 0),
    ],
    ids=["not_done", "of_an_earlier_call", "never_there"],
)
def test_who_does_not_come_is_named(flags: list[int], named: int) -> None:
    """And what an earlier call left is not taken for an error of this one."""
    errors, missing, lost, words, record = wait(flags, ALL_DONE, 10**7)
    assert (errors, missing, lost, words) == (0, named, 1, [0, 0, 0, 0])
    assert record == (named + 1, PHASE, EPOCH)


def test_without_a_limit_nobody_is_blamed() -> None:
    """After a loss kernels look once and go on; who happens not to be there yet is not who was lost."""
    errors, missing, lost, words, record = wait([0, 0, 0], ALL_DONE, 0)
    assert (errors, missing, lost, words, record) == (0, 0, 0, [0, 0, 0, 0], (0, 0, 0))


def test_a_signal_reaches_every_rank() -> None:
    """Ranks here are parts of one tensor, four words, that is two units of 16 bytes, apart."""
    memory = torch.zeros(4 * RANKS, dtype=torch.int64, device=DEVICE)
    offsets = 2 * torch.arange(-1, RANKS - 1, dtype=torch.int64, device=DEVICE)
    _signal_kernel[(1,)](memory[4 + 3 :], offsets, EPOCH, 2, 4, RANKS=RANKS)
    expected = torch.zeros(RANKS, 4, dtype=torch.int64)
    expected[:, 3] = word(EPOCH, 2, 4)
    assert torch.equal(memory.view(RANKS, 4).cpu(), expected)
