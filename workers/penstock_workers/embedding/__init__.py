"""Texts to vectors, and pairs of texts to scores: the models that read and do not write."""
