"""The authoritative store: blobs, Directories, images and PathInfos in LMDB and in blob files.

It is the only package that knows tables, keys and paths of blob files.
"""
