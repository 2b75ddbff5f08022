"""The NAR format, and the base-32 alphabet of Nix. No I/O."""
