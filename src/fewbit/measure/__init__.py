"""Numbers about a model: what it is, what it needs, how well it predicts, how fast it runs."""
