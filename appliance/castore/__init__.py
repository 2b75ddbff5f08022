"""The content model: digests, names, directories and closures of directories, with their rules.

Nothing here does input or output, or depends on Nix, stores or FUSE.
"""
