"""`zerotop export`: writes a checkpoint's weights as Hugging Face safetensors, in a process of its own."""
