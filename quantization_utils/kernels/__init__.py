"""Kernels of packed models."""

from . import reference


def make_executor(nodes, backend="auto"):
    return reference.NetworkExecutor(nodes)


def make_linear(codes, scale, bias, act_bits=8, backend="auto"):
    return reference.Linear(codes, scale, bias, act_bits)
