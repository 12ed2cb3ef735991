"""Serve a bundle: what other servers need to serve it."""
