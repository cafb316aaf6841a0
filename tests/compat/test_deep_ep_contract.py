"""What this package relies on in DeepEP: the same topics for the library on GPUs and for its double on CPUs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from moe_plugin.compat import deep_ep as compat
from moe_plugin.testing.rank_pool import RankContext, RankError, RankPool, shared_pool
from tests.compat import deep_ep_contract as contract
from tests.doubles import deep_ep as double

LIBRARY = [pytest.mark.gpu, pytest.mark.deep_ep]
PLACES = [
    pytest.param(("cpu", 2), id="double-2"),
    pytest.param(("cuda", 2), id="library-2", marks=[*LIBRARY, pytest.mark.multi_gpu(2)]),
    pytest.param(("cuda", 4), id="library-4", marks=[*LIBRARY, pytest.mark.multi_gpu(4)]),
]
SECONDS = {"cpu": 60.0, "cuda": 240.0}


@dataclass(frozen=True)
class Outcomes:
    """Of all topics on all ranks. problem: why there are none."""

    device_type: str
    of_ranks: list[dict[str, str | None]]
    problem: str | None = None

    def check(self, topic: str) -> None:
        if self.problem is not None:
            pytest.fail(self.problem)
        for rank, outcomes in enumerate(self.of_ranks):
            assert topic in outcomes, f"not run: rank {rank} ended with {list(outcomes)[-1]}"
            if outcomes[topic] is not None:
                pytest.fail(f"rank {rank}:\n{outcomes[topic]}")


@pytest.fixture(scope="module", params=PLACES)
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    device_type, ranks = request.param
    # NVSHMEM has one world in a process, so the library gets processes of its own for every number of ranks.
    pool = shared_pool("cpu", 4) if device_type == "cpu" else RankPool(ranks, device_type)
    sizes = contract.SMALL if device_type == "cpu" else contract.REAL
    try:
        yield Outcomes(device_type, pool.run(contract.run_all, sizes, ranks=ranks, seconds=SECONDS[device_type]))
    except RankError as problem:
        yield Outcomes(device_type, [], str(problem))
    finally:
        if device_type == "cuda":
            pool.close()


@pytest.mark.parametrize("topic", [*contract.HIGH_THROUGHPUT, *contract.LOW_LATENCY, *contract.SHARED_BUFFER])
def test_contract(outcomes: Outcomes, topic: str) -> None:
    if topic in contract.GRAPHS and outcomes.device_type == "cpu":
        pytest.skip("there are no CUDA graphs on the CPU")
    outcomes.check(topic)


@pytest.mark.parametrize("topic", contract.TRAPS)
@pytest.mark.parametrize("outcomes", PLACES[:1], indirect=True)
def test_what_only_the_double_refuses(outcomes: Outcomes, topic: str) -> None:
    outcomes.check(topic)


def on_three_ranks(context: RankContext) -> None:
    with double.installed():
        # M is such that 3 * M is a multiple of 128.
        sizes = contract.Sizes(128, 6, 2, (5, 0, 7), 4, (512,), 128, 0)
        ranks = contract.Ranks(context, sizes)
        buffer = contract.SharedBuffer(ranks.group)
        buffer.reserve_high_throughput(256, 4)
        buffer.reserve_low_latency(contract.low_latency_shape(ranks))
        contract.fp8_rows(ranks, buffer.raw)
        mine = ranks.inputs(1, 128)[ranks.rank]
        layout = contract.layout_of(buffer.raw, mine.ids, 6).as_arguments()
        with contract.refused("a dispatch between three ranks"):
            buffer.raw.dispatch(
                mine.x,
                topk_idx=mine.ids,
                topk_weights=mine.weights,
                **layout,
                config=double.Buffer.get_dispatch_config(2),
            )
        buffer.release()


def test_three_ranks_have_the_low_latency_mode_alone() -> None:
    shared_pool("cpu", 4).run(on_three_ranks, ranks=3)


def test_the_double_has_all_features_and_goes_away() -> None:
    with double.installed():
        module, package = compat.find()
        assert module is not None
        assert package.version == double.__version__
        assert package.features >= {
            *("Buffer", "cpu", "num_worst_tokens", "low_latency", "recv_hook", "ue8m0", "zero_copy", "combine_out")
        }
        assert compat.low_latency_hidden_sizes(package) == double.LOW_LATENCY_HIDDEN_SIZES
    assert compat.find()[0] is not module


def test_bytes_of_the_low_latency_buffer() -> None:
    # As measured: 1908 MB for 128 tokens, 7168 columns, 256 experts on 4 ranks.
    assert double.Buffer.get_low_latency_rdma_size_hint(128, 7168, 4, 256) == 1_908_410_496


@pytest.mark.gpu
@pytest.mark.deep_ep
def test_parameters_and_sizes_of_the_double_are_those_of_the_library() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the library imports
        module, package = compat.find()
    if module is None or "Buffer" not in package.features:
        pytest.skip(package.describe())
    assert parameters_that_differ(module.Buffer) == []
    assert getattr(module, "topk_idx_t", double.topk_idx_t) == double.topk_idx_t
    for shape in ((128, 7168, 4, 256), (64, 2048, 2, 64)):
        of_library = module.Buffer.get_low_latency_rdma_size_hint(*shape)
        assert of_library == double.Buffer.get_low_latency_rdma_size_hint(*shape)
    for ranks in (2, 4, 8):
        of_library = module.Buffer.get_dispatch_config(ranks).get_nvl_buffer_size_hint(14336, ranks)
        assert of_library == double.Buffer.get_dispatch_config(ranks).get_nvl_buffer_size_hint(14336, ranks)


def parameters_that_differ(of_library: type) -> list[str]:
    """Those of the double that the library has not, at another place (unless by name alone) or with other defaults."""
    differing = []
    names = [name for name, value in vars(double.Buffer).items() if inspect.isroutine(value) and name[0] != "_"]
    for name in ("__init__", *names):
        theirs = inspect.signature(getattr(of_library, name)).parameters
        for place, parameter in enumerate(inspect.signature(getattr(double.Buffer, name)).parameters.values()):
            other = theirs.get(parameter.name)
            is_placed = parameter.kind is parameter.KEYWORD_ONLY or list(theirs)[place : place + 1] == [parameter.name]
            if other is None or other.default != parameter.default or not is_placed:
                differing.append(f"{name}({parameter.name})")
    return differing


def test_parameters_that_differ_are_found() -> None:
    class Other(double.Buffer):
        def combine(self, handle: object, x: object, config: object = 3) -> None:  # type: ignore[override]
            pass

    assert parameters_that_differ(double.Buffer) == []
    assert [each for each in parameters_that_differ(Other) if each[8:] in ("x)", "handle)", "config)", "bias)")] == [
        *("combine(x)", "combine(handle)", "combine(bias)", "combine(config)")
    ]
