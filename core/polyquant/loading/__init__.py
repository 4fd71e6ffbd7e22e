"""From a request to a model, and the proof of what it is."""
