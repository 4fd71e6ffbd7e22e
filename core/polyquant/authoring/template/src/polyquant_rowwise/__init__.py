"""rowwise for polyquant: 8 bit with one scale for each output row, in plain torch."""
