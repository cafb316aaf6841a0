"""Libraries that are optional and change between releases: found when asked for, and only here.

deep_gemm    DeepGEMM's grouped GEMMs under the names of every release that has them
deep_ep      DeepEP's dispatch and combine
"""
