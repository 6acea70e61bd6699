"""What is wrong with a checkpoint: what its files hold, against its configuration and its plan."""
