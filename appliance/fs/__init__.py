"""The read-only file system: FUSE operations answered from images and from the blobs of a store.

It never waits: what is not there yet is raised as a want, and the caller asks for it.
"""
