"""The network families: one file per family."""
