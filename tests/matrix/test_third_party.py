"""Classes that another package registers run through the same matrix, in three lines each."""

import pytest
import torch

from moe_plugin.testing import CHECKS, conformance_tests
from moe_plugin.testing.pytest_tests import device_type_for
from tests.matrix.third_party import register

pytestmark = pytest.mark.slow

test_experts = conformance_tests("nccl_all_to_all+loop", setup=register, ranks=(1, 2, 3))
test_monolithic = conformance_tests("oracle", setup=register, ranks=(1,))
test_batched_format_torch_native = conformance_tests("batched_local+torch_native", setup=register, ranks=(1,))
# In the interpreter this row takes longer than all others, and local+triton_fused_moe runs it there as well.
left_out = {"fp8_extreme_values"} if device_type_for(1) == "cpu" else set()
test_batched_format_triton_fused_moe = conformance_tests(
    "batched_local+triton_fused_moe",
    setup=register,
    ranks=(1,),
    dtypes=(torch.bfloat16,),
    checks=[name for name in CHECKS if name not in left_out],
)
