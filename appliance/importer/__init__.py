"""`appliance import`: file system trees into the store."""
