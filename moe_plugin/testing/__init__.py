"""The conformance kit: the tests that every strategy must pass, for the built-in ones and for yours.

    # test_my_dispatch.py
    from moe_plugin.testing import conformance_tests

    def register():
        moe_plugin.register_prepare_finalize(MyDispatch)

    test_my_dispatch = conformance_tests("my_dispatch+torch_native", setup=register)

runs every check below on 1 to 4 ranks in every dtype, on gloo where there is no GPU and on NCCL where there are enough.
"""

from moe_plugin.testing.checks import CHECKS, Refused
from moe_plugin.testing.pytest_tests import conformance_tests
from moe_plugin.testing.rank_pool import RankPool, shared_pool

__all__ = ["CHECKS", "RankPool", "Refused", "conformance_tests", "shared_pool"]
