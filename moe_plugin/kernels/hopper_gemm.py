"""Grouped GEMMs of the experts for Hopper: TMA, wgmma, persistent grid, explicit warp specialization (Gluon).

One warp of each program loads tiles into a ring of shared-memory stages with TMA; the others multiply. The rows of X
lie in slot order, each expert's segment padded to whole blocks, so that a tile is one TMA box and one expert's:

    gate_up_activation   out = act(x @ w_gate^T + b_gate, x @ w_up^T + b_up)    w13 [E, 2I, H], gate rows first
    down                 out = x @ w2^T + b                                      w2 [E, H, I]

    x [slots, depth], out [slots, columns]; scales of fp8 rows [groups, slots], groups of 128 columns, or [1, slots]

A program walks over (row block, column block) tiles, `block_expert` names the expert of a row block, and `num_blocks`,
a device counter, ends the walk: no host sync, capturable in a CUDA graph. Every tile multiplies two halves of half_w
weight rows each: gate and up rows of the same columns, or two neighbouring bands of the down projection.

Two ways to feed wgmma, whose first operand has 64 rows or multiples of it:

    wide     rows of X are the first operand: blocks of 128 rows, 64 for each of two consumer warp groups
    narrow   weights are the first operand, X the second: blocks of 8 to 64 rows, for few rows per expert

fp8 products of 128 of depth are summed by the tensor core and then added in fp32, scaled or not: its own accumulators
keep about 14 bits (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). Rows that hold no pair are computed from whatever
lies in them; nothing of one row reaches another.

Example, narrow, block_x = 8, three experts with 2, 0 and 9 rows: block_expert [0, 2, 2], num_blocks 3, slots 0 to 23,
of which 2 to 7 and 17 to 23 hold no pair.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_plugin.kernels.dependent_launch import dependent_launch
from moe_plugin.kernels.hopper_tiling import LEAST_SCALES, STAGE_DEPTH_BYTES, HopperTile
from moe_plugin.kernels.launcher import Descriptor, Launch, Launcher, running, tensor_descriptor
from moe_plugin.kernels.tiling import cdiv

if TYPE_CHECKING:
    from moe_plugin.config import MoEConfig

_WARP_GROUP_ROWS = gl.constexpr(64)
_PART_ROWS = 16
"""Rows of X that are loaded, or not, together."""


@gluon.jit
def _tile_of(tile, num_row_blocks, COLUMN_BLOCKS: gl.constexpr, GROUP: gl.constexpr):
    """GROUP row blocks walk through the columns together, so that programs in flight share weights and rows in L2."""
    tiles_per_group = GROUP * COLUMN_BLOCKS
    first_row_block = tile // tiles_per_group * GROUP
    group_rows = gl.minimum(num_row_blocks - first_row_block, GROUP)
    in_group = tile % tiles_per_group
    return first_row_block + in_group % group_rows, in_group // group_rows


@gluon.jit
def _parts_in_use(row_ends_ptr, expert, x_row, PARTS: gl.constexpr, PART_ROWS: gl.constexpr):
    """How many of a block's parts of PART_ROWS rows hold any rows of its expert."""
    if PARTS == 1:
        return 1
    else:
        rows = gl.load(row_ends_ptr + expert) - x_row
        return gl.minimum((rows + PART_ROWS - 1) // PART_ROWS, PARTS)


@gluon.jit
def _expect(bar, parts, PARTS: gl.constexpr, PART_BYTES: gl.constexpr, OTHER_BYTES: gl.constexpr, pred):
    """Announce the bytes of one stage. Their number is a constant of the instruction, so there is one for each."""
    if PARTS == 1:
        mbarrier.expect(bar, PART_BYTES + OTHER_BYTES, pred=pred)
    else:
        for number in gl.static_range(1, PARTS + 1):
            mbarrier.expect(bar, number * PART_BYTES + OTHER_BYTES, pred=pred & (parts == number))


@gluon.jit
def _load_tiles(
    x_desc, x_scale_desc, w_desc, x_bufs, x_scale_bufs, w_bufs, ready, empty,
    block_expert_ptr, block_row_ptr, row_ends_ptr, num_blocks_ptr, x_scale_stride,
    W_ROWS: gl.constexpr, SECOND_HALF: gl.constexpr, SUBTILES: gl.constexpr, SUBTILE_COLUMNS: gl.constexpr,
    COLUMN_BLOCKS: gl.constexpr, DEPTH: gl.constexpr, GROUP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The producer: fills stage after stage, as soon as every consumer has left it.

    With PDL it runs while the kernel before still does, which must have waited for the ones before it: weights, and the
    tables that the sort wrote, are read at once, rows when that kernel is done. Rows of X come in parts of as many as a
    box of x_desc has, and parts without any are left as they are: what they would cost in L2 traffic shows.
    """
    STAGES: gl.constexpr = x_bufs.shape[0]
    BLOCK_X: gl.constexpr = x_bufs.shape[1]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    PART_ROWS: gl.constexpr = x_desc.block_type.shape[0]
    PARTS: gl.constexpr = BLOCK_X // PART_ROWS
    PART_BYTES: gl.constexpr = x_desc.block_type.nbytes
    HALF_W: gl.constexpr = w_desc.block_type.shape[0]
    X_SCALE_BYTES: gl.constexpr = 0 if x_scale_desc is None else x_scale_desc.block_type.nbytes
    OTHER_BYTES: gl.constexpr = 2 * w_desc.block_type.nbytes + X_SCALE_BYTES
    AHEAD: gl.constexpr = min(STAGES, (DEPTH + BLOCK_K - 1) // BLOCK_K) if PDL else 0
    num_blocks = gl.load(num_blocks_ptr)
    first_tile = gl.program_id(0)
    if PDL:
        if first_tile < num_blocks * COLUMN_BLOCKS:
            row_block, column_block = _tile_of(first_tile, num_blocks, COLUMN_BLOCKS, GROUP)
            expert = gl.load(block_expert_ptr + row_block)
            if block_row_ptr is None:
                x_row = row_block * BLOCK_X
            else:
                x_row = gl.load(block_row_ptr + row_block)
            parts = _parts_in_use(row_ends_ptr, expert, x_row, PARTS, PART_ROWS)
            w_row = expert * W_ROWS + column_block * SUBTILES * SUBTILE_COLUMNS
            for ahead in gl.static_range(AHEAD):
                bar = ready.index(ahead)
                _expect(bar, parts, PARTS, PART_BYTES, OTHER_BYTES, True)
                w_buf = w_bufs.index(ahead)
                k = ahead * BLOCK_K
                tma.async_copy_global_to_shared(w_desc, [w_row, k], bar, w_buf.slice(0, HALF_W))
                tma.async_copy_global_to_shared(w_desc, [w_row + SECOND_HALF, k], bar, w_buf.slice(HALF_W, HALF_W))
        gdc_wait()
        gdc_launch_dependents()
    stage = 0
    phase = 1
    filled = 0
    for tile in range(gl.program_id(0), num_blocks * COLUMN_BLOCKS, gl.num_programs(0)):
        row_block, column_block = _tile_of(tile, num_blocks, COLUMN_BLOCKS, GROUP)
        expert = gl.load(block_expert_ptr + row_block)
        if block_row_ptr is None:
            x_row = row_block * BLOCK_X
        else:
            x_row = gl.load(block_row_ptr + row_block)
        parts = _parts_in_use(row_ends_ptr, expert, x_row, PARTS, PART_ROWS)
        for subtile in range(SUBTILES):
            w_row = expert * W_ROWS + (column_block * SUBTILES + subtile) * SUBTILE_COLUMNS
            for k in range(0, DEPTH, BLOCK_K):
                mbarrier.wait(empty.index(stage), phase)
                bar = ready.index(stage)
                w_buf = w_bufs.index(stage)
                w_half0 = w_buf.slice(0, HALF_W)
                w_half1 = w_buf.slice(HALF_W, HALF_W)
                is_new = filled >= AHEAD
                _expect(bar, parts, PARTS, PART_BYTES, OTHER_BYTES, is_new)
                tma.async_copy_global_to_shared(w_desc, [w_row, k], bar, w_half0, pred=is_new)
                tma.async_copy_global_to_shared(w_desc, [w_row + SECOND_HALF, k], bar, w_half1, pred=is_new)
                filled += 1
                x_buf = x_bufs.index(stage)
                for part in gl.static_range(PARTS):
                    part_buf = x_buf.slice(part * PART_ROWS, PART_ROWS)
                    tma.async_copy_global_to_shared(
                        x_desc, [x_row + part * PART_ROWS, k], bar, part_buf, pred=parts > part
                    )
                if x_scale_desc is not None:
                    scale_at = k // BLOCK_K * x_scale_stride + x_row
                    tma.async_copy_global_to_shared(x_scale_desc, [scale_at], bar, x_scale_bufs.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _stage_before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES, stage) - 1


@gluon.jit
def _mma(x_buf, w_buf, total, use_total, SWAP: gl.constexpr):
    if SWAP:
        return warpgroup_mma(w_buf, x_buf.permute((1, 0)), total, use_acc=use_total, is_async=True)
    else:
        return warpgroup_mma(x_buf, w_buf.permute((1, 0)), total, use_acc=use_total, is_async=True)


@gluon.jit
def _halves(total, SWAP: gl.constexpr, HALF_LAYOUT: gl.constexpr):
    """The products of the first and of the second half of a tile's weight rows: a renaming of registers."""
    if SWAP:
        first, second = total.reshape(2, total.shape[0] // 2, total.shape[1]).permute(1, 2, 0).split()
    else:
        first, second = total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1).split()
    return (
        gl.convert_layout(first, HALF_LAYOUT, assert_trivial=True),
        gl.convert_layout(second, HALF_LAYOUT, assert_trivial=True),
    )


@gluon.jit
def _by_row(values, SWAP: gl.constexpr):
    return gl.expand_dims(values, 0 if SWAP else 1)


@gluon.jit
def _by_column(values, SWAP: gl.constexpr):
    return gl.expand_dims(values, 1 if SWAP else 0)


@gluon.jit
def _sigmoid(x):
    decay = gl.exp(-gl.abs(x))
    return gl.where(x < 0, decay, 1.0) / (1.0 + decay)


@gluon.jit
def _gated_activation(gate, up, ACTIVATION: gl.constexpr, SWIGLU_ALPHA: gl.constexpr, SWIGLU_LIMIT: gl.constexpr):
    # Comparisons, unlike minimum and maximum, let NaN through.
    if ACTIVATION == "silu_and_mul":
        return gate * up / (1.0 + gl.exp(-gate))
    elif ACTIVATION == "gelu_and_mul":
        return gate * _sigmoid(2.0 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gl.static_assert(ACTIVATION == "swiglu_oai")
        gate = gl.where(gate > SWIGLU_LIMIT, SWIGLU_LIMIT, gate)
        up = gl.where(up > SWIGLU_LIMIT, SWIGLU_LIMIT, up)
        up = gl.where(up < -SWIGLU_LIMIT, -SWIGLU_LIMIT, up)
        return (up + 1.0) * gate * _sigmoid(SWIGLU_ALPHA * gate)


@gluon.jit
def _store_chunk(value, out_buf, out_desc, x_row, column, pendings: gl.constexpr, SWAP: gl.constexpr):
    tma.store_wait(pendings)
    if SWAP:
        out_buf.permute((1, 0)).store(value.to(out_desc.dtype))
    else:
        out_buf.store(value.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [x_row, column], out_buf)


@gluon.jit
def _store(
    value, out_bufs, out_desc, x_row, column,
    FIRST: gl.constexpr, ALONE: gl.constexpr, CONSUMER: gl.constexpr, SWAP: gl.constexpr,
):  # fmt: skip
    """Narrow: one buffer. Wide: chunks of 64 columns through two buffers, one being filled while the other travels.

    FIRST: the buffer of a value of one chunk. ALONE: it is the only one of its tile, so the same buffer comes next.
    """
    CHUNK: gl.constexpr = out_desc.block_type.shape[1]
    if SWAP:
        _store_chunk(value, out_bufs.index(0), out_desc, x_row, column, 0, SWAP)
    elif value.shape[1] == CHUNK:
        PENDINGS: gl.constexpr = 0 if ALONE else 1
        _store_chunk(value, out_bufs.index(2 * CONSUMER + FIRST), out_desc, x_row, column, PENDINGS, SWAP)
    else:
        gl.static_assert(value.shape[1] == 2 * CHUNK)
        left, right = value.reshape(value.shape[0], 2, CHUNK).permute(0, 2, 1).split()
        _store_chunk(left, out_bufs.index(2 * CONSUMER), out_desc, x_row, column, 1, SWAP)
        _store_chunk(right, out_bufs.index(2 * CONSUMER + 1), out_desc, x_row, column + CHUNK, 1, SWAP)


@gluon.jit
def _following(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _partial(
    x_bufs, x_scale_bufs, w_bufs, ready, stage, phase,
    CONSUMER: gl.constexpr, SWAP: gl.constexpr, LAYOUT: gl.constexpr, ROW_LAYOUT: gl.constexpr, ROWS: gl.constexpr,
    X_SCALE: gl.constexpr,
):  # fmt: skip
    """Start the fp8 product of one stage; its row scales."""
    mbarrier.wait(ready.index(stage), phase)
    x_buf = x_bufs.index(stage)
    if not SWAP:
        x_buf = x_buf.slice(CONSUMER * ROWS, ROWS)
    if X_SCALE == "group":
        x_scale = x_scale_bufs.index(stage).slice(CONSUMER * ROWS, ROWS).load(ROW_LAYOUT)
    else:
        x_scale = 1.0
    SHAPE: gl.constexpr = [w_bufs.shape[1], ROWS] if SWAP else [ROWS, w_bufs.shape[1]]
    return _mma(x_buf, w_bufs.index(stage), gl.zeros(SHAPE, gl.float32, layout=LAYOUT), False, SWAP), x_scale


@gluon.jit
def _add_scaled(
    part, total0, total1, x_scale, w0_scale, w1_scale,
    SWAP: gl.constexpr, HALF_LAYOUT: gl.constexpr, X_SCALE: gl.constexpr, W_SCALE: gl.constexpr,
):  # fmt: skip
    part0, part1 = _halves(part, SWAP, HALF_LAYOUT)
    if X_SCALE == "group" and W_SCALE == "block":
        total0 += part0 * _by_row(x_scale * w0_scale, SWAP)
        total1 += part1 * _by_row(x_scale * w1_scale, SWAP)
    elif X_SCALE == "group":
        total0 += part0 * _by_row(x_scale, SWAP)
        total1 += part1 * _by_row(x_scale, SWAP)
    elif W_SCALE == "block":
        total0 += part0 * w0_scale
        total1 += part1 * w1_scale
    else:
        total0 += part0
        total1 += part1
    return total0, total1


@gluon.jit
def _accumulate(
    x_bufs, x_scale_bufs, w_bufs, ready, empty, stage, phase, w_scale_ptr, expert, column0, column1,
    CONSUMER: gl.constexpr, SWAP: gl.constexpr, LAYOUT: gl.constexpr, HALF_LAYOUT: gl.constexpr, ROWS: gl.constexpr,
    COLUMNS: gl.constexpr, DEPTH: gl.constexpr, GATED: gl.constexpr, X_SCALE: gl.constexpr, W_SCALE: gl.constexpr,
):  # fmt: skip
    """Both halves' products over the whole depth, and where the ring stands after it."""
    STAGES: gl.constexpr = x_bufs.shape[0]
    BLOCK_W: gl.constexpr = w_bufs.shape[1]
    BLOCK_K: gl.constexpr = w_bufs.shape[2]
    SHAPE: gl.constexpr = [BLOCK_W, ROWS] if SWAP else [ROWS, BLOCK_W]
    HALF_SHAPE: gl.constexpr = [BLOCK_W // 2, ROWS] if SWAP else [ROWS, BLOCK_W // 2]
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(0 if SWAP else 1, HALF_LAYOUT)
    STEPS: gl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    if X_SCALE is None:
        total = gl.zeros(SHAPE, gl.float32, layout=LAYOUT)
        for step in range(STEPS):
            mbarrier.wait(ready.index(stage), phase)
            x_buf = x_bufs.index(stage)
            if not SWAP:
                x_buf = x_buf.slice(CONSUMER * ROWS, ROWS)
            total = _mma(x_buf, w_bufs.index(stage), total, step > 0, SWAP)
            # This product stays in flight; the one before is done with its stage.
            total = warpgroup_mma_wait(1, deps=[total])
            mbarrier.arrive(empty.index(_stage_before(stage, STAGES)), count=1, pred=step > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index(_stage_before(stage, STAGES)), count=1)
        total0, total1 = _halves(total, SWAP, HALF_LAYOUT)
    else:
        W_GROUPS: gl.constexpr = (DEPTH + 127) // 128
        HALF_TILES: gl.constexpr = (COLUMNS + 127) // 128
        total0 = gl.zeros(HALF_SHAPE, gl.float32, layout=HALF_LAYOUT)
        total1 = gl.zeros(HALF_SHAPE, gl.float32, layout=HALF_LAYOUT)
        if W_SCALE == "block":
            # A band past the last column is computed and dropped; its scale must not be read past the end.
            tile1 = HALF_TILES + column1 // 128 if GATED else gl.minimum(column1 // 128, HALF_TILES - 1)
            first_tile = expert * (2 * HALF_TILES if GATED else HALF_TILES)
            w0_scale_ptr = w_scale_ptr + (first_tile + column0 // 128) * W_GROUPS
            w1_scale_ptr = w_scale_ptr + (first_tile + tile1) * W_GROUPS
        # Two products are started together, so that one is scaled and added while the other is multiplied.
        for pair in range(STEPS // 2):
            if W_SCALE == "block":
                w0_scale = gl.load(w0_scale_ptr + 2 * pair)
                w1_scale = gl.load(w1_scale_ptr + 2 * pair)
                w0_next = gl.load(w0_scale_ptr + 2 * pair + 1)
                w1_next = gl.load(w1_scale_ptr + 2 * pair + 1)
            else:
                w0_scale = 1.0
                w1_scale = 1.0
                w0_next = 1.0
                w1_next = 1.0
            next_stage, next_phase = _following(stage, phase, STAGES)
            part, x_scale = _partial(
                x_bufs, x_scale_bufs, w_bufs, ready, stage, phase, CONSUMER, SWAP, LAYOUT, ROW_LAYOUT, ROWS, X_SCALE
            )
            part_next, x_scale_next = _partial(
                x_bufs, x_scale_bufs, w_bufs, ready, next_stage, next_phase,
                CONSUMER, SWAP, LAYOUT, ROW_LAYOUT, ROWS, X_SCALE,
            )  # fmt: skip
            part = warpgroup_mma_wait(1, deps=[part])
            mbarrier.arrive(empty.index(stage), count=1)
            total0, total1 = _add_scaled(
                part, total0, total1, x_scale, w0_scale, w1_scale, SWAP, HALF_LAYOUT, X_SCALE, W_SCALE
            )
            part_next = warpgroup_mma_wait(0, deps=[part_next])
            mbarrier.arrive(empty.index(next_stage), count=1)
            total0, total1 = _add_scaled(
                part_next, total0, total1, x_scale_next, w0_next, w1_next, SWAP, HALF_LAYOUT, X_SCALE, W_SCALE
            )
            stage, phase = _following(next_stage, next_phase, STAGES)
        if STEPS % 2 == 1:
            if W_SCALE == "block":
                w0_scale = gl.load(w0_scale_ptr + STEPS - 1)
                w1_scale = gl.load(w1_scale_ptr + STEPS - 1)
            else:
                w0_scale = 1.0
                w1_scale = 1.0
            part, x_scale = _partial(
                x_bufs, x_scale_bufs, w_bufs, ready, stage, phase, CONSUMER, SWAP, LAYOUT, ROW_LAYOUT, ROWS, X_SCALE
            )
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(empty.index(stage), count=1)
            total0, total1 = _add_scaled(
                part, total0, total1, x_scale, w0_scale, w1_scale, SWAP, HALF_LAYOUT, X_SCALE, W_SCALE
            )
            stage, phase = _following(stage, phase, STAGES)
    return total0, total1, stage, phase


@gluon.jit
def _finish(
    total0, total1, x_scale_ptr, w_scale_ptr, bias_ptr, x_row, expert, column0, column1, rows, columns,
    W_ROWS: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr, SWAP: gl.constexpr,
    X_SCALE: gl.constexpr, W_SCALE: gl.constexpr,
):  # fmt: skip
    """Scales that are the same over the whole depth, and the bias."""
    columns0 = column0 + columns
    columns1 = column1 + columns
    # The second half lies COLUMNS rows further in w13, and in the same rows in w2.
    SECOND: gl.constexpr = COLUMNS if GATED else 0
    if W_SCALE == "channel":
        channel_ptr = w_scale_ptr + expert * W_ROWS
        total0 *= _by_column(gl.load(channel_ptr + columns0, mask=columns0 < COLUMNS, other=0.0), SWAP)
        total1 *= _by_column(gl.load(channel_ptr + SECOND + columns1, mask=columns1 < COLUMNS, other=0.0), SWAP)
    elif W_SCALE == "tensor":
        tensor_ptr = w_scale_ptr + expert * (2 if GATED else 1)
        total0 *= gl.load(tensor_ptr)
        total1 *= gl.load(tensor_ptr + (1 if GATED else 0))
    if X_SCALE == "row":
        x_scale = _by_row(gl.load(x_scale_ptr + x_row + rows), SWAP)
        total0 *= x_scale
        total1 *= x_scale
    elif X_SCALE == "tensor" or X_SCALE == "expert":
        x_scale = gl.load(x_scale_ptr + (expert if X_SCALE == "expert" else 0))
        total0 *= x_scale
        total1 *= x_scale
    if bias_ptr is not None:
        expert_ptr = bias_ptr + expert * W_ROWS
        bias0 = gl.load(expert_ptr + columns0, mask=columns0 < COLUMNS, other=0.0).to(gl.float32)
        bias1 = gl.load(expert_ptr + SECOND + columns1, mask=columns1 < COLUMNS, other=0.0).to(gl.float32)
        total0 += _by_column(bias0, SWAP)
        total1 += _by_column(bias1, SWAP)
    return total0, total1


@gluon.jit
def _multiply_tiles(
    x_bufs, x_scale_bufs, w_bufs, out_bufs, ready, empty, out_desc,
    x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, static_scale_ptr,
    block_expert_ptr, block_row_ptr, num_blocks_ptr, out_scale_stride,
    CONSUMER: gl.constexpr, SWAP: gl.constexpr, LAYOUT: gl.constexpr, HALF_LAYOUT: gl.constexpr,
    BLOCK_X: gl.constexpr, W_ROWS: gl.constexpr, SUBTILES: gl.constexpr, SUBTILE_COLUMNS: gl.constexpr,
    COLUMN_BLOCKS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, GROUP: gl.constexpr,
    X_SCALE: gl.constexpr, W_SCALE: gl.constexpr, OUT_SCALE: gl.constexpr,
    ACTIVATION: gl.constexpr, SWIGLU_ALPHA: gl.constexpr, SWIGLU_LIMIT: gl.constexpr,
):  # fmt: skip
    """A consumer: multiplies its rows of every tile and stores the result."""
    HALF_W: gl.constexpr = w_bufs.shape[1] // 2
    ROWS: gl.constexpr = out_desc.block_type.shape[0]
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(0 if SWAP else 1, HALF_LAYOUT)
    COLUMN_LAYOUT: gl.constexpr = gl.SliceLayout(1 if SWAP else 0, HALF_LAYOUT)
    GATED: gl.constexpr = ACTIVATION is not None
    rows = gl.arange(0, ROWS, layout=ROW_LAYOUT)
    columns = gl.arange(0, HALF_W, layout=COLUMN_LAYOUT)

    num_blocks = gl.load(num_blocks_ptr)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), num_blocks * COLUMN_BLOCKS, gl.num_programs(0)):
        row_block, column_block = _tile_of(tile, num_blocks, COLUMN_BLOCKS, GROUP)
        expert = gl.load(block_expert_ptr + row_block).to(gl.int64)
        if block_row_ptr is None:
            x_row = row_block * BLOCK_X + CONSUMER * ROWS
        else:
            x_row = gl.load(block_row_ptr + row_block) + CONSUMER * ROWS
        column0 = column_block * SUBTILES * SUBTILE_COLUMNS
        if GATED:
            total0, total1, stage, phase = _accumulate(
                x_bufs, x_scale_bufs, w_bufs, ready, empty, stage, phase, w_scale_ptr, expert, column0, column0,
                CONSUMER, SWAP, LAYOUT, HALF_LAYOUT, ROWS, COLUMNS, DEPTH, GATED, X_SCALE, W_SCALE,
            )  # fmt: skip
            gate, up = _finish(
                total0, total1, x_scale_ptr, w_scale_ptr, bias_ptr, x_row, expert, column0, column0, rows, columns,
                W_ROWS, COLUMNS, GATED, SWAP, X_SCALE, W_SCALE,
            )  # fmt: skip
            value = _gated_activation(gate, up, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT)
            if OUT_SCALE == "group":
                value = gl.where(_by_column(column0 + columns, SWAP) < COLUMNS, value, 0.0)
                amax = gl.max(gl.abs(value), axis=0 if SWAP else 1)
                if SUBTILES == 2:
                    column1 = column0 + HALF_W
                    total0, total1, stage, phase = _accumulate(
                        x_bufs, x_scale_bufs, w_bufs, ready, empty, stage, phase, w_scale_ptr, expert,
                        column1, column1,
                        CONSUMER, SWAP, LAYOUT, HALF_LAYOUT, ROWS, COLUMNS, DEPTH, GATED, X_SCALE, W_SCALE,
                    )  # fmt: skip
                    gate, up = _finish(
                        total0, total1, x_scale_ptr, w_scale_ptr, bias_ptr, x_row, expert, column1, column1,
                        rows, columns, W_ROWS, COLUMNS, GATED, SWAP, X_SCALE, W_SCALE,
                    )  # fmt: skip
                    value1 = _gated_activation(gate, up, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT)
                    value1 = gl.where(_by_column(column1 + columns, SWAP) < COLUMNS, value1, 0.0)
                    amax = gl.maximum(amax, gl.max(gl.abs(value1), axis=0 if SWAP else 1))
                scale = gl.maximum(amax, 1e-4) / 448.0
                gl.store(out_scale_ptr + column0 // 128 * out_scale_stride + x_row + rows, scale)
                inverse = _by_row(1.0 / scale, SWAP)
                _store(value * inverse, out_bufs, out_desc, x_row, column0, 0, SUBTILES == 1, CONSUMER, SWAP)
                if SUBTILES == 2:
                    _store(value1 * inverse, out_bufs, out_desc, x_row, column1, 1, False, CONSUMER, SWAP)
            else:
                if OUT_SCALE == "static":
                    value *= 1.0 / gl.load(static_scale_ptr + expert)
                _store(value, out_bufs, out_desc, x_row, column0, 0, True, CONSUMER, SWAP)
        else:
            column1 = column0 + HALF_W
            total0, total1, stage, phase = _accumulate(
                x_bufs, x_scale_bufs, w_bufs, ready, empty, stage, phase, w_scale_ptr, expert, column0, column1,
                CONSUMER, SWAP, LAYOUT, HALF_LAYOUT, ROWS, COLUMNS, DEPTH, GATED, X_SCALE, W_SCALE,
            )  # fmt: skip
            total0, total1 = _finish(
                total0, total1, x_scale_ptr, w_scale_ptr, bias_ptr, x_row, expert, column0, column1, rows, columns,
                W_ROWS, COLUMNS, GATED, SWAP, X_SCALE, W_SCALE,
            )  # fmt: skip
            _store(total0, out_bufs, out_desc, x_row, column0, 0, False, CONSUMER, SWAP)
            _store(total1, out_bufs, out_desc, x_row, column1, 1, False, CONSUMER, SWAP)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["x_scale_stride", "out_scale_stride"])
def hopper_gemm_kernel(
    x_desc, x_scale_desc, w_desc, out_desc, x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, static_scale_ptr,
    block_expert_ptr, block_row_ptr, row_ends_ptr, num_blocks_ptr, x_scale_stride, out_scale_stride,
    BLOCK_X: gl.constexpr, W_ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
    X_SCALE: gl.constexpr, W_SCALE: gl.constexpr, OUT_SCALE: gl.constexpr,
    ACTIVATION: gl.constexpr, SWIGLU_ALPHA: gl.constexpr, SWIGLU_LIMIT: gl.constexpr,
    SWAP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, num_warps: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    HALF_W: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    GATED: gl.constexpr = ACTIVATION is not None
    CONSUMERS: gl.constexpr = 1 if SWAP else BLOCK_X // _WARP_GROUP_ROWS
    SECOND_HALF: gl.constexpr = COLUMNS if GATED else HALF_W
    SUBTILE_COLUMNS: gl.constexpr = HALF_W if GATED else 2 * HALF_W
    # A group of 128 columns that share a scale is finished by one consumer.
    SUBTILES: gl.constexpr = 128 // HALF_W if GATED and OUT_SCALE == "group" else 1
    COLUMN_BLOCKS: gl.constexpr = (COLUMNS + SUBTILES * SUBTILE_COLUMNS - 1) // (SUBTILES * SUBTILE_COLUMNS)
    MMA_DEPTH: gl.constexpr = 256 // x_desc.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, BLOCK_X if SWAP else 2 * HALF_W, MMA_DEPTH]
    )
    HALF_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, BLOCK_X if SWAP else HALF_W, MMA_DEPTH]
    )

    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_X, BLOCK_K], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 2 * HALF_W, BLOCK_K], w_desc.layout)
    OUT_BUFS: gl.constexpr = 1 if SWAP else 2 * CONSUMERS
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [OUT_BUFS] + out_desc.block_type.shape, out_desc.layout)
    if x_scale_desc is None:
        x_scale_bufs = out_bufs
    else:
        x_scale_bufs = gl.allocate_shared_memory(
            gl.float32, [STAGES] + x_scale_desc.block_type.shape, x_scale_desc.layout
        )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)

    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    x_bufs, x_scale_bufs, w_bufs, out_bufs, ready, empty, out_desc,
                    x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, static_scale_ptr,
                    block_expert_ptr, block_row_ptr, num_blocks_ptr, out_scale_stride,
                    0, SWAP, LAYOUT, HALF_LAYOUT, BLOCK_X, W_ROWS, SUBTILES, SUBTILE_COLUMNS,
                    COLUMN_BLOCKS, COLUMNS, DEPTH, GROUP,
                    X_SCALE, W_SCALE, OUT_SCALE, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT,
                )),
                (_multiply_tiles, (
                    x_bufs, x_scale_bufs, w_bufs, out_bufs, ready, empty, out_desc,
                    x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, static_scale_ptr,
                    block_expert_ptr, block_row_ptr, num_blocks_ptr, out_scale_stride,
                    1, SWAP, LAYOUT, HALF_LAYOUT, BLOCK_X, W_ROWS, SUBTILES, SUBTILE_COLUMNS,
                    COLUMN_BLOCKS, COLUMNS, DEPTH, GROUP,
                    X_SCALE, W_SCALE, OUT_SCALE, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT,
                )),
                (_load_tiles, (
                    x_desc, x_scale_desc, w_desc, x_bufs, x_scale_bufs, w_bufs, ready, empty,
                    block_expert_ptr, block_row_ptr, row_ends_ptr, num_blocks_ptr, x_scale_stride,
                    W_ROWS, SECOND_HALF, SUBTILES, SUBTILE_COLUMNS, COLUMN_BLOCKS, DEPTH, GROUP, PDL,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    x_bufs, x_scale_bufs, w_bufs, out_bufs, ready, empty, out_desc,
                    x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, static_scale_ptr,
                    block_expert_ptr, block_row_ptr, num_blocks_ptr, out_scale_stride,
                    0, SWAP, LAYOUT, HALF_LAYOUT, BLOCK_X, W_ROWS, SUBTILES, SUBTILE_COLUMNS,
                    COLUMN_BLOCKS, COLUMNS, DEPTH, GROUP,
                    X_SCALE, W_SCALE, OUT_SCALE, ACTIVATION, SWIGLU_ALPHA, SWIGLU_LIMIT,
                )),
                (_load_tiles, (
                    x_desc, x_scale_desc, w_desc, x_bufs, x_scale_bufs, w_bufs, ready, empty,
                    block_expert_ptr, block_row_ptr, row_ends_ptr, num_blocks_ptr, x_scale_stride,
                    W_ROWS, SECOND_HALF, SUBTILES, SUBTILE_COLUMNS, COLUMN_BLOCKS, DEPTH, GROUP, PDL,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SlotBlocks:
    """Whose rows lie where, on the device.

    block_expert: int32 [blocks], the expert of each row block. num_blocks: int32 [1], how many are in use. block_row:
    int32 [blocks], each block's first row, or None where block b starts at b * block_x. row_ends: int32 [E], the row
    past each expert's last one, so that what lies beyond is not loaded; None: not known. is_new: the launch before the
    GEMM's writes them, so that they must not be read while it runs.
    """

    block_expert: torch.Tensor
    num_blocks: torch.Tensor
    block_row: torch.Tensor | None = None
    row_ends: torch.Tensor | None = None
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """Scales of one GEMM and how they lie.

    x: fp32 [groups, rows] ("group"), [1, rows] ("row"), [1] ("tensor") or [E] ("expert").
    w: fp32 [E, tiles, groups] ("block"), [E, N] ("channel"), [E, 2] or [E] ("tensor").
    out: of gate_up's fp8 output: fp32 [groups, rows], written ("group"), or [E], given ("static").
    """

    x: torch.Tensor
    x_kind: Literal["group", "row", "tensor", "expert"]
    w: torch.Tensor
    w_kind: Literal["block", "channel", "tensor"]
    out: torch.Tensor | None = None
    out_kind: Literal["group", "static"] | None = None


def gate_up_activation_launches(
    x: torch.Tensor,
    w13: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    blocks: SlotBlocks,
    tile: HopperTile,
    config: MoEConfig,
    num_programs: int,
    scales: Fp8Scales | None = None,
) -> list[Launch]:
    """The launches of the experts' first GEMM with bias, gated activation and, for fp8, quantization of its output.

    x: [slots, H] of bf16, fp16 or fp8. w13: [E, 2I, H] of x's dtype. bias: [E, 2I] or None. out: [slots, I] of x's
    dtype. All dense and 16-byte aligned, H and I multiples of 16 bytes; slots a multiple of tile.block_x.
    num_programs: of the persistent grid, the number of SMs.
    """
    constants = (config.activation.value, config.swiglu_alpha, config.swiglu_limit)
    return _launches(x, w13, bias, out, blocks, tile, constants, num_programs, scales)


def down_launches(
    x: torch.Tensor,
    w2: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    blocks: SlotBlocks,
    tile: HopperTile,
    num_programs: int,
    scales: Fp8Scales | None = None,
) -> list[Launch]:
    """The launches of the second GEMM with bias. x: [slots, I]. w2: [E, H, I]. out: [slots, H], bf16 or fp16."""
    return _launches(x, w2, bias, out, blocks, tile, (None, 0.0, 0.0), num_programs, scales)


gate_up_activation = running(gate_up_activation_launches)
down = running(down_launches)

_launcher = Launcher(hopper_gemm_kernel)


@functools.lru_cache(maxsize=64)
def _layout(columns: int, element_size: int) -> Any:
    """Rows of up to 128 bytes, swizzled over their whole width."""
    width = min(128, columns * element_size)
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * element_size, rank=2)


_SCALE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


def _matrix(tensor: torch.Tensor, rows: int, columns: int) -> Descriptor:
    return tensor_descriptor(tensor, (rows, columns), _layout(columns, tensor.element_size()))


def _launches(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    blocks: SlotBlocks,
    tile: HopperTile,
    constants: tuple[str | None, float, float],
    num_programs: int,
    scales: Fp8Scales | None,
) -> list[Launch]:
    num_experts, w_rows, depth = w.shape
    columns = out.shape[1]
    block_k = STAGE_DEPTH_BYTES // x.element_size()
    gated = constants[0] is not None
    x_scale_desc = x_scale = w_scale = out_scale = static_scale = None
    x_kind = w_kind = out_kind = None
    x_stride = out_stride = 0
    if scales is not None:
        x_kind, w_kind, out_kind, w_scale = scales.x_kind, scales.w_kind, scales.out_kind, scales.w
        if x_kind == "group":
            flat, x_stride = scales.x.view(-1), scales.x.stride(0)
            x_scale_desc = tensor_descriptor(flat, (max(tile.block_x, LEAST_SCALES),), _SCALE_LAYOUT)
        else:
            x_scale = scales.x
        if out_kind == "group":
            assert scales.out is not None
            out_scale, out_stride = scales.out, scales.out.stride(0)
        else:
            static_scale = scales.out
    subtiles = 128 // tile.half_w if gated and out_kind == "group" else 1
    tiles = blocks.block_expert.numel() * cdiv(columns, tile.half_w * (subtiles if gated else 2))
    # Where weights stream, the next ones may come while the kernel before ends; a full grid only pays for it.
    pdl = dependent_launch() and not tile.wide and not blocks.is_new
    part_rows = tile.block_x if tile.wide or blocks.row_ends is None else min(tile.block_x, _PART_ROWS)
    launch = _launcher.launch(
        (min(tiles, num_programs),),
        (
            _matrix(x, part_rows, block_k), x_scale_desc,
            _matrix(w.view(num_experts * w_rows, depth), tile.half_w, block_k),
            _matrix(out, tile.out_rows, tile.out_columns),
            x_scale, w_scale, bias, out_scale, static_scale,
            blocks.block_expert, blocks.block_row, None if part_rows == tile.block_x else blocks.row_ends,
            blocks.num_blocks, x_stride, out_stride,
        ),
        (
            tile.block_x, w_rows, columns, depth, x_kind, w_kind, out_kind, *constants,
            not tile.wide, tile.stages(out.element_size(), x_scale_desc is not None), tile.group, tile.num_warps, pdl,
        ),
        num_warps=tile.num_warps,
        launch_pdl=pdl,
        maxnreg=tile.max_registers,
    )  # fmt: skip
    return [launch]
