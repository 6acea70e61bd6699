"""The same mathematics, fast: one folder per operation, its definition beside its back ends."""
