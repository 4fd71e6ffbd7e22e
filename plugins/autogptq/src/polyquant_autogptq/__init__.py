"""auto-gptq for polyquant: the archived library's own layers, in an environment of their own."""
