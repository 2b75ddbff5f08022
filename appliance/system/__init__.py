"""Linux, where Python's standard library ends: system calls, child processes, sockets, sd_notify.

Nothing here knows what the rest of this program is for.
"""
