"""Buttons of chat cards: pressed buttons arrive as HTTP callbacks or over a long connection."""
