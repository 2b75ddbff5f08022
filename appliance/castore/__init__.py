"""The content model: digests, names, Directories and closures of them, with their rules.

No input or output happens here, and nothing here knows Nix, stores or FUSE.
"""
