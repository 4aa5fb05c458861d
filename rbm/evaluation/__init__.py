"""How good a reward model is: metrics, what it is shown, baselines, and the report."""
