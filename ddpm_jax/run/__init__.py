"""A run: from its fields to objects, and its record, checkpoints and weights on disk."""
