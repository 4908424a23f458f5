"""Folders of weights that this library quantized: params.json with quantized.safetensors."""
