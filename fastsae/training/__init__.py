"""The training loop and what it drives: a run, its update, its start, its checkpoints."""
