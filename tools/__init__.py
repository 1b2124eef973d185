"""Command-line programs, installed as console scripts."""
