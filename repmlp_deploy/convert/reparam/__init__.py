"""Merge branches and fold BatchNorms: network in, network out."""
