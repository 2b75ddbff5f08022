"""Blobs, Directories and PathInfos as services: contracts, implementations and uses of them.

Implementations keep contents in memory, in a store, with a gRPC peer
or in an object store. Nothing here knows guests.
"""
