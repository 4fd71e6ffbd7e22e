"""One cell of a comparison, in the process that measures it."""
