"""Studies: claims of the papers, tested at a small scale over several seeds."""
