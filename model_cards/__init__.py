"""Model cards: the template, and the cards of reference quantized models."""
