"""Results of a run: tables, page, plots, comparison."""
