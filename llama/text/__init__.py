"""Text and token ids: tokenizers of every kind, chat formats, streaming. No torch, no model."""
