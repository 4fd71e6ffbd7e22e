"""How a quantized model answers beside the dense one: shipped prompts, judged by a program."""
