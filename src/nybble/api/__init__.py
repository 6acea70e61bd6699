"""The commands as Python functions. The only place that joins packages which may not see each other."""
