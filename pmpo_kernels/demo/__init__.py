"""What `pmpo-kernels demo` runs: rollouts of a small language model, one update, the loss compared on real logits."""
