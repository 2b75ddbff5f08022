"""Linux facilities that Python's standard library lacks: system calls, processes, sd_notify.

Nothing here depends on what the rest of the program does.
"""
