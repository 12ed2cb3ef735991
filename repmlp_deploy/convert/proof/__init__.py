"""Compare every step with the trained network."""
