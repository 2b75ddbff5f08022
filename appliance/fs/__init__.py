"""The read-only file system: FUSE operations over the node index and the store."""
