"""AutoRound for polyquant: tuned or plain rounding to 2, 3, 4 and 8 bits; its own, GPTQ and AWQ checkpoints."""
