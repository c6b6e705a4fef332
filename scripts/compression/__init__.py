"""The experiments of `scripts/bench_compression.py`, one module each."""
