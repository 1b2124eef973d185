"""Recipes: readable YAML files that become the command line of a training run."""
