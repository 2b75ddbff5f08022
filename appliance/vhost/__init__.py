"""The back-end side of the vhost-user protocol, as a state machine over messages.

It does not depend on FUSE or the store, and leaves mapping guest memory and serving rings to a
`Backend`. "Spec: vhost-user: ..." names sections of QEMU's docs/interop/vhost-user.rst.
"""
