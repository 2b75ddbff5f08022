"""`appliance import`: file system trees become store paths.

Trees are read here and nowhere else; what a store does with the result is the store's affair.
"""
