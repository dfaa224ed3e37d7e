"""Pruning of trained networks: accuracy, perplexity and BLEU over sparsity, time and memory."""
