"""The castore content model: digests, names, directories, store paths, PathInfos. No I/O."""
