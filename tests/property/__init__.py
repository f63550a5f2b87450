"""Hypothesis tests: what must hold for every input. They know no example."""
