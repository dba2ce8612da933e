"""What a run tells: metrics, curves, model card, pushes, report."""
