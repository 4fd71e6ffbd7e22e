"""Quality and speed of a model, measured without knowing what made it."""
