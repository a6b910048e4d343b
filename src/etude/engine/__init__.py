"""What makes a pass fast: packing, loss, int8, compiled layers, generation."""
