"""Stand-ins for the third-party modules that need a GPU; `gpu` is the device they share."""
