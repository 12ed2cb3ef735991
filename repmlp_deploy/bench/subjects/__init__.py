"""What a benchmark runs: networks and artifacts."""
