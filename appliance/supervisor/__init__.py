"""The long-lived processes: they accept front-ends or mount, and keep workers alive.

No request of a guest is read or answered here; that is what workers are for.
"""
