"""Planning a run: its sizes without training, its speed from a few real steps."""
