"""The services over gRPC: the daemon, and clients of such daemons."""
