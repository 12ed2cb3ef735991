"""Benchmarks: what is compared, how it is timed, what is counted, and what the machine could do at best."""
