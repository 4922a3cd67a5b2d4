"""What `nunchaku evaluate` does: draw the same pictures with several transformers and say how far they are apart."""
