"""Pruning layer by layer, preserving each layer's outputs."""
