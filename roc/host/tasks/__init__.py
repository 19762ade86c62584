"""Where problems come from: generated arithmetic or JSONL files."""
