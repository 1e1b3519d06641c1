"""Fine-tuning beside transformers.Trainer, alone and with DeepSpeed: losses, speed, memory."""
