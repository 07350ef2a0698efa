"""Fused attention and pose encodings in Triton, each beside a plain torch reference. See README.md."""
from kernels.attention import attention
from kernels.rays import plucker_rays
from kernels.register import patches_in_one_product, register, windows_in_one_launch
from kernels.temporal import temporal_attention

__all__ = ["attention", "patches_in_one_product", "plucker_rays", "register", "temporal_attention", "windows_in_one_launch"]
