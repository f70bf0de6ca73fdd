"""The page of a run: `evaluate.py report` writes one HTML file to look at."""
