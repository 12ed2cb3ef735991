"""The artifact formats: one file per format."""
