"""A binary cache for Nix over HTTP, in front of any services.

What a store path is, and what may be put, is decided below: in `nix`, `services` and `store`.
"""
