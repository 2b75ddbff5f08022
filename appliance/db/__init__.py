"""LMDB as this program uses it: environments, checks before one is mapped, per-boot directories.

What the tables mean is the business of `appliance.store`.
"""
