"""Sparsity: which zeros a weight may have, how pruned weights are trained, which layers qualify, and structure that is removed."""
