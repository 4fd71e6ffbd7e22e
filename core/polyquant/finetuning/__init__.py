"""Fine-tuning: PEFT adapters on a frozen quantized base. Knows no backend; imports torch only where it trains."""
