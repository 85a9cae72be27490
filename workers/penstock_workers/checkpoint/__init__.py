"""The files of a model: where they are, what they hold, what they need of memory."""
