"""The vhost-user protocol, back-end half; knows nothing of FUSE, rings or the store."""
