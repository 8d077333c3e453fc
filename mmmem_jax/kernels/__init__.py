"""Kernels: one folder each, with its reference, its implementations and the choice among them."""
