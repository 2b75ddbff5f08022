"""The processes that touch guest memory: a fork server, and a worker for each virtqueue or clone.

A worker answers from the store and asks the supervisor for all else; it opens no path of its own.
"""
