"""Store paths with all that is known of them, from a Nix store, a binary cache or other services.

Sources say what they know of a path and give its tree; what lives here checks both and commits.
What becomes of file trees that are no store paths yet is in `importer/`.
"""
