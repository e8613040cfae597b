"""What `pmpo-kernels demo` runs: rollouts of a small language model, one update, and the loss compared on real logits."""
