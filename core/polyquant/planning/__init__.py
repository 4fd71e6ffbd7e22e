"""What a model takes before it is loaded: plans from headers alone, and a recommendation with its reason."""
