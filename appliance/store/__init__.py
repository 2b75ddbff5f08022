"""The authoritative store: blobs, Directories, images and PathInfos, in LMDB and in blob files.

Only this package knows the tables, their keys, and where the files of blobs are.
"""
