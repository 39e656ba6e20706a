"""Kernels and operators of the head and of Newton-Schulz."""
