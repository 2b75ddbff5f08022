"""Blobs, Directories and PathInfos as services: contracts, implementations and uses of them.

Implementations keep contents in memory, in a store or with a gRPC peer. Nothing here knows guests.
"""
