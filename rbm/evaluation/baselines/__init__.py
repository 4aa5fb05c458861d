"""Scorers that look at no picture: the floor that every model must clear. One file each."""
