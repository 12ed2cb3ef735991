"""The commands: arguments in, report out, no logic."""
