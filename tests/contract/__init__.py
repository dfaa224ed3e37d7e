"""What Optax asks of any optimizer, asked of every optimizer of curvax."""
