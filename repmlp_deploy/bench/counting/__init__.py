"""Count parameters, multiply-adds and bytes."""
