"""What is done with whole stores: describe, list, copy, re-encode, seal, verify."""
