"""GRPO with resample on correct: language models that reason with a tool."""
