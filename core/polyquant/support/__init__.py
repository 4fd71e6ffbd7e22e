"""Files, processes, sizes, the machine: what any room may use."""
