"""Name the stage, block and branch where a step goes wrong, and the likely mistake."""
