"""Transformer blocks from fused ops, with a hand-written backward for activations: what makes value gradients cheap."""
