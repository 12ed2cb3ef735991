"""What is trained: blocks, networks and the heads of tasks (torch)."""
