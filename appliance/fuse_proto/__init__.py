"""The FUSE protocol without I/O: decodes requests, dispatches them, and encodes replies.

A transport (a virtqueue or /dev/fuse) passes the bytes of a request to
`Dispatcher.handle_untrusted` and delivers the `Reply`. A file system implements `Operations`.
Layout of the messages:

    request   InHeader, arguments of the opcode, names ending in NUL, payload
    reply     OutHeader, and if its error is 0 the body
"""
