"""GRPO with resample on correct: language models that reason with a tool."""

__version__ = "0.1.0"
