"""The language of `--moe_strategy`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_plugin.errors import UnknownStrategyError
from moe_plugin.strategies.names import AUTO, Request, parse_request

KNOWN = ("local+loop", "nccl_all_to_all+loop", "nccl_all_to_all+triton_fused_moe")


def test_one_name_is_for_both_phases() -> None:
    request = parse_request("  local+loop ", KNOWN)
    assert request == Request("local+loop", "local+loop", "local+loop")
    assert not request.is_phased


def test_auto_is_not_resolved() -> None:
    assert parse_request(AUTO, KNOWN) == Request(AUTO, AUTO, AUTO)


def test_an_alias_of_a_strategy_that_is_not_registered_is_unknown() -> None:
    with pytest.raises(UnknownStrategyError):
        parse_request("torch", KNOWN)


@pytest.mark.parametrize(
    ("text", "decode", "prefill"),
    [
        ("decode=local+loop,prefill=nccl_all_to_all+loop", "local+loop", "nccl_all_to_all+loop"),
        ("prefill=nccl_all_to_all+loop,decode=local+loop", "local+loop", "nccl_all_to_all+loop"),
        (" decode = local+loop , prefill = auto ", "local+loop", AUTO),
        ("decode=local+loop", "local+loop", AUTO),
        ("prefill=local+loop", AUTO, "local+loop"),
        ("decode=nccl,prefill=local+loop", "nccl_all_to_all+triton_fused_moe", "local+loop"),
    ],
)
def test_phases(text: str, decode: str, prefill: str) -> None:
    request = parse_request(text, KNOWN)
    assert (request.decode, request.prefill) == (decode, prefill)
    assert request.is_phased
    assert request.aliases == ({"decode": "nccl"} if "=nccl," in text else {})


def test_the_same_name_for_both_phases_still_means_two_phases() -> None:
    assert parse_request("decode=local+loop,prefill=local+loop", KNOWN).is_phased
    assert not parse_request("local+loop", KNOWN).is_phased


@pytest.mark.parametrize(
    "text", ["train=local+loop", "decode=local+loop,decode=local+loop", "=local+loop", "decode=local+loop,local+loop"]
)
def test_malformed_phases_show_the_form(text: str) -> None:
    with pytest.raises(UnknownStrategyError, match="decode=<strategy>,prefill=<strategy>"):
        parse_request(text, KNOWN)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("local+lop", "local+loop"),
        ("nccl_alltoall+loop", "nccl_all_to_all+loop"),
        ("LOCAL+LOOP", None),
        ("atuo", "auto"),
        ("batched_tritn", "batched_triton"),
        ("no_quant_dp_normal_deep_gemm", "no_quant_dp_normal_deepgemm"),
        ("decode=local+lop", "local+loop"),
        ("", None),
        ("zzzz", None),
    ],
)
def test_unknown_names_get_the_nearest(typed: str, meant: str | None) -> None:
    with pytest.raises(UnknownStrategyError) as caught:
        parse_request(typed, KNOWN)
    assert caught.value.nearest == meant
    for name in KNOWN:
        assert name in str(caught.value)
    assert ("Did you mean" in str(caught.value)) == (meant is not None)


@given(st.text(max_size=40))
def test_any_text_is_a_request_or_unknown(text: str) -> None:
    try:
        request = parse_request(text, KNOWN)
    except UnknownStrategyError:
        return
    assert {request.decode, request.prefill} <= {AUTO, *KNOWN}
