"""MLX for polyquant: its checkpoints packed on any device, its rounding, and folders that mlx-lm runs."""
