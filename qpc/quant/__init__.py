"""Numerics only: quantizers, codes, rotations. Nothing here knows a graph."""
