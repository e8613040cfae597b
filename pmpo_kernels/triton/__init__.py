"""Triton kernels of the stages, one file each; the functions are named and called like those of `reference`."""

from pmpo_kernels.triton.aggregate import aggregate
from pmpo_kernels.triton.dlogits import dlogits
from pmpo_kernels.triton.token_logp import token_logp
from pmpo_kernels.triton.trajectory import trajectory

__all__ = ["aggregate", "dlogits", "token_logp", "trajectory"]
