"""A multiprocess read-only virtiofs appliance over a content-addressed store."""

__version__ = "0.1.0"
