"""How far a quantized model is from the dense one: pure functions on logits, which know no backend."""
