"""The `gsae` commands, one file a group; what they print to a terminal."""
