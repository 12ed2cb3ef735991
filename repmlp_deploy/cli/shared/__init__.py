"""What the commands share: running, reporting, and the options of engines."""
