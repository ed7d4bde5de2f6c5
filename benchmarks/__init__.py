"""Benchmarks: each measures against its baseline in the same process, after a check of correctness."""
