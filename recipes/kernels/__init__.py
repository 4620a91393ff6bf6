"""Triton kernels, each beside its reference in plain PyTorch. Importing one needs the package triton."""
