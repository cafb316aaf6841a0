"""Benchmarks behind `moe-plugin bench`: how times are taken, what they are compared with, how results are kept.

timing       device clocks, graph capture, cold caches, the machine's ceilings
layers       a layer's random weights, routing skews, the oracle on a sample of tokens, flops and bytes
contenders   what is measured: this package's strategies and other libraries on the same tensors
experts      the sweep behind `moe-plugin bench experts`
ranks        processes of several ranks, a start that they share, times of the slowest
comm         the sweep behind `moe-plugin bench comm`: dispatch and combine alone, with `comm_exchange` and `comm_peers`
routing      `moe-plugin bench routing`: how ranks find out where tokens go
results      the JSON schema
summary      ratios, geometric means, targets and the tables that show them
plot         the picture
"""
