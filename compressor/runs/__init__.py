"""Runs: from a recipe to a directory with a checked model, samples and a report."""
