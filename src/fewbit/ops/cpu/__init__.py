"""Kernels for CPUs in C, and how they are built."""
