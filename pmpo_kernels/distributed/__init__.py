"""The loss on several devices: vocabulary, trajectories and batches split over the ranks of torch.distributed.

What each rank of a dimension of the mesh holds, and the collectives of a call:

- "tp" (vocabulary): all tokens, a part of the vocabulary; one gather of 4 numbers a token.
- "cp" (sequence): a part of each trajectory's tokens, the whole vocabulary; one gather of a few numbers a token.
- "dp", `"dp_..."` (data): other trajectories; one sum of one number.

The calls are those of one device with `mesh=` or, for the vocabulary alone, `group=`; `denominator` serves accumulation.
"""

from pmpo_kernels.distributed.denominator import denominator

__all__ = ["denominator"]
