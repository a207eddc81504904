"""Sparse encoders that are trained: architectures, their starting weights, the fused SPLADE head."""
