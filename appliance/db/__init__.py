"""LMDB as this program uses it: environments, checks before one is mapped, per-boot directories.

Tables and their meaning are the store's.
"""
