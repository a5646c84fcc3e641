"""Fused operations of the hot paths. Each op is a folder: reference (plain PyTorch), kernel (Triton), bench (cases).

`from fastssl.kernels.ema_update import ema_update`. An op picks its path at each call (`fastssl.kernels._path`): the
kernel for CUDA tensors where Triton is installed, the reference otherwise.
"""
