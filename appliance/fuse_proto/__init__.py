"""The FUSE protocol, sans-I/O: requests and replies as bytes, and who answers which.

A front end (a virtqueue, /dev/fuse) hands the bytes of a request to `Dispatcher.handle_untrusted`
and delivers the `Reply`; a file system is an `Operations`. Layout of every message:

    request   InHeader, arguments of the opcode, names ending in NUL, payload
    reply     OutHeader, and if its error is 0 the body
"""
