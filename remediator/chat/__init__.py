"""Buttons of chat cards: callbacks over HTTP and by long connection."""
