"""Jobs into batches, and batches onto threads; knows no model."""
