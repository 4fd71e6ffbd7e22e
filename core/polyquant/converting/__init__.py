"""Converting a quantized checkpoint to another format without quantizing it again: codes and scales, re-labelled."""
