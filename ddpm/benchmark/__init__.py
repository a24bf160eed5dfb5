"""How fast this machine trains and samples."""
