"""int8 to a target: as few nodes in float32 as an accuracy on labelled images needs."""
