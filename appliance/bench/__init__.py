"""Measures a virtiofs back-end from outside: a guest that mounts, walks, verifies and loads it.

The same measurements can be made with system calls on a mounted directory.
"""
