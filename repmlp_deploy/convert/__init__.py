"""Offline: from a trained checkpoint to a bundle. Only `pipeline` knows the order of the steps."""
