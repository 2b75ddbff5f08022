"""Configuration: the one table of settings, the file that sets them, and which source wins.

The parser of the command line, the checks of the file, `appliance config`, the manual page and the
document about the file are all made from the table.
"""
