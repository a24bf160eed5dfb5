"""From a run or a folder of weights to images: one way for every command."""
