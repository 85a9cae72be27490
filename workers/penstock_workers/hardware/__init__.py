"""The machine a worker runs on: its devices, its memory, its files. Knows no model."""
