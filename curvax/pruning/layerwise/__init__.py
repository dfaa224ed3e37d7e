"""Pruning layer by layer, so that each layer's outputs stay what they are."""
