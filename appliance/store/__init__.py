"""The authoritative store: blobs, directories and PathInfos in LMDB and blob files."""
