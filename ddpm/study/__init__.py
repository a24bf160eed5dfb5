"""Studies: claims of the papers, tried small, with seeds."""
