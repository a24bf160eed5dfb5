"""What a trained network is worth: distances, bits/dim, losses, each with its protocol."""
