"""The daemon: the services of this host, served over gRPC.

Clients of such daemons are services like any other and live in `appliance.services`.
"""
