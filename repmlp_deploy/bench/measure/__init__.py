"""How a benchmark measures: worker processes, timing, peaks, profiles."""
