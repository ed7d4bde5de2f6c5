"""Tensor parallelism: each process reads and holds a part of the packed weights, and takes its part of every product.

What is split follows the plan that transformers has for a family; how it is split, from the blocks of the codes and of the rotations.
"""
