"""Garbage collection and disk usage: what is reachable from roots, removing the rest, and sizes.

The theory of operation is in `collection`. How anything is stored is the business of `store/`.
"""
