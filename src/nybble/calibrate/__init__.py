"""Making it faithful: what a forward pass over text says of inputs, and the scales of that."""
