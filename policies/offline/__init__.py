"""Offline RL: policies learned from transitions that carry rewards, without an environment."""
