"""What the processes of one session share: the control channel, its messages, and shared memory.

Nothing here makes decisions, and nothing here depends on guests or services.
"""
