"""Running a bundle: numpy, Pillow and one inference runtime."""
