"""EETQ and Gemma checkpoints for polyquant: integers with one scale for each row, packed on any device."""
