"""Dispatch and combine alone: right results have times on all ranks, wrong ones none, and a broken one stays alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from moe_plugin.bench import summary
from moe_plugin.bench.comm_exchange import (
    PermutedScalingExperts,
    ScalingExperts,
    expected_output,
    factors,
    rows_between_ranks,
    strategy_contenders,
)
from moe_plugin.bench.layers import Inputs
from moe_plugin.bench.plot import draw_comm
from moe_plugin.bench.ranks import JointStopwatch, Ranks, slowest
from moe_plugin.bench.results import (
    CommCell,
    CommMeasurement,
    CommTimes,
    LayerFacts,
    Run,
    Timing,
)
from moe_plugin.cli import app
from moe_plugin.config import ExpertPlacement, Fp8Block, MoEConfig, ParallelConfig
from moe_plugin.errors import ConfigError
from moe_plugin.modular_kernel import ActivationFormat, Dispatched, DispatchHandle, RouterWeightStage
from moe_plugin.prepare_finalize.local import Local
from moe_plugin.prepare_finalize.nccl_all_to_all import NcclAllToAll
from moe_plugin.quantization import quantize_rows
from moe_plugin.strategies.registry import prepare_finalize_classes, register_prepare_finalize
from moe_plugin.testing.rank_pool import RankContext, RankError
from moe_plugin.verdict import Gate, Verdict
from moe_plugin.workspace import WorkspaceArena
from tests.bench.runs import cell as layer_cell
from tests.bench.runs import measured, run

CPU = torch.device("cpu")


class WrongOnRank1(NcclAllToAll):
    """Wrong on one rank, in one row."""

    name = "wrong_on_rank_1"

    def finalize(self, *arguments: Any, **options: Any) -> torch.Tensor:
        result = super().finalize(*arguments, **options)
        if self.config.parallel.ep_rank == 1:
            result[-1] *= 1.1
        return result


class RaisesOnRank0(NcclAllToAll):
    """Raises before it takes part in anything."""

    name = "raises_on_rank_0"

    def __init__(self, config: MoEConfig, arena: WorkspaceArena) -> None:
        super().__init__(config, arena)
        if config.parallel.ep_rank == 0:
            raise RuntimeError("no room in /dev/somebody/memory")


class DiesInFp8(NcclAllToAll):
    """Takes fp8 layers alone, and ends its process."""

    name = "dies_in_fp8"

    @classmethod
    def supports(cls, config: MoEConfig, environment: Any) -> Verdict:
        return Verdict.of(Gate("quantization", config.quantization is not None, "none", "fp8"))

    def prepare(self, *arguments: Any, **options: Any) -> Dispatched:
        os._exit(3)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "240"})


@pytest.fixture(scope="module")
def broken_classes() -> Iterator[list[str]]:
    classes = (WrongOnRank1, RaisesOnRank0, DiesInFp8)
    for cls in classes:
        register_prepare_finalize(cls)
    yield [cls.name for cls in classes]
    for cls in classes:
        prepare_finalize_classes.unregister(cls.name)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, broken_classes: list[str]) -> tuple[Result, Path, Path]:
    folder = tmp_path_factory.mktemp("comm")
    results, picture = folder / "comm.json", folder / "comm.png"
    strategies = ",".join(["nccl_all_to_all", *broken_classes, "local"])
    result = bench(
        *("comm", "--layer", "6,2,128,32", "--tokens", "3", "--dtype", "bf16,fp8", "--strategy", strategies),
        *("--peer", "nccl_raw,deep_ep", "--time-budget", "1e-6", "--device", "cpu", "--world", "2"),
        *("--json", str(results), "--plot", str(picture)),
    )
    return result, results, picture


@pytest.mark.slow
def test_right_results_have_times_of_all_phases(swept: tuple[Result, Path, Path]) -> None:
    cells = Run.load(swept[1]).comm
    assert [(c.dtype, c.tokens, c.world) for c in cells] == [("bf16", 3, 2), ("fp8_block", 3, 2)]
    for cell in cells:
        for name in ("nccl_all_to_all", "nccl_raw"):
            m = cell.of(name)
            assert m is not None
            assert (m.status, m.graph, m.detail) == ("ok", None, "")
            assert m.eager is not None
            assert m.error is not None
            assert m.error < 1e-2
            for timing in (m.eager.dispatch, m.eager.combine, m.eager.both):
                assert timing.p95 is not None
                assert 0 < timing.median <= timing.p95
        ours, raw = cell.of("nccl_all_to_all"), cell.of("nccl_raw")
        assert ours is not None
        assert raw is not None
        assert raw.error == 0
        assert ours.combine_bytes == raw.combine_bytes > 0
        assert raw.combine_bytes % (128 * 2) == 0
        row_bytes = 128 * 2 if cell.dtype == "bf16" else 128 + 4
        assert raw.dispatch_bytes % row_bytes == 0
        assert 0 < raw.dispatch_bytes <= 3 * row_bytes


@pytest.mark.slow
def test_what_goes_wrong_is_said_and_ends_nothing_else(swept: tuple[Result, Path, Path]) -> None:
    assert swept[0].exit_code == 1
    bf16, fp8 = Run.load(swept[1]).comm
    wrong, raises = bf16.of("wrong_on_rank_1"), bf16.of("raises_on_rank_0")
    assert wrong is not None
    assert (wrong.status, wrong.best) == ("wrong", None)
    assert wrong.detail.startswith("rank 1: relative error ")
    assert raises is not None
    assert (raises.status, raises.detail) == ("failed", "rank 0: RuntimeError: no room in memory")
    refused, died = bf16.of("dies_in_fp8"), fp8.of("dies_in_fp8")
    assert refused is not None
    assert (refused.status, refused.detail) == ("unsupported", "quantization: needs fp8, saw none")
    assert died is not None
    assert died.status == "failed"
    assert "died" in died.detail
    statuses = [m.status for m in fp8.measurements]
    assert statuses == ["ok", "wrong", "failed", "failed", "unsupported", "ok", "not installed", "not installed"]


@pytest.mark.slow
def test_the_run_is_shown_drawn_and_repeatable(swept: tuple[Result, Path, Path]) -> None:
    result, file, picture = swept
    loaded = Run.load(file)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"repeat with: {loaded.command}\n" in result.stdout
    assert "--world 2" in loaded.command
    assert loaded.settings.world == 2
    assert "[2/2] 6,2,128,32 fp8_block 3: nccl_all_to_all " in result.stderr
    shown = bench("show", str(file))
    assert shown.exit_code == 0, shown.output
    tables = result.stdout[result.stdout.index("6,2,128,32 (6 experts") :]
    assert tables in shown.stdout
    for words in ("raises_on_rank_0 failed: rank 0", "deep_ep (low latency) not installed", "nccl_all_to_all", "x, "):
        assert words in shown.stdout
    drawn = bench("plot", str(file), "--out", str(picture.with_suffix(".svg")))
    assert drawn.exit_code == 0, drawn.output
    assert "<svg" in picture.with_suffix(".svg").read_text()


@pytest.mark.multi_gpu(2)
def test_both_clocks_and_the_ceiling_on_gpus(tmp_path: Path) -> None:
    file = tmp_path / "comm.json"
    result = bench(
        *("comm", "--layer", "16,4,512,256", "--tokens", "5", "--dtype", "bf16,fp8", "--peer", "nccl_raw,deep_ep"),
        *("--time-budget", "0.05", "--device", "cuda", "--world", "2", "--json", str(file)),
    )
    assert result.exit_code == 0, result.output
    loaded = Run.load(file)
    assert loaded.ceilings.peer_write_bytes_per_second is not None
    assert loaded.ceilings.peer_write_bytes_per_second > 1e10
    for cell in loaded.comm:
        for m in cell.measurements:
            if m.contender in ("nccl_all_to_all", "nccl_raw"):
                assert m.status == "ok"
                assert m.graph is not None
                assert m.eager is not None


def wait_and_measure(context: RankContext) -> tuple[list[list[float]], list[int]]:
    """Rank 1 comes late to every repetition and takes its time in the first step, rank 0 in the second."""
    stopwatch, order = JointStopwatch(context), []

    def step(number: int) -> None:
        order.append(number)
        if context.rank != number:
            time.sleep(0.004)

    repetition = stopwatch.eager([lambda: step(0), lambda: step(1)])

    def late() -> list[float]:
        if context.rank == 1:
            time.sleep(0.03)
        return repetition()

    return stopwatch.repeat(late, 1e-6), order


@pytest.mark.slow
def test_ranks_start_together_and_take_as_many_repetitions() -> None:
    with Ranks("cpu", 2) as ranks:
        by_rank = ranks.run(wait_and_measure, seconds=60)
        with pytest.raises(RankError, match="no answer within"):
            ranks.run(time_out_on_rank_1, seconds=0.5)
    times = [times for times, _ in by_rank]
    counts = {len(step) for steps in times for step in steps}
    assert len(counts) == 1
    assert all(order == [0, 1] * (counts.copy().pop() + 2) for _, order in by_rank)
    # The median, since this machine may be busy: the wait for the late rank is not in the early one's time.
    first, second = (sorted(step)[len(step) // 2] for step in slowest(times))
    assert 4_000 <= first < 25_000
    assert 4_000 <= second < 25_000


def time_out_on_rank_1(context: RankContext) -> None:
    if context.rank == 1:
        time.sleep(60)


def test_the_slowest_rank_counts() -> None:
    assert slowest([[[1.0, 5.0], [2.0, 2.0]], [[3.0, 4.0], [1.0, 9.0]]]) == [[3.0, 5.0], [2.0, 9.0]]


@pytest.mark.parametrize("world", [0, 1])
def test_ranks_are_at_least_two(world: int) -> None:
    with pytest.raises(ConfigError, match="2 or more"):
        Ranks("cpu", world)


def small(quantized: bool = False, **more: Any) -> MoEConfig:
    fields = {"num_experts": 4, "top_k": 2, "hidden_size": 160, "intermediate_size": 8} | more
    return MoEConfig(quantization=Fp8Block() if quantized else None, dtype=torch.bfloat16, **fields)


def handed_over(config: MoEConfig, inputs: Inputs, form: ActivationFormat) -> tuple[Dispatched, torch.Tensor]:
    """One rank's rows in an activation format, the rest of it NaN; and where pair (t, k) is, [T, K]."""
    ids, tokens = inputs.topk_ids.long(), inputs.tokens
    rows, scales = inputs.hidden_states, None
    if config.quantization is not None:
        rows, scales = quantize_rows(rows, 128)
    lease = WorkspaceArena(CPU).lease()
    fields: dict[str, Any] = {"activation_format": form, "handle": DispatchHandle(None, tokens, lease)}  # type: ignore[arg-type]
    if form is ActivationFormat.STANDARD:
        fields |= {"local_ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
        stage, place, size = RouterWeightStage.EXPERTS_GATHER, torch.arange(tokens)[:, None].expand(ids.shape), tokens
    else:
        stage, per_expert = RouterWeightStage.COMBINE, 128
        counts = torch.bincount(ids.flatten(), minlength=config.num_experts)
        before = torch.stack([(ids.flatten()[:i] == e).sum() for i, e in enumerate(ids.flatten())]).view(ids.shape)
        place, size = ids * per_expert + before, config.num_experts * per_expert
        ends = torch.arange(config.num_experts) * per_expert + counts
        fields |= {"group_ends": ends.int(), "expert_num_tokens": counts.int()}
    spread = torch.full((size, rows.shape[1]), float("nan")).to(rows.dtype)
    spread[place.flatten()] = rows.repeat_interleave(ids.shape[1], dim=0)
    if scales is not None:
        groups = torch.full((scales.shape[1], size), float("nan")).T
        groups[place.flatten()] = scales.repeat_interleave(ids.shape[1], dim=0)
        fields["scales"] = groups
    if form is ActivationFormat.BATCHED_EXPERTS:
        spread = spread.view(config.num_experts, per_expert, -1)
        if scales is not None:
            fields["scales"] = fields["scales"].reshape(config.num_experts, per_expert, -1)
    return Dispatched(activations=spread, router_weight_stage=stage, **fields), place


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("form", list(ActivationFormat))
@pytest.mark.parametrize("given", [False, True])
def test_the_stand_in_scales_rows_in_every_format(form: ActivationFormat, quantized: bool, given: bool) -> None:
    config = small(quantized)
    inputs = Inputs.random(config, 7, "zipf", CPU, 3)
    dispatched, place = handed_over(config, inputs, form)
    cls = PermutedScalingExperts if form is ActivationFormat.CONTIGUOUS else ScalingExperts
    out = torch.empty(dispatched.activations.shape, dtype=torch.bfloat16) if given else None
    result = cls(config, CPU).apply(dispatched, dispatched.handle.workspace, out)
    assert result.dtype == torch.bfloat16
    assert out is None or result is out
    if form is not ActivationFormat.STANDARD:
        rows = result.flatten(0, -2)[place].float()
        result = (rows * inputs.topk_weights[..., None]).sum(dim=1)
    torch.testing.assert_close(
        result.float(), expected_output(config, inputs, quantized), rtol=2e-2, atol=1e-2, check_dtype=False
    )


def test_rows_without_experts_of_this_rank_are_zeros() -> None:
    config = small(parallel=ParallelConfig(ep_size=2, ep_rank=1))
    rows = torch.full((2, 160), float("nan"), dtype=torch.bfloat16)
    rows[1] = 2
    ids = torch.tensor([[-1, -1], [-1, 1]], dtype=torch.int32)
    result = ScalingExperts(config, CPU).standard(rows, ids, torch.full((2, 2), 0.5))
    assert result[0].eq(0).all()
    # Slot 1 of rank 1 is expert 3.
    assert result[1].eq(float(factors(4, CPU)[3])).all()


def test_factors_are_exact_in_bf16_and_tell_experts_apart() -> None:
    found = factors(64, CPU)
    assert torch.equal(found.bfloat16().float(), found)
    assert len(set(found.tolist())) == 64
    assert found[:2].tolist() == [1.0, 1.578125]


def test_expected_output_skips_dropped_pairs() -> None:
    config = small()
    inputs = Inputs(
        torch.full((1, 160), 2.0, dtype=torch.bfloat16), torch.tensor([[1, -1]], dtype=torch.int32), torch.ones(1, 2)
    )
    assert expected_output(config, inputs, quantized=False).eq(2 * 1.578125).all()


def test_a_token_goes_to_a_rank_once() -> None:
    placement = ExpertPlacement.round_robin(4, 2)
    config = small(parallel=ParallelConfig(ep_size=2), placement=placement)
    # Ranks of experts 0 to 3: 0, 1, 0, 1.
    routing = torch.tensor([[[0, 2], [1, 2]], [[3, 1], [3, 1]]], dtype=torch.int32)
    inputs = Inputs(torch.zeros(2, 160), routing[0], torch.ones(2, 2), routing)
    assert rows_between_ranks(config, inputs).tolist() == [[2, 1], [0, 2]]


def test_a_class_with_several_ways_makes_several_contenders() -> None:
    class Hybrid(Local):
        name = "hybrid_dense_routing"

    names = [contender.name for contender in strategy_contenders(Hybrid)]
    ways = ["", " (permute)", " (hybrid_ep)", " (hybrid_ep_permute)"]
    assert names == [f"hybrid_dense_routing{way}" for way in ways]
    assert [contender.name for contender in strategy_contenders(Local)] == ["local"]


def times(dispatch: float, combine: float) -> CommTimes:
    timings = [Timing(median=t, p10=t, p90=t, p95=1.1 * t, count=9) for t in (dispatch, combine, dispatch + combine)]
    return CommTimes(dispatch=timings[0], combine=timings[1], both=timings[2])


def comm_cell(**more: Any) -> CommCell:
    ours = {"role": "strategy", "status": "ok", "error": 2e-3, "dispatch_bytes": 10**6, "combine_bytes": 2 * 10**6}
    peer = ours | {"role": "peer", "error": 0.0}
    measurements = (
        CommMeasurement(contender="mine", num_sms=24, graph=times(10, 20), eager=times(30, 40), **ours),
        CommMeasurement(contender="raw", note="packed", graph=times(5, 30), **peer),
        CommMeasurement(contender="slow", eager=times(60, 60), **peer),
        CommMeasurement(contender="gone", role="peer", status="failed", detail="[Errno 3] lost"),
    )
    layer = LayerFacts(name="deepseek-v3", num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
    return CommCell(layer=layer, dtype="bf16", tokens=8, world=4, skew="uniform", measurements=measurements, **more)


def test_ratios_are_to_the_fastest_peer_on_the_same_clock() -> None:
    cell = comm_cell()
    assert summary.comm_ratio(cell, "mine", "graph", "dispatch") == 0.5
    assert summary.comm_ratio(cell, "mine", "graph", "combine") == 1.5
    assert summary.comm_ratio(cell, "mine", "eager", "both") == 120 / 70
    assert summary.comm_ratio(cell, "raw", "graph", "both") is None
    assert summary.comm_ratio(cell, "gone", "eager", "both") is None


def test_tables_and_lines_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=220).print(summary.comm_table(comm_cell(), 4e11))
    shown = capsys.readouterr().out
    # 1 MB in 10 us are 100 GB/s, a quarter of the ceiling.
    for words in ("0.50x, 1.50x, 1.17x", "11.0", "100", "25%", "24", "gone failed: [Errno 3] lost", "raw: packed"):
        assert words in shown
    assert summary.comm_line(comm_cell()) == (
        "deepseek-v3 bf16 8: mine 10.0 + 20.0 us, raw 5.0 + 30.0 us, slow 60.0 + 60.0 us, gone failed"
    )


def test_comm_cells_are_saved_beside_others_and_only_where_there_are_some(tmp_path: Path) -> None:
    saved = run().with_comm_cell(comm_cell())
    assert Run.from_json(saved.to_json()) == saved
    assert '"comm"' not in run(layer_cell(measured("vllm", 3.0))).to_json()


def test_pictures_of_two_kinds_are_not_mixed(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    run().with_comm_cell(comm_cell()).save(files[0])
    run(layer_cell(measured("vllm", 3.0))).save(files[1])
    result = bench("plot", *map(str, files), "--out", str(tmp_path / "x.png"))
    assert result.exit_code == 1
    assert "draw them apart" in result.stderr
    with pytest.raises(ConfigError, match="no cell has a time"):
        draw_comm([run()], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strategy", "nccl_all_to_al"], "Did you mean 'nccl_all_to_all'?"),
        (["--peer", "nvshmem"], "unknown peer 'nvshmem'; known: nccl_raw, deep_ep"),
        (["--world", "1"], "2 or more, got 1"),
        (["--json", "absent/x.json"], "there is no folder absent"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], words: str) -> None:
    result = bench("comm", "--layer", "4,2,64,32", "--device", "cpu", *arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
