"""Hosts: wire formats around the same operations."""
