"""What Nix defines: NARs, store paths, hashes, PathInfos, NarInfos, signatures.

No input or output happens here; trees are castore's, and where a path is stored is the services'.
"""
