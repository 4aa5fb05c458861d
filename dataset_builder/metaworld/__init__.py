"""Meta-World as a source of attempts: tasks, plans that act, the simulator, and labels from its state."""
