"""Which layout a cluster can train a model in, and how fast: predicted from config.json alone."""
