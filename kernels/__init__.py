"""Fused attention and pose encodings in Triton, each beside a plain torch reference: README.md."""

from kernels.attention import attention
from kernels.rays import plucker_rays
from kernels.register import load_model, prepare, register
from kernels.temporal import temporal_attention

__all__ = ["attention", "load_model", "plucker_rays", "prepare", "register", "temporal_attention"]
