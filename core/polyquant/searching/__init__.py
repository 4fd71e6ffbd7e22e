"""The best assignment of formats to layers under a budget of bytes, by measured sensitivity."""
