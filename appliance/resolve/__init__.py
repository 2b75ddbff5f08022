"""Answers to the wants of workers: paths granted, images made, blobs fetched.

This package runs in the supervisor. Workers ask through their control channels and never import it.
"""
