"""What a run will be: sizes without training, speed from a few real steps."""
