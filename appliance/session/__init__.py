"""What the processes of one session share: the control channel, its messages, and shared memory.

Nothing here decides anything; it knows neither guests nor services.
"""
