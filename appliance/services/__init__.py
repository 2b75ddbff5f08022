"""Blobs, Directories and PathInfos as services: contracts, implementations, and their uses.

Implementations keep contents in memory, in a store or with a gRPC peer. No guest is known here.
"""
