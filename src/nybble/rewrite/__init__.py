"""Making a checkpoint right: comparing two of them. Nothing here needs the network's code."""
