"""What this host lacks for serving a store, or has set badly, and the command that mends it.

Every check makes the system call or runs the program that the use depends on, in a child process
where that changes the process. Versions are compared only where nothing can be tried. Nothing here
is imported by a command that serves.
"""
