"""`appliance import`: copies file system trees into a store as store paths.

Only this package reads trees to import. How their contents are stored is decided by the sink: a
local store or services. `importer.py` begins with how the processes work together.
"""
