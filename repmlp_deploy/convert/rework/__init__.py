"""Change or re-check a finished bundle: add an engine, refit, derive again, locate a fault."""
