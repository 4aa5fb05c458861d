"""Acting by looking ahead: a simulator plays what could be done, the reward model says which of it is best."""
