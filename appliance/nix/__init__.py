"""What Nix defines: NARs, store paths, hashes, PathInfos, NarInfos, signatures.

Nothing here does input or output. Trees are defined in `castore`; reading and storing paths is up
to `services` and `store`.
"""
