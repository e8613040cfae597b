"""The fused LM head: the loss from hidden states, with logits of one chunk of tokens at a time."""

from pmpo_kernels.linear.loss import linear_pmpo_loss as linear_pmpo_loss
