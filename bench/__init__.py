"""Measurements against other people's best: `python -m bench {svd, linear, table}`, `pytest bench/bench_kernels.py`."""
