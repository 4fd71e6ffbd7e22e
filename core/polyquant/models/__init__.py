"""From what a user calls a model to checked files on disk."""
