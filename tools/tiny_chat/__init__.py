"""Trains the chat model `bundled:tiny-chat` and examines it."""
