"""What the supervisor and its processes share: the control channel and the session memory."""
