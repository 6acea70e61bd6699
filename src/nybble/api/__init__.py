"""The commands as functions: the one place that joins packages which may not see each other."""
