"""Log-likelihoods as evaluation harnesses ask for them, over HTTP, beside mlx-lm's own."""
