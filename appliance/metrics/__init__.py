"""What every program that shows metrics shares: figures, families of metrics, and a server.

Supervisors, the daemon and the HTTP cache add what only they know.
"""
