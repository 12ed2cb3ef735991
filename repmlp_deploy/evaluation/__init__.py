"""Evaluating a bundle on labelled data: data sets, tallies, and the loop over them. Needs no torch."""
