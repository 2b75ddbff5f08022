"""Directory images, and the places of nodes in the tree of a store path.

An image is derived from one Directory and answers requests about its entries. Nothing here does
I/O: the caller reads the images.
"""
