"""The elementwise part of a chunk and its products. Numbers and tensors in, never margin objects."""

from partial_fc.kernels.products import multiply
from partial_fc.kernels.reference import ChunkNormalizer, chunk_gradient, emphasized, partial_normalizer

__all__ = ["ChunkNormalizer", "chunk_gradient", "emphasized", "multiply", "partial_normalizer"]
