"""Numeric kernels on arrays: blockwise, deterministic, judged by dense oracles."""
