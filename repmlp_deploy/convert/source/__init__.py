"""Read a checkpoint file and build the trained network from it."""
