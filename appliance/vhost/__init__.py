"""The vhost-user protocol, back-end half, as a state machine over messages.

It knows nothing of FUSE or the store, and leaves guest memory and rings to its `Backend`.
"""
