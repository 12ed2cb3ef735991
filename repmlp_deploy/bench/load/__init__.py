"""Load scenarios: samples that arrive as MLPerf Inference lets them arrive."""
