"""Triton kernels of the stages and of the fused head's backward pass, named and called like the functions of `reference`."""

from pmpo_kernels.triton.aggregate import aggregate
from pmpo_kernels.triton.dlogits import dlogits
from pmpo_kernels.triton.scale import scale_
from pmpo_kernels.triton.token_logp import token_logp
from pmpo_kernels.triton.trajectory import trajectory

__all__ = ["aggregate", "dlogits", "scale_", "token_logp", "trajectory"]
