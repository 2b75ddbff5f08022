"""The processes that touch guest memory: a fork server and its workers, one per virtqueue."""
