"""Policies that learn while they act: SAC from scratch, from demonstrations, and over the noise of a flow policy."""
