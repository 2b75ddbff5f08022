"""The read-only file system: FUSE operations answered from the images and blobs of a store.

Nothing here waits. An object that the store lacks is raised as a want; the caller asks for it, and
runs the request again.
"""
