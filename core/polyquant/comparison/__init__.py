"""Compare candidates: each measured in a process of its own, from a JSON job to a JSON result."""
