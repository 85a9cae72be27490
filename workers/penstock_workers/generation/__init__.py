"""Prompts become text: one causal language model, whose requests share forward passes."""
