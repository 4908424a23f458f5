"""Weights through the signed URL of Meta's e-mail, before anything is installed. No torch."""
