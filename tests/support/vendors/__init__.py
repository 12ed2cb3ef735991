"""NVIDIA's Python packages as they are published: downloaded, listed without a GPU, and compared with our sources."""
