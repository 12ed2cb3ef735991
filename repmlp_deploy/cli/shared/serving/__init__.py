"""The options of `repmlp-serve`."""
