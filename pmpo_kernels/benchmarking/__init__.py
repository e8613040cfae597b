"""Shared by `pmpo-kernels bench` and the pytest-benchmark cases: inputs, variants, accuracy, time, memory, report."""
