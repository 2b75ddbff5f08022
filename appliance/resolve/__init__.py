"""What the wants of workers come to: paths granted, images made, blobs fetched.

All of it runs in the supervisor. A worker asks through its control channel and never comes here.
"""
