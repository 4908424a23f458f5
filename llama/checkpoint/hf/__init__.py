"""Hugging Face's folders: config.json with safetensors, and LoRA adapters for their names."""
