"""onebase training: QLoRA adapters trained on the frozen 4-bit base. Imports core only."""
