"""Loaded models: the only place that knows torch, transformers and sentence-transformers."""
