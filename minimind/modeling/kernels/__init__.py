"""Triton kernels for training in bf16 on CUDA GPUs."""
