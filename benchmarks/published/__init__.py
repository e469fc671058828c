"""Sampling the ways others published it, on our weights: what the benchmarks compare ours with.

The official loop, selective Jacobi decoding and GS-Jacobi, each written from its description. Rules
that belong to a method's design are kept, such as one stopping rule for the whole batch, and so are
the two separate passes that guidance takes in all three.
"""

from benchmarks.published.gs_jacobi import Strategy, gs_jacobi
from benchmarks.published.loop import sample
from benchmarks.published.selective_jacobi import selective_jacobi

__all__ = ["Strategy", "gs_jacobi", "sample", "selective_jacobi"]
