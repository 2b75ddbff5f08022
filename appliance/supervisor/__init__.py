"""The supervisor processes: they accept front-ends or mount, and keep worker processes alive.

Nothing here reads or answers a guest's requests; only workers do that.
"""
