"""The read-only file system: FUSE operations over images and blobs of the store."""
